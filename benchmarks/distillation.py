"""A student with a third of its teacher's active parameters, taught in five ways, at equal seconds.

    .venv/bin/python benchmarks/distillation.py TEACHER [--minutes 1.5] [--out results.json]

TEACHER is a run or a model folder that solves addition chains by thinking (`r1-zero-chains`). Every
way has the same student from the same random weights and the same seconds of training steps:

    gold        the task's own solutions (no teacher)
    traces      the teacher's verified answers, as R1 was distilled
    top-k       the teacher's 4 likeliest tokens at every place of those answers
    full        its whole distribution there
    on-policy   half of the time traces, then its distribution on the student's own answers
    rl          half of the time traces, then the verifier's reward on the student's own answers

What the teacher's answers and distributions cost is told apart: they are made once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qiusuo.engine.loading import load
from qiusuo.evaluation.answers import ModelAnswerer
from qiusuo.evaluation.asking import Asker
from qiusuo.evaluation.evaluate import evaluate
from qiusuo.model.cost import measure
from qiusuo.runs.summary import read_summary
from qiusuo.tasks.registry import find_task

DIFFICULTIES = [4, 5]
TASK = '{ task = "chains", difficulties = [2, 3, 4, 5] }'
HEAD = """
name = "student-{name}"
[tokenizer]
kind = "path"
path = "{tokenizer}"
[model]
hidden_size = 88
intermediate_size = 240
moe_intermediate_size = 80
num_hidden_layers = 3
num_attention_heads = 4
kv_lora_rank = 44
qk_nope_head_dim = 22
qk_rope_head_dim = 22
v_head_dim = 22
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 1
n_group = 1
topk_group = 1
routed_scaling_factor = 1.0
first_k_dense_replace = 1
num_nextn_predict_layers = 1
max_position_embeddings = 256
rope_theta = 1000.0
"""
LEARNING = """
[stages.optimizer]
learning_rate = 0.02
adamw_learning_rate = 0.003
"""
TRYING = """
[stages.optimizer]
kind = "adamw"
adamw_learning_rate = 3e-4
weight_decay = 0.0
"""
ROWS = "steps = 100000\nminutes = {minutes}\nsequence_length = 96\nbatch_size = 24\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--minutes", type=float, default=1.5, help="of training, each way")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--problems", type=int, default=400, help="held out, to be judged by")
    parser.add_argument("--answers", type=int, default=6000, help="of the teacher")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.teacher / "model"
    teacher = folder if folder.is_dir() else options.teacher
    results = {"teacher": judge(teacher, options.problems)}
    tell("teacher", results["teacher"])
    with tempfile.TemporaryDirectory() as place:
        taught = teach(teacher, Path(place), options)
        for name in options.ways:
            run = Path(place, name)
            live(run, student(name, teacher, options.minutes, taught), options.seed)
            results[name] = judge(run / "model", options.problems) | {"seconds": seconds(run)}
            tell(name, results[name])
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def teach(teacher: Path, place: Path, options: argparse.Namespace) -> dict[str, str]:
    """The teacher's verified answers, and what it would say at each of their places."""
    run = place / "teaching"
    stages = f"""
name = "teaching"
license = "mit"
base = "{teacher}"
[[stages]]
kind = "sample"
count = {options.answers}
answers = 1
batch = 128
max_tokens = 64
temperature = 1.0
tasks = [{TASK}]
[[stages]]
kind = "teach"
name = "full"
sources = [{{ traces = "sample" }}]
count = {options.answers}
[[stages]]
kind = "teach"
name = "top"
sources = [{{ traces = "sample" }}]
count = {options.answers}
top = 4
"""
    live(run, stages, options.seed)
    print(f"the teacher's answers and distributions: {seconds(run):.0f} s", flush=True)
    traces = run / "traces" / "sample.jsonl"
    return {
        "traces": str(traces),
        **{name: str(run / "distributions" / name) for name in ("full", "top")},
    }


def student(name: str, teacher: Path, minutes: float, taught: dict[str, str]) -> str:
    # transformers' layout: the tokenizer lies beside the weights.
    return HEAD.format(name=name, tokenizer=teacher) + WAYS[name](teacher, minutes, taught)


def imitate(source: str, minutes: float) -> str:
    rows = ROWS.format(minutes=minutes)
    return f'[[stages]]\nkind = "sft"\n{rows}sources = [{source}]\n{LEARNING}'


def gold(teacher: Path, minutes: float, taught: dict[str, str]) -> str:
    return imitate(f"{{ task = {TASK} }}", minutes)


def traces(teacher: Path, minutes: float, taught: dict[str, str]) -> str:
    return imitate(f'{{ file = "{taught["traces"]}" }}', minutes)


def stored(kind: str) -> Callable[[Path, float, dict[str, str]], str]:
    def way(teacher: Path, minutes: float, taught: dict[str, str]) -> str:
        rows = ROWS.format(minutes=minutes)
        sources = f'sources = [{{ folder = "{taught[kind]}" }}]\n'
        return f'[[stages]]\nkind = "distil"\n{rows}{sources}{LEARNING}'

    return way


def on_policy(teacher: Path, minutes: float, taught: dict[str, str]) -> str:
    return traces(teacher, minutes / 2, taught) + (
        f'[[stages]]\nkind = "distil_on_policy"\nsteps = 100000\nminutes = {minutes / 2}\n'
        f"prompts = 128\nmax_tokens = 64\ntasks = [{TASK}]\n"
        f'teachers = [{{ model = "{teacher}" }}]\n'
        f"{TRYING}"
    )


def rl(teacher: Path, minutes: float, taught: dict[str, str]) -> str:
    return traces(teacher, minutes / 2, taught) + (
        f'[[stages]]\nkind = "rl"\nsteps = 100000\nminutes = {minutes / 2}\n'
        f"max_tokens = 64\ntasks = [{TASK}]\n{TRYING}"
    )


WAYS: dict[str, Callable[[Path, float, dict[str, str]], str]] = {
    "gold": gold,
    "traces": traces,
    "top-k": stored("top"),
    "full": stored("full"),
    "on-policy": on_policy,
    "rl": rl,
}


def live(run: Path, recipe: str, seed: int) -> None:
    file = run.with_suffix(".toml")
    file.write_text(recipe)
    command = [sys.executable, "-m", "qiusuo", "train", str(file), "--run", str(run)]
    command += ["--set", f"seed={seed}"]
    subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)


def seconds(run: Path) -> float:
    """Of training steps, in all stages."""
    return float(read_summary(run)["Training time"]["value"])


def judge(model: Path, problems: int) -> dict[str, Any]:
    lm = load(model, dtype="float32")
    answerer = ModelAnswerer(lm, Asker(lm.needed_tokenizer()))
    score = list(
        evaluate(
            answerer, find_task("chains"), DIFFICULTIES, count=problems, samples=4, max_tokens=64
        )
    )[-1]
    assert score.sampled is not None
    cost = measure(lm.config)
    return {
        "accuracy": score.greedy.rates["accuracy"].record(),
        "pass_at_1": score.sampled.rates["pass@1"].record(),
        "active_parameters": cost.active,
        "parameters": cost.parameters,
    }


def tell(name: str, result: dict[str, Any]) -> None:
    accuracy = result["accuracy"]
    spent = f", {result['seconds']:.0f} s" if "seconds" in result else ""
    print(
        f"{name:10} {accuracy['value']:.1%} ({accuracy['low']:.1%} to {accuracy['high']:.1%}), "
        f"pass@1 {result['pass_at_1']['value']:.1%}, {result['active_parameters']:,} active{spent}",
        flush=True,
    )


if __name__ == "__main__":
    main()
