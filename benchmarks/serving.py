"""How fast a model answers: Qiusuo's engine and transformers, on the same checkpoint, in one run.

    .venv/bin/python benchmarks/serving.py               # the 3.12B shape, 6.3 GB on disk, in /tmp
    .venv/bin/python benchmarks/serving.py --model DIR --peers qiusuo

A DeepSeek-V3 shape of 3.12B random parameters in bfloat16 (547M active) is made once. Each peer has
a process of its own, with the same threads, loads the model and is warmed up; then, in turn over
the rounds:

    prefill    a prompt of 256 tokens to its first answer token
    decode     64 more tokens of one sequence, after 64 tokens of prompt
    long       16 more tokens after 2,048 tokens of prompt
    sixteen    16 requests, 32 to 256 tokens of prompt, 16 to 64 of answer: Qiusuo all at once,
               transformers one after another, and as one padded batch until the longest is done

The figures are the best of the rounds (least seconds), the claims ratios of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=16,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    max_position_embeddings=8192,
)
PREFILL, DECODE, LONG, LONG_DECODE = 256, 64, 2048, 16
# (prompt tokens, answer tokens) of the mixed requests
MIXED = [(32 + 224 * i // 15, 16 + 48 * (i * 7 % 16) // 15) for i in range(16)]
CLAIMS = {"decode": 1.8, "prefill": 1.5, "sixteen, one by one": 5.0, "sixteen, padded": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--model", type=Path, help="a folder; without it the 3.12B shape is made")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve_child(options.child, options.model, options.threads)
        return
    folder = options.model or Path(tempfile.gettempdir()) / "qiusuo-serving-3.12B"
    if not (folder / "config.json").is_file():
        make_model(folder)
    # One peer in memory at a time: two of them would not fit everywhere.
    figures = {peer: run_peer(peer, folder, options) for peer in options.peers}
    report(figures)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def make_model(folder: Path) -> None:
    from qiusuo.checkpoint.huggingface import save_huggingface
    from qiusuo.model.deepseek_config import DeepseekConfig
    from qiusuo.model.transformer import Transformer

    print(f"making the model in {folder} ...", flush=True)
    with torch.device("meta"):
        model = Transformer(DeepseekConfig(**SHAPE))
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    model.initialize(torch.Generator().manual_seed(0))
    save_huggingface(model, folder)


# -- peers --------------------------------------------------------------------------------


class Qiusuo:
    def __init__(self, folder: Path) -> None:
        import qiusuo

        self.lm = qiusuo.load(folder, dtype="bfloat16", draft="none")

    def answer(self, prompt: list[int], tokens: int) -> None:
        self.lm.generate([prompt], max_tokens=tokens, ignore_eos=True)

    def mixed(self, requests: list[tuple[list[int], int]]) -> dict[str, float]:
        from qiusuo.engine.request import Request
        from qiusuo.engine.sampling import Sampling

        engine = self.lm.engine

        def all_at_once() -> None:
            for prompt, tokens in requests:
                engine.submit(Request(tuple(prompt), Sampling(max_tokens=tokens)))
            while not engine.idle:
                engine.step()

        return {"sixteen": timed(all_at_once)}


class Transformers:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )

    def answer(self, prompt: list[int], tokens: int) -> None:
        self._generate(torch.tensor([prompt]), None, tokens)

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor | None, tokens: int) -> None:
        mask = torch.ones_like(ids) if mask is None else mask
        self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    def mixed(self, requests: list[tuple[list[int], int]]) -> dict[str, float]:
        def one_by_one() -> None:
            for prompt, tokens in requests:
                self.answer(prompt, tokens)

        def padded() -> None:
            longest = max(len(prompt) for prompt, _ in requests)
            rows = [[0] * (longest - len(p)) + p for p, _ in requests]
            mask = [[0] * (longest - len(p)) + [1] * len(p) for p, _ in requests]
            most = max(tokens for _, tokens in requests)
            self._generate(torch.tensor(rows), torch.tensor(mask), most)

        return {"sixteen, one by one": timed(one_by_one), "sixteen, padded": timed(padded)}


PEERS: dict[str, Callable[[Path], Any]] = {"qiusuo": Qiusuo, "transformers": Transformers}


def serve_child(peer: str, folder: Path, threads: int) -> None:
    """Load, warm up, and measure one round for every line on stdin."""
    torch.set_num_threads(threads)
    model = PEERS[peer](folder)
    model.answer(prompt_of(8, 0), 4)
    for line in sys.stdin:
        seed = 100 * int(line)
        requests = [(prompt_of(p, seed + 10 + i), t) for i, (p, t) in enumerate(MIXED)]

        def answered(
            prompt: int, tokens: int, number: int, seed: int = seed
        ) -> float:  # another prompt each time: no peer may know its beginning
            return timed(partial(model.answer, prompt_of(prompt, seed + number), tokens))

        first, more = answered(64, 1, 1), answered(64, 1 + DECODE, 2)
        long_first, long_more = answered(LONG, 1, 4), answered(LONG, 1 + LONG_DECODE, 5)
        seconds = {
            "prefill": answered(PREFILL, 1, 3),
            "decode": more - first,
            "long prefill": long_first,
            "long": long_more - long_first,
            **model.mixed(requests),
        }
        print(json.dumps(seconds), flush=True)


def prompt_of(tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 32000, (tokens,), generator=generator).tolist()


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# -- the run ------------------------------------------------------------------------------


def run_peer(peer: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", peer, "--model", str(folder)]
    command += ["--threads", str(options.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        rounds = []
        for number in range(options.rounds):
            child.stdin.write(f"{number}\n")
            child.stdin.flush()
            rounds.append(json.loads(child.stdout.readline()))
            print(f"{peer} round {number}: {rounds[-1]}", flush=True)
        child.stdin.close()
    return {name: min(one[name] for one in rounds) for name in rounds[0]}


def report(figures: dict[str, dict[str, float]]) -> None:
    answered = sum(tokens for _, tokens in MIXED)
    work = {"prefill": PREFILL, "decode": DECODE, "long prefill": LONG, "long": LONG_DECODE}
    for peer, seconds in figures.items():
        for name, value in seconds.items():
            rate = work.get(name, answered) / value
            print(f"{peer:14} {name:22} {value:8.2f} s  {rate:8.1f} tokens/s")
    if {"qiusuo", "transformers"} <= figures.keys():
        ours, theirs = figures["qiusuo"], figures["transformers"]
        for name, value in theirs.items():
            ratio = value / ours["sixteen" if name.startswith("sixteen") else name]
            claim = f" (claim: {CLAIMS[name]})" if name in CLAIMS else ""
            print(f"{name:22} {ratio:6.2f} times as fast as transformers{claim}")


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring."""


if __name__ == "__main__":
    main()
