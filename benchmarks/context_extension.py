"""What a model knows far beyond the texts it has learnt: with YaRN, without, and not at all.

    .venv/bin/python benchmarks/context_extension.py

A character model learns tinyshakespeare in windows of 64 and then, for a few steps, in windows of
256. The loss is told by position, over windows of 256 of the held-out end of the text, for the
model that never saw more than 64 ("short"), the one that went on with its RoPE as it was ("plain")
and the one whose stage extended it (`extend = { factor = 4 }`, "yarn").
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import qiusuo
from qiusuo.data.corpora import open_corpus
from qiusuo.training.recipe import Recipe, parse_recipe
from qiusuo.training.train import start_run, train

SHORT, LONG, BUCKET, WINDOWS = 64, 256, 32, 96
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--steps", type=int, default=300, help="on short windows")
    parser.add_argument("--long-steps", type=int, default=40)
    options = parser.parse_args()
    told = {}
    for how in ("short", "plain", "yarn"):
        with tempfile.TemporaryDirectory() as folder:
            recipe, path = recipe_of(how, options.steps, options.long_steps), Path(folder, "run")
            with start_run(recipe, path) as run:
                if not train(recipe, run):
                    raise SystemExit("stopped")
            told[how] = by_position(path)
    print("\npositions " + "".join(f"{start:>8}-" for start in range(0, LONG, BUCKET)))
    for how, losses in told.items():
        print(f"{how:10}" + "".join(f"{loss:9.3f}" for loss in losses))


def recipe_of(how: str, steps: int, long_steps: int) -> Recipe:
    short: dict[str, Any] = {
        "kind": "pretrain",
        "name": "short",
        "steps": steps,
        "sequence_length": SHORT,
        "batch_size": 32,
        "checkpoint_steps": steps,
        "data": {"corpora": [{"source": "tinyshakespeare"}]},
        "optimizer": {"learning_rate": 0.02, "adamw_learning_rate": 0.004},
    }
    long = short | {
        "name": "long",
        "steps": long_steps,
        "sequence_length": LONG,
        "batch_size": 8,
        "optimizer": {"learning_rate": 0.005, "adamw_learning_rate": 0.001},
        "schedule": {"warmup_steps": 3},
        **({"extend": {"factor": LONG / SHORT}} if how == "yarn" else {}),
    }
    table = {
        "name": "context",
        "tokenizer": {"kind": "characters"},
        "model": MODEL | {"max_position_embeddings": SHORT if how == "yarn" else LONG},
        "stages": [short] if how == "short" else [short, long],
    }
    return parse_recipe(table)


@torch.no_grad()
def by_position(run: Path) -> list[float]:
    """Nats per character, a mean over each bucket of positions."""
    lm = qiusuo.load(run, dtype="float32")
    assert lm.tokenizer is not None
    text = next(open_corpus("tinyshakespeare").documents())
    ids = torch.tensor(lm.tokenizer.encode(text[int(len(text) * 0.96) :]))
    windows = min(WINDOWS, (len(ids) - 1) // LONG)
    inputs_BT, labels_BT = (ids[k : k + windows * LONG].view(windows, LONG) for k in (0, 1))
    losses_BT = torch.stack(
        [
            F.cross_entropy(lm.model.logits(lm.model(one[None]).x_BTD)[0], label, reduction="none")
            for one, label in zip(inputs_BT, labels_BT, strict=True)
        ]
    )
    return losses_BT.mean(0).view(-1, BUCKET).mean(1).tolist()


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keep the docstring's lines."""


if __name__ == "__main__":
    main()
