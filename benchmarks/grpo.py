"""GRPO steps, rollout and update: Qiusuo's stage `rl` against TRL's GRPOTrainer, side by side.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 torch==2.13.0 -e .
    .venv/bin/python benchmarks/grpo.py --trl-python /tmp/trl/bin/python [--rounds 3]

Both load the same dense Llama-shaped model (1.1M parameters), first fine-tuned here on addition
chains with thoughts in four of ten answers, so that answers have the lengths of a real policy's.
Both take the same problems, 32 a step with 8 answers each at temperature 1, one AdamW
update per batch of rollouts, no KL, two threads, float32, and no group is left out or refilled. The
sides alternate, each in a process of its own; the first steps are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPTS, GROUP, WARMUP, DIFFICULTY = 32, 8, 2, 5
SHAPE = """
model_type = "llama"
hidden_size = 128
intermediate_size = 512
num_hidden_layers = 4
num_attention_heads = 4
max_position_embeddings = 256
rope_theta = 1000.0
"""
FIRST = """
name = "grpo-benchmark-model"
save_dtype = "float32"
[tokenizer]
kind = "characters"
[model]{shape}
[[stages]]
kind = "sft"
steps = {steps}
sequence_length = 96
batch_size = 24
sources = [{{ task = {{ task = "chains", difficulties = [2, 3, 4, 5] }}, thought_share = 0.4 }}]
"""
OURS = """
name = "grpo-benchmark"
base = "{model}"
license = "mit"
[[stages]]
kind = "rl"
steps = {steps}
prompts = {prompts}
group = {group}
max_tokens = {tokens}
same_groups = "keep"
overlong = "reward"
precision = "float32"
micro_batch_size = {micro_batch}
lag = {lag}
tasks = [{{ task = "chains", difficulties = [{difficulty}] }}]
[stages.optimizer]
kind = "adamw"
adamw_learning_rate = 1e-4
weight_decay = 0.0
"""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        model = options.model or trained_model(Path(place, "first"), options.first_steps)
        ours: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        for number in range(options.rounds):
            if options.trl_python:
                theirs.append(run_trl(options, model))
                tell("TRL", theirs[-1])
            ours.append(run_ours(options, model, Path(place, f"ours-{number}")))
            tell("Qiusuo", ours[-1])
    if theirs:
        mine, other = (
            statistics.median(run["seconds_per_step"] for run in runs) for runs in (ours, theirs)
        )
        print(f"a step: {other:.2f} s against {mine:.2f} s, {other / mine:.2f} times")
    if options.out:
        options.out.write_text(json.dumps({"ours": ours, "trl": theirs}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", help="a Python with trl; without it: ours only")
    parser.add_argument("--model", type=Path, help="a folder; without it one is trained first")
    parser.add_argument("--first-steps", type=int, default=500, help="of that training")
    parser.add_argument("--tokens", type=int, default=64, help="an answer may have")
    parser.add_argument("--steps", type=int, default=6, help="timed, a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lag", type=int, default=0, help="of ours: 1 samples a step ahead")
    parser.add_argument("--micro-batch", type=int, default=64, help="of ours")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser.parse_args()


def trained_model(run: Path, steps: int) -> Path:
    live(run, FIRST.format(shape=SHAPE, steps=steps), threads=2)
    return run / "model"


def run_ours(options: argparse.Namespace, model: Path, run: Path) -> dict[str, Any]:
    recipe = OURS.format(
        model=model,
        steps=WARMUP + options.steps,
        prompts=PROMPTS,
        group=GROUP,
        tokens=options.tokens,
        micro_batch=options.micro_batch,
        lag=options.lag,
        difficulty=DIFFICULTY,
    )
    live(run, recipe, options.threads)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    rollouts = [record for record in records if record["kind"] == "rollout"][WARMUP:]
    ends = [0.0, *(record["seconds"] for record in steps)]
    seconds = [after - before for before, after in pairwise(ends)][WARMUP:]
    return {
        "seconds": seconds,
        "seconds_per_step": statistics.median(seconds),
        "rollout_seconds": statistics.median(one["rollout_seconds"] for one in rollouts),
        "update_seconds": statistics.median(one["update_seconds"] for one in rollouts),
        "tokens_per_step": PROMPTS * GROUP * statistics.fmean(one["length"] for one in rollouts),
        "reward": statistics.fmean(one["reward"] for one in rollouts),
    }


def live(run: Path, recipe: str, threads: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    file = run.with_suffix(".toml")
    file.write_text(recipe)
    command = [sys.executable, "-m", "qiusuo", "train", str(file), "--run", str(run)]
    own = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=own, stdout=subprocess.DEVNULL)


def run_trl(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    here = Path(__file__).parent
    command = [options.trl_python, str(here / "grpo_trl.py"), str(model), "--free-length"]
    command += ["--tokens", str(options.tokens), "--steps", str(options.steps)]
    command += ["--threads", str(options.threads), "--difficulty", str(DIFFICULTY)]
    source = {"PYTHONPATH": str(here.parent / "src")}
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ | source)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def tell(who: str, run: dict[str, Any]) -> None:
    print(
        f"{who}: {run['seconds_per_step']:.2f} s a step (rollout {run['rollout_seconds']:.2f}, "
        f"update {run['update_seconds']:.2f}), {run['tokens_per_step']:.0f} tokens, "
        f"reward {run['reward']:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
