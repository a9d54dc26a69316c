"""What FP8 costs in loss: one recipe, one seed, one order of data, trained in several precisions.

    .venv/bin/python benchmarks/fp8_training.py --seeds 1 2 --plot fp8.svg

The recipe is the quickstart's pretraining with widths that are multiples of 128, as FP8's blocks
want them. As in the paper (DeepSeek-V3, arXiv:2412.19437, appendix B.1: "below 0.25%") the losses
are smoothed by an exponential moving average with a coefficient of 0.9, and the error is relative
to bfloat16. Float32 beside it says how far a run drifts for being rounded otherwise at all, and
another seed how far apart two runs are that differ in everything but the recipe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qiusuo.runs.log import read_log
from qiusuo.runs.style import BLUE, GREY, ORANGE, TEAL, finish, new_figure
from qiusuo.training.recipe import parse_recipe
from qiusuo.training.train import start_run, train

COEFFICIENT = 0.9
COLOURS = {"float32": GREY, "bfloat16": BLUE, "fp8": ORANGE, "fp8_ue8m0": TEAL}
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 1024,
}
Losses = dict[str, dict[int, np.ndarray]]  # by precision, by seed, of every step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--precisions", nargs="+", choices=COLOURS, default=list(COLOURS))
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--out", type=Path, help="write the losses as JSON")
    parser.add_argument("--plot", type=Path, help="draw them")
    options = parser.parse_args()
    losses: Losses = {precision: {} for precision in options.precisions}
    for seed in options.seeds:
        for precision in options.precisions:
            start = time.perf_counter()
            losses[precision][seed] = live(precision, seed, options.steps, options.optimizer)
            last = smoothed(losses[precision][seed])[-1]
            seconds = time.perf_counter() - start
            print(f"seed {seed} {precision:10} {last:.4f} nats, {seconds:.0f} s", flush=True)
            if options.out:  # at once: each of them takes minutes
                plain = {p: {s: one.tolist() for s, one in by.items()} for p, by in losses.items()}
                options.out.write_text(json.dumps(plain) + "\n", encoding="utf-8")
    show(losses)
    if options.plot and "bfloat16" in losses:
        draw(losses, options.plot)


def live(precision: str, seed: int, steps: int, optimizer: str) -> np.ndarray:
    """The losses of a run of its own."""
    table: dict[str, Any] = {
        "name": "fp8",
        "seed": seed,
        "tokenizer": {"kind": "bpe", "vocab_size": 4096},
        "model": MODEL,
        "stages": [
            {
                "kind": "pretrain",
                "steps": steps,
                "sequence_length": 128,
                "batch_size": 8,
                "precision": precision,
                "checkpoint_steps": steps,
                "data": {
                    "corpora": [
                        {"source": "tang-poems", "weight": 3},
                        {"source": "three-kingdoms"},
                        {"source": "pride-and-prejudice"},
                    ],
                    "isolate_documents": True,
                },
                "optimizer": {"kind": optimizer, "adamw_learning_rate": 0.002},
            }
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe, path = parse_recipe(table), Path(folder, "run")
        with start_run(recipe, path) as run:
            if not train(recipe, run):
                raise SystemExit("stopped")
        return np.array([r["loss"] for r in read_log(path / "log.jsonl") if r["kind"] == "step"])


def smoothed(losses: np.ndarray) -> np.ndarray:
    means = np.empty_like(losses)
    mean = losses[0]
    for step, loss in enumerate(losses):
        mean = means[step] = COEFFICIENT * mean + (1 - COEFFICIENT) * loss
    return means


def errors(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of the smoothed losses, in percent of the reference."""
    of = smoothed(reference)
    return 100 * (smoothed(losses) - of) / of


def show(losses: Losses) -> None:
    """Of the second half of the steps: where losses have come to, and how far from bfloat16's."""
    reference = losses.get("bfloat16", {})
    print("\nprecision   seed  last loss   error, %: last    mean  mean |.|  most |.|")
    for precision, by_seed in losses.items():
        for seed, one in by_seed.items():
            line = f"{precision:10} {seed:5} {smoothed(one)[-1]:10.4f}"
            if seed in reference and precision != "bfloat16":
                half = errors(one, reference[seed])[len(one) // 2 :]
                size = np.abs(half)
                line += f"{half[-1]:17.3f}{half.mean():9.3f}{size.mean():9.3f}{size.max():10.3f}"
            print(line)
    if len(reference) > 1:
        last = [smoothed(one)[-1] for one in reference.values()]
        spread = 100 * statistics.stdev(last) / statistics.mean(last)
        print(f"seeds in bfloat16: standard deviation {spread:.2f}% of the last loss")


def draw(losses: Losses, path: Path) -> None:
    figure = new_figure(9.4, 3.6)
    left, right = figure.subplots(1, 2)
    for precision, by_seed in losses.items():
        for number, (seed, one) in enumerate(by_seed.items()):
            label = precision if number == 0 else None
            how = {"color": COLOURS[precision], "label": label, "linewidth": 0.9}
            left.plot(smoothed(one), **how)
            if precision != "bfloat16":
                right.plot(errors(one, losses["bfloat16"][seed]), **how)
    for edge in (-0.25, 0.25):
        right.axhline(edge, color=GREY, linewidth=0.6, linestyle=(0, (2, 2)))
    left.set(xlabel="step", ylabel="loss, smoothed, nats per token")
    right.set(xlabel="step", ylabel="error against bfloat16, %", ylim=(-1, 1))
    left.legend(frameon=False)
    right.legend(frameon=False)
    path.write_bytes(finish(figure, "fp8", "Loss in FP8", "").data)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keep the docstring's lines."""


if __name__ == "__main__":
    main()
