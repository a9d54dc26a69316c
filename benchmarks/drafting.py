"""What drafts are worth: tokens a pass and seconds, on real text, with a model trained here.

    .venv/bin/python benchmarks/drafting.py runs/quickstart [--tokens 128] [--prompts 8]

The model goes on from beginnings of built-in texts, one at a time and all at once, without drafts,
with its own MTP module, and with the words that followed earlier in the text. Answers must be equal
in float32, or the run fails. Greedy, the best of three rounds; an honest figure may be below one.
"""

from __future__ import annotations

import argparse
import time

import qiusuo
from qiusuo.data.corpora import open_corpus
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits

KINDS = ("none", "mtp", "ngram")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    corpora = ("tang-poems", "three-kingdoms", "pride-and-prejudice")
    texts = [text for name in corpora for text in list(open_corpus(name).documents())[:5]]
    prompts = [text[:60] for text in texts[:: max(1, len(texts) // options.prompts)]]
    loaded = qiusuo.load(options.model, dtype=options.dtype)
    for together in (False, True):
        seconds, answers = {}, {}
        for kind in KINDS:
            if kind == "mtp" and not loaded.config.num_nextn_predict_layers:
                continue
            limits = Limits(cache_bytes=1 << 28, prefix_cache=False)
            lm = LanguageModel(loaded.model, loaded.tokenizer, limits, draft=kind)
            rounds = [run(lm, prompts, options.tokens, together) for _ in range(options.rounds)]
            seconds[kind] = min(one[0] for one in rounds)
            answers[kind] = rounds[0][1]
            told = lm.engine.statistics
            print(
                f"{'together' if together else 'alone':8}  {kind:6} {seconds[kind]:6.2f} s, "
                f"{told.drawn / told.passes:.2f} tokens a pass, of {told.drafted} drafts "
                f"{told.accepted / max(1, told.drafted):.0%} accepted, "
                f"{seconds['none'] / seconds[kind]:.2f} times the speed without"
            )
        if options.dtype == "float32" and any(a != answers["none"] for a in answers.values()):
            raise SystemExit("answers differ with drafts: that must not be")


def run(
    lm: LanguageModel, prompts: list[str], tokens: int, together: bool
) -> tuple[float, list[list[int]]]:
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    began = time.perf_counter()
    answers = [
        answer.token_ids
        for batch in batches
        for answer in lm.generate(batch, max_tokens=tokens, ignore_eos=True)
    ]
    return time.perf_counter() - began, answers


if __name__ == "__main__":
    main()
