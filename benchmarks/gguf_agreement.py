"""Whether llama.cpp says the same as we do with a model trained here.

    .venv/bin/python benchmarks/gguf_agreement.py runs/quickstart

The model is written as GGUF in float32 and served by llama.cpp (the wheel xllamacpp, with a float32
cache). Fifty prompts from built-in texts are answered greedily by both; then, along answers that
llama.cpp draws, both are asked for the probabilities of every next token. With an MTP module, once
more with llama.cpp drafting with it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' llama.cpp server

from tests.conformance.llama_cpp import compare, serve

import qiusuo
from qiusuo.data.corpora import open_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    lm = qiusuo.load(options.model, dtype="float32")
    assert lm.tokenizer is not None
    names = ("tang-poems", "three-kingdoms", "pride-and-prejudice")
    texts = [text for name in names for text in list(open_corpus(name).documents())[:20]]
    prompts = [
        [*lm.tokenizer.text_start, *lm.tokenizer.encode(text[:24])]
        for text in texts[: options.prompts]
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = lm.save(Path(folder) / "model.gguf", dtype="float32")
        with serve(file) as server:
            agreement = compare(server, lm.model, lm.tokenizer, prompts, options.tokens)
        print(
            f"greedy answers equal: {agreement.same_answers} of {agreement.prompts}; likeliest "
            f"token equal at {agreement.same_first} of {agreement.positions} positions; 99% of "
            f"log probabilities within {agreement.difference:.1e}"
        )
        if lm.config.num_nextn_predict_layers:
            with serve(file, mtp=True) as server:
                drafted = accepted = 0
                for prompt in prompts:
                    timings = server.complete(prompt, options.tokens, temperature=0)["timings"]
                    drafted += timings["draft_n"]
                    accepted += timings["draft_n_accepted"]
            print(f"llama.cpp drafting with our MTP module: {accepted} of {drafted} accepted")


if __name__ == "__main__":
    main()
