"""What a cache in int8 saves at long contexts: one kernel and whole passes, beside bfloat16.

    .venv/bin/python benchmarks/int8_cache.py                        # attention alone, V3's row
    .venv/bin/python benchmarks/int8_cache.py --model FOLDER         # and decoding with a model
    .venv/bin/python benchmarks/int8_cache.py --model MODEL --quality    # and log-probabilities

Both caches are measured in turns in one process; a ratio is the median over the turns. The rows are
random numbers: what is in them costs no time. With --threads 1 the process's own time counts, so
that a busy machine disturbs less. --quality compares log-probabilities of the model's own samples.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from statistics import median

import torch
from torch import Tensor

import qiusuo
from qiusuo.engine.limits import Limits
from qiusuo.engine.paged_cache import PAGE_TOKENS, PagedCache, Place
from qiusuo.engine.request import Request
from qiusuo.engine.sampling import Sampling
from qiusuo.kernels.cached_rows import Int8Rows
from qiusuo.kernels.latent_attention import latent_attention, walks_pages

LATENT, ROPE, HEADS = 512, 64, 16
CONTEXTS, BATCHES = (256, 4096, 16384), (1, 16)
TURNS, PASSES = 15, 4
ROOM = 1 << 30  # bytes of bfloat16 rows: far beyond the processor's caches


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="decode with this model, too")
    parser.add_argument("--quality", action="store_true", help="compare log-probabilities")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 4096, 16384])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    if options.model is None:
        kernel(clock)
        return
    if options.quality:
        quality(options.model)
        return
    lm = qiusuo.load(options.model, draft="none", limits=Limits(cache_bytes=1 << 28))
    for context in options.contexts:
        decoding(lm, context, clock)


def kernel(clock: Callable[[], float]) -> None:
    print("attention alone, microseconds a call:    bf16    int8   times as fast")
    rows = Int8Rows(LATENT, ROPE, torch.bfloat16)
    for batch in BATCHES:
        for context in CONTEXTS:
            pages, size = context // PAGE_TOKENS, LATENT + ROPE
            sets = max(1, min(32, ROOM // (batch * context * size * 2)))
            count = sets * batch * context
            numbers = torch.randn(count, size).bfloat16()
            coded = torch.empty(count, rows.width, dtype=torch.uint8)
            rows.keep(numbers, coded, torch.arange(count))
            q_NHE = torch.randn(batch, HEADS, size).bfloat16()
            tables_sNp = torch.arange(sets * batch * pages).view(sets, batch, pages)
            lengths_N = torch.full((batch,), context)
            caches = [one.view(-1, PAGE_TOKENS, one.shape[1]) for one in (numbers, coded)]
            if not walks_pages(q_NHE, caches[0], LATENT):
                raise SystemExit("no native kernel for latent attention on this machine")

            calls = [partial(attend, q_NHE, one, tables_sNp, lengths_N) for one in caches]
            took = in_turns(calls, clock)
            tell(f"{batch} x {context}", took, 1e6 / sets)


def attend(q_NHE: Tensor, entries_psW: Tensor, tables_sNp: Tensor, lengths_N: Tensor) -> None:
    for table_Np in tables_sNp:
        latent_attention(q_NHE, entries_psW, table_Np, lengths_N, LATENT, 0.04)


def decoding(lm: qiusuo.LanguageModel, context: int, clock: Callable[[], float]) -> None:
    """Passes of one sequence that has ``context`` tokens, and what the head makes of them."""
    model, pages = lm.model, -(-(context + 1) // PAGE_TOKENS)
    _ = lm.engine  # lays out what is absorbed
    weight = model.model.embed_tokens.weight
    caches = [
        PagedCache(model.config, pages, weight.dtype, weight.device, cache=cache)
        for cache in (None, "int8")
    ]
    for cache in caches:
        for layer_psW in cache.entries_LpsW:
            rows_SW = layer_psW.flatten(0, 1)
            numbers = torch.randn(len(rows_SW), model.config.cache_width).to(weight.dtype)
            cache.rows.keep(numbers, rows_SW, torch.arange(len(rows_SW)))
    token, position = torch.tensor([[5]]), torch.tensor([[context]])

    @torch.inference_mode()
    def passes(cache: PagedCache) -> None:
        for _ in range(PASSES):
            group = cache.group([Place(list(range(pages)), context)], 1, absorbed=True)
            model.logits(model(token, position, groups=[group]).x_BTD)

    took = in_turns([partial(passes, one) for one in caches], clock)
    tell(f"pass at {context}", took, 1e6 / PASSES)


def in_turns(works: Sequence[Callable[[], None]], clock: Callable[[], float]) -> list[list[float]]:
    took: list[list[float]] = [[] for _ in works]
    for turn in range(TURNS + 1):
        for work, times in zip(works, took, strict=True):
            began = clock()
            work()
            if turn:  # the first warms up
                times.append(clock() - began)
    return took


def tell(what: str, took: list[list[float]], factor: float) -> None:
    plain, coded = took
    ratio = median(one / other for one, other in zip(plain, coded, strict=True))
    least = min(plain) / min(coded)
    print(
        f"{what:>36}: {median(plain) * factor:9.0f} {median(coded) * factor:7.0f}"
        f"   {ratio:.2f} (of the least: {least:.2f})",
        flush=True,
    )


def quality(path: str) -> None:
    told, greedy = {}, {}
    prompts: list[list[int]] = []
    for cache in (None, "int8"):
        limits = Limits(cache_bytes=1 << 28, prefix_cache=False)
        lm = qiusuo.load(path, draft="none", limits=limits, cache=cache)
        if not prompts:
            first, words = lm.config.bos_token_id or 0, lm.config.vocab_size
            draws = torch.randint(2, words, (40, 8), generator=torch.Generator().manual_seed(1))
            prompts = [[first, *row] for row in draws.tolist()]
            texts = lm.generate(prompts, max_tokens=120, temperature=1.0, seed=1, ignore_eos=True)
            read = [[*p, *text.token_ids] for p, text in zip(prompts, texts, strict=True)]
        greedy[cache] = [one.token_ids for one in lm.generate(prompts, max_tokens=64)]
        asking = Sampling(max_tokens=1, prompt_logprobs=0)
        sequences = [lm.engine.submit(Request(tuple(text), asking))[0] for text in read]
        while not lm.engine.idle:
            lm.engine.step()
        drawn = chain.from_iterable(one.prompt_drawn for one in sequences)
        told[cache] = torch.tensor([one.logprob for one in drawn])
    off = told["int8"] - told[None]
    same = sum(one == other for one, other in zip(greedy[None], greedy["int8"], strict=True))
    plain, coded = ((-told[cache]).mean().exp() for cache in (None, "int8"))
    print(
        f"{len(off):,} tokens: perplexity {plain:.4f} and {coded:.4f} in int8; log-probabilities "
        f"{off.abs().mean():.4f} apart on average; {same} of {len(prompts)} greedy answers the same"
    )


if __name__ == "__main__":
    main()
