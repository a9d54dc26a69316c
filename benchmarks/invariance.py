"""How often a bfloat16 answer changes with what runs beside it, and what it costs that it does not.

    .venv/bin/python benchmarks/invariance.py MODEL [--requests 16] [--tokens 64]

Each request is answered alone, and then all of them together, with and without the engine's
batch-invariant mode. Counted are the answers, and the tokens up to the first that differs; timed
are the runs together. The prompts are the beginnings of built-in texts.
"""

from __future__ import annotations

import argparse
import time

import qiusuo
from qiusuo.data.corpora import open_corpus
from qiusuo.engine.limits import Limits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    chapters = list(open_corpus("pride-and-prejudice").documents())
    prompts = [chapters[i % len(chapters)][200 : 260 + 40 * i] for i in range(options.requests)]
    for invariant in (False, True):
        limits = Limits(cache_bytes=1 << 30, batch_invariant=invariant, prefix_cache=False)
        lm = qiusuo.load(options.model, dtype="bfloat16", limits=limits, draft="none")
        asked = dict(max_tokens=options.tokens, ignore_eos=True)
        alone = [lm.generate([prompt], **asked)[0].token_ids for prompt in prompts]
        began = time.perf_counter()
        together = [answer.token_ids for answer in lm.generate(prompts, **asked)]
        seconds = time.perf_counter() - began
        pairs = list(zip(alone, together, strict=True))
        changed = sum(one != other for one, other in pairs)
        parted = sum(map(first_difference, alone, together))
        total = options.requests * options.tokens
        print(
            f"batch_invariant={invariant!s:5}  {changed} of {len(pairs)} answers differ; the first "
            f"{parted / total:.1%} of all tokens are equal; together {seconds:.1f} s, "
            f"{total / seconds:.1f} tokens/s"
        )


def first_difference(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


if __name__ == "__main__":
    main()
