"""What fewer bits cost in quality: models trained here, in our formats and in llama.cpp's.

    .venv/bin/pip install 'qiusuo[peers]'      # xllamacpp has llama.cpp's quantisers in it
    .venv/bin/python benchmarks/quantization_quality.py published/poet published/r1-zero-parity
    .venv/bin/python benchmarks/quantization_quality.py runs/quickstart --as-it-runs

The bfloat16 weights of a run are stored in a format and read back (weight_formats.py), and the
model computes in float32, so that nothing else differs. "calibrated": int4 after the model has
read training problems and text (checkpoint/calibration.py). Scored are the solutions of the run's
held-out problems (the answers' tokens) and the validation text of its corpora. `--as-it-runs` adds
the quantised models themselves, which also round what they multiply with.

Perplexity alone says little of small models: where one is too sure, or not sure enough, rounding
may improve it by chance. The divergence from the bfloat16 model (Kullback-Leibler, of the next
token, over solutions and the beginnings of documents) only grows with what is lost.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

import qiusuo
from qiusuo.checkpoint.calibration import calibrate, token_rows
from qiusuo.checkpoint.load import load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.stored import Checkpoint
from qiusuo.data.corpora import open_corpus
from qiusuo.data.split import split_corpus
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.evaluation.asking import Asker
from qiusuo.evaluation.bits import bits_per_character
from qiusuo.training.given_tasks import problem_at, task_of
from qiusuo.training.recipe import Recipe, read_recipe
from qiusuo.training.stages import PretrainStage
from weight_formats import FINER, MIXED, Coded

BASE = "bfloat16"
MOST_MORE = {
    "int8": 0.005,
    "int4": 0.04,
    "int4, calibrated": 0.04,
}  # perplexity over that of bfloat16
PEERS = {"int8": ("Q8_0",), "int4": ("Q4_0", MIXED), "int4, calibrated": ("Q4_0", MIXED)}
EQUAL_BITS = 0.05  # a peer with more bits a weight than so is shown, and no measure
# Two roundings equally good differ by so much either way: in perplexity, in divergence.
ALIKE = {"perplexity": 0.0005, "divergence": 0.05}
BEGINNING, BEGINNINGS = 256, 64  # tokens, documents
CALIBRATION_PROBLEMS, CALIBRATION_TOKENS = 100, 16384  # of each task, of text
Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, with recipe and model")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems of each task")
    parser.add_argument("--characters", type=int, default=100_000, help="of validation text")
    parser.add_argument("--as-it-runs", action="store_true", help="the quantised models too")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    found = {}
    for run in options.runs:
        found[str(run)] = measured(run, options)
        show(run, found[str(run)])
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(run: Path, options: argparse.Namespace) -> dict[str, Row]:
    checkpoint, recipe = open_checkpoint(run / "model"), read_recipe(run / "recipe.toml")
    base = model_of(checkpoint)
    texts = texts_of(recipe, base.needed_tokenizer(), options)
    rows = {BASE: {"bits per weight": 16.0} | score(base, texts, base)}
    for kind in FINER:
        coded = Coded(kind)
        lm = model_of(coded.checkpoint(checkpoint))
        rows[kind] = coded.facts() | score(lm, texts, base)
    coded = Coded("int4", calibrate(base.model, calibration_rows(recipe, base.needed_tokenizer())))
    lm = model_of(coded.checkpoint(checkpoint))
    rows["int4, calibrated"] = coded.facts() | score(lm, texts, base)
    if options.as_it_runs:
        rows[f"{BASE}, as it runs"] = score(qiusuo.load(run / "model", draft="none"), texts, base)
        for kind in ("int8", "int4"):
            lm = qiusuo.load(run / "model", draft="none", quantize=kind)
            rows[f"{kind}, as it runs"] = score(lm, texts, base)
    return rows


def model_of(checkpoint: Checkpoint) -> LanguageModel:
    model = load_model(checkpoint, dtype=torch.float32)
    return LanguageModel(model, checkpoint.read_tokenizer(), draft="none")


# -- texts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """``answers``: tokens, and how many of the last are the answer."""

    answers: list[tuple[list[int], int]]
    documents: list[str]


def texts_of(recipe: Recipe, tokenizer: Tokenizer, options: argparse.Namespace) -> Texts:
    """What the run was held to: its known answers, or else the solutions of its problems; and
    validation text, as much of each corpus. SystemExit for a run with neither."""
    asker = Asker(tokenizer, recipe.ask.text, recipe.ask.thinking, recipe.ask.system)
    answers = []
    for entry in recipe.evaluation.answers or recipe.evaluation.tasks:
        for index in range(options.problems):
            problem, chance = problem_at(entry, "test", 0, index), random.Random(index)
            solution = task_of(entry).solution(problem, chance, thought=recipe.ask.thinking)
            answer = asker.answer_ids(solution)
            answers.append((asker.prompt_ids(problem) + answer, len(answer)))
    learnt = [stage.data for stage in recipe.stages if isinstance(stage, PretrainStage)]
    documents = []
    for data in learnt[:1]:
        for corpus in data.corpora:
            fraction, left = data.validation_fraction, options.characters // len(data.corpora)
            split = split_corpus(
                open_corpus(corpus.source), validation_fraction=fraction, seed=recipe.seed
            )
            for text in split.validation():
                documents.append(text[:left])
                left -= len(text)
                if left <= 0:
                    break
    if not answers and not documents:
        raise SystemExit(f"{recipe.name}: its recipe has neither tasks to answer nor corpora")
    return Texts(answers, documents)


def calibration_rows(recipe: Recipe, tokenizer: Tokenizer) -> list[list[int]]:
    """Training problems with their solutions, and training text."""
    asker = Asker(tokenizer, recipe.ask.text, recipe.ask.thinking, recipe.ask.system)
    rows = []
    for entry in recipe.evaluation.answers or recipe.evaluation.tasks:
        for index in range(CALIBRATION_PROBLEMS):
            problem, chance = problem_at(entry, "train", 0, index), random.Random(index)
            solution = task_of(entry).solution(problem, chance, thought=recipe.ask.thinking)
            rows.append(asker.prompt_ids(problem) + asker.answer_ids(solution))
    corpora = [
        split_corpus(
            open_corpus(corpus.source),
            validation_fraction=stage.data.validation_fraction,
            seed=recipe.seed,
        ).train()
        for stage in [stage for stage in recipe.stages if isinstance(stage, PretrainStage)][:1]
        for corpus in stage.data.corpora
    ]
    return rows + token_rows(tokenizer, corpora, CALIBRATION_TOKENS, context=512)


def score(lm: LanguageModel, texts: Texts, base: LanguageModel) -> Row:
    nats = tokens = 0.0
    for text, count in texts.answers:
        logits = lm.logits(text[:-1])[-count:]
        nats += F.cross_entropy(logits, torch.tensor(text[-count:]), reduction="sum").item()
        tokens += count
    if texts.documents:
        bits = bits_per_character(lm, texts.documents)
        nats += bits.per_token * bits.tokens * math.log(2)
        tokens += bits.tokens
    return {"perplexity": math.exp(nats / tokens), "divergence": divergence(lm, texts, base)}


def divergence(lm: LanguageModel, texts: Texts, base: LanguageModel) -> float:
    """Of the next token from what ``base`` says, nats on average."""
    tokenizer = base.needed_tokenizer()
    begun = [
        [*tokenizer.text_start, *tokenizer.encode(text)][:BEGINNING]
        for text in islice(texts.documents, BEGINNINGS)
    ]
    whole, places = 0.0, 0
    for text, count in [*texts.answers, *((one, len(one) - 1) for one in begun)]:
        ours, theirs = (one.logits(text[:-1])[-count:].log_softmax(-1) for one in (lm, base))
        whole += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        places += count
    return whole / places


# -- what came out ------------------------------------------------------------------------


def show(run: Path, rows: dict[str, Row]) -> None:
    print(f"\n| {run.name} | bits per weight | perplexity | more | divergence, nats | wanted |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        bits = f"{row['bits per weight']:.2f}" if "bits per weight" in row else "–"
        if row.get("other types", 0.0) > 0.005:
            bits += f", {row['other types']:.0%} in other types"
        more = f"{row['perplexity'] / rows[BASE]['perplexity'] - 1:+.3%}"
        figures = f"{row['perplexity']:.4f}", more, f"{row['divergence']:.2e}"
        print(f"| {' | '.join((name, bits, *figures, wanted(name, rows)))} |", flush=True)


def wanted(name: str, rows: dict[str, Row]) -> str:
    """What the format was to reach, and whether it did."""
    if name not in MOST_MORE:
        return "–"
    row, most = rows[name], MOST_MORE[name]
    reached = [(f"{most:+.1%}", row["perplexity"] <= (1 + most) * rows[BASE]["perplexity"])]
    for peer in PEERS[name]:
        if rows[peer]["bits per weight"] <= row["bits per weight"] + EQUAL_BITS:
            for key, alike in ALIKE.items():
                reached.append((f"{peer}'s {key}", row[key] <= (1 + alike) * rows[peer][key]))
    return ", ".join(text if held else f"{text} NOT REACHED" for text, held in reached)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring."""


if __name__ == "__main__":
    main()
