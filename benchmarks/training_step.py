"""A training step beside transformers': tokens a second, and where our time goes.

    .venv/bin/pip install 'qiusuo[peers]'
    .venv/bin/python benchmarks/training_step.py [--rounds 3] [--threads 2] [--shapes deepseek]

A DeepSeek-V3 shape of 20.7M parameters (7.8M active) and a Llama shape of the same width and depth,
16 sequences of 256 random tokens a step: forward, backward, clipping and fused AdamW. Every setting
runs in a process of its own, they take turns, and the ratio is that of a round's own figures; the
median of the rounds counts. transformers runs in the settings that people use: float32, bfloat16 by
autocast, bfloat16 weights, and the last with torch.compile; ours in bfloat16 with float32 weights,
as `qiusuo bench train` has it. The best of theirs is what ours is held against.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

THEIRS = ("float32", "autocast", "bfloat16", "compiled")
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SHAPES = {"deepseek": DEEPSEEK, "llama": LLAMA}
RECIPE = """
name = "training-step"
[tokenizer]
kind = "bpe"
[model]
{model}
[[stages]]
kind = "pretrain"
steps = 100
sequence_length = {length}
batch_size = {batch}
[stages.data]
corpora = [{{ source = "tang-poems" }}]
[stages.optimizer]
kind = "adamw"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--settings", nargs="*", choices=THEIRS, default=list(THEIRS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--their-side", choices=THEIRS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.their_side:
        print(json.dumps({"seconds": transformers_step(options)}))
        return
    found = {shape: compare(shape, options) for shape in options.shapes}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """The rounds of one shape; prints its table and our step's parts."""
    rounds: list[dict[str, float]] = []
    tokens = options.batch * options.length
    profile: dict[str, Any] = {}
    table = ""
    for number in range(options.rounds):
        profile, table = our_step(shape, options)
        rates = {"qiusuo": tokens / profile["seconds"]}
        for setting in options.settings:
            rates[setting] = tokens / their_step(shape, setting, options)
        rounds.append(rates)
        shown = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        print(f"{shape}, round {number + 1}: tokens/s: {shown}", file=sys.stderr, flush=True)
    print(f"\n| {shape} | tokens/s | ours in times of it |\n| --- | --- | --- |")
    for name in ("qiusuo", *options.settings):
        rate = statistics.median(one[name] for one in rounds)
        times = statistics.median(one["qiusuo"] / one[name] for one in rounds)
        print(f"| {name} | {rate:,.0f} | {times:.2f} |")
    if options.settings:
        best = [one["qiusuo"] / max(one[s] for s in options.settings) for one in rounds]
        print(f"\nagainst the best of theirs: {statistics.median(best):.2f} times (3 wanted)")
    print(f"\n```\n{table.rstrip()}\n```", flush=True)
    return {"rounds": rounds, "profile": profile}


def our_step(shape: str, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `qiusuo bench train` finds, as figures and as it shows them."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, out = Path(folder, "recipe.toml"), Path(folder, "out.json")
        model = "\n".join(f"{key} = {json.dumps(value)}" for key, value in SHAPES[shape].items())
        recipe.write_text(RECIPE.format(model=model, batch=options.batch, length=options.length))
        words = ["-m", "qiusuo", "bench", "train", recipe, "--steps", options.steps, "--out", out]
        table = child(words, options.threads)
        return json.loads(out.read_text()), table


def their_step(shape: str, setting: str, options: argparse.Namespace) -> float:
    words = [__file__, "--their-side", setting, "--shapes", shape, "--steps", options.steps]
    words += ["--batch", options.batch, "--length", options.length]
    return float(json.loads(child(words, options.threads).splitlines()[-1])["seconds"])


def child(words: list[Any], threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "120"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def transformers_step(options: argparse.Namespace) -> float:
    """Median seconds of a step of transformers."""
    import time

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    [shape], setting = options.shapes, options.their_side
    values = dict(SHAPES[shape])
    if shape == "deepseek":  # theirs must be told that MLA expands to as many key heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if shape == "deepseek":
        model.set_experts_implementation("grouped_mm")
    if setting in ("bfloat16", "compiled"):
        model = model.bfloat16()
    run = torch.compile(model) if setting == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens_BT = torch.randint(config.vocab_size, (options.batch, options.length))
    seconds = []
    for _ in range(3 + options.steps):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, setting == "autocast"):
            loss = run(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
