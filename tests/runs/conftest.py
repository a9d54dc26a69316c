"""A run folder that looks like a real one, written in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qiusuo.runs.folder import RunFolder
from qiusuo.runs.summary import write_summary

RECIPE: dict[str, Any] = {
    "name": "poems-27m",
    "title": "Poems 27M: a small mixture of experts for Chinese and English",
    "license": "mit",
    "seed": 1234,
    "model": {
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "rope_theta": 10000.0,
    },
    "stages": [
        {"kind": "pretrain", "steps": 2000, "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}},
        {"kind": "sft", "steps": 200, "prompt": '问："何谓求索？"\n答：'},
    ],
}
SAMPLES = [
    ("床前明月光，", "的的是一不了人"),
    ("床前明月光，", "疑是地上霜。举头望山月，低头思故乡。"),
    ("The road is long;", " the the of and </script><script>alert(1)</script> & so"),
    ("The road is long;", " I will search high and low for what I seek."),
]


def step_record(step: int, steps: int, layers: int, experts: int, rng: Any) -> dict[str, Any]:
    """One believable step: a loss that falls, a router that finds its balance."""
    progress = step / steps
    loss = 2.55 + 6.4 * math.exp(-9 * progress) + 0.35 * (1 - progress)
    tilt = rng.gamma(4.0 + 40 * min(1, 2 * progress), size=(layers, experts))
    load = tilt / tilt.mean(axis=1, keepdims=True)
    warm = min(1.0, progress / 0.03)
    record: dict[str, Any] = {
        "kind": "step",
        "step": step,
        "loss": loss + rng.normal(0, 0.11),
        "mtp_loss": loss + 0.55 + rng.normal(0, 0.13),
        "balance_loss": 1.01 + 0.2 * progress,
        "grad_norm": 0.7 + 3 * math.exp(-30 * progress) + rng.gamma(2, 0.06),
        "lr": 3e-4 * warm * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2),
        "tokens": step * 16384,
        "tokens_per_second": 9400 + rng.normal(0, 260) - (2500 if step % 397 == 0 else 0),
        "flops_per_second": 1.6e11,
        "peak_share": 0.47 + rng.normal(0, 0.012),
        "max_violation": [float(row.max() - 1) for row in load],
        "seconds": step * 1.74,
    }
    if step % 20 == 0:
        record["expert_load"] = load.round(4).tolist()
    return record


def make_run(path: Path, *, steps: int = 200, layers: int = 7, experts: int = 32) -> Path:
    """A finished run with everything in it."""
    rng = np.random.default_rng(0)
    command = ["qiusuo", "train", "poems.toml", "--run", "runs/poems-27m"]
    with RunFolder.create(path, RECIPE, version="0.1.0", command=command) as folder:
        with folder.open_log() as log, folder.open_samples() as samples:
            log.append({"kind": "event", "text": "training begins"})
            for step in range(1, steps + 1):
                record = step_record(step, steps, layers, experts, rng)
                log.append(record)
                if step % max(steps // 12, 1) == 0:
                    loss = record["loss"] + 0.06
                    bits = {"bits_per_character": loss * 0.55, "seconds": step * 1.74}
                    log.append({"kind": "validation", "step": step, "loss": loss, **bits})
                if step % max(steps // 6, 1) == 0:
                    late = step > steps // 3
                    for prompt, text in (SAMPLES[late], SAMPLES[2 + late]):
                        sample = {"kind": "sample", "step": step, "prompt": prompt}
                        samples.append({**sample, "continuation": text})
        folder.set_status("finished", stage="sft", step=steps, steps=steps)
    write_summary(
        path,
        {
            "Parameters": 27_262_976,
            "Active parameters": 11_534_336,
            "Data": [{"name": "Tang poems", "license": "public domain", "source": "built in"}],
            "Languages": ["zh", "en"],
            "Cache per token": {"value": 576, "unit": "bytes"},
            "Exact match, addition": {"value": 0.9375, "unit": "(95 % interval 0.91 to 0.96)"},
        },
    )
    return path


@pytest.fixture
def make() -> Callable[..., Path]:
    """`make_run`, for tests that want it in several sizes."""
    return make_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run that tests only read."""
    return make_run(tmp_path_factory.mktemp("runs") / "poems")


# -- a run of reinforcement ---------------------------------------------------------------------

RL_STAGES = (("pretrain", 120), ("sft", 80), ("rl", 200))
RL_TASKS = ("chains/4", "chains/5", "chains/10", "parity/24")


def look_at_tasks(skill: float) -> dict[str, dict[str, float]]:
    """A look at held-out problems by a model of this skill, 0 to 1."""
    tasks = {}
    for place, name in enumerate(RL_TASKS):
        right = min(skill * (1 - 0.1 * place), 0.99)
        tasks[name] = {
            "accuracy": round(0.03 + 0.95 * right, 4),
            "accuracy_low": round(max(0.02 + 0.93 * right, 0.0), 4),
            "accuracy_high": round(min(0.05 + 0.95 * right, 1.0), 4),
            "pass_at_1": round(0.25 + 0.6 * right, 4),
            "pass_at_8": round(0.88 + 0.1 * right, 4),
            "length": 15 + 16 * right,
            "trace_valid": 0.4 + 0.55 * right,
        }
    return tasks


def rollout_record(step: int, first: int, last: int, rng: Any) -> dict[str, Any]:
    """One believable step of reinforcement: the policy finds that working it out pays."""
    skill = 1 / (1 + math.exp(-9 * ((step - first) / (last - first) - 0.4)))
    solved = 0.26 + 0.64 * skill + rng.normal(0, 0.02)
    return {
        "kind": "rollout",
        "step": step,
        "stage": "rl",
        "reward": solved,
        "pass_at_1": solved,
        "pass_at_k": min(0.9 + 0.09 * skill + rng.normal(0, 0.01), 1.0),
        "k": 8,
        "entropy": 0.62 - 0.4 * skill + rng.normal(0, 0.02),
        "length": 15 + 16 * skill + rng.normal(0, 0.6),
        "length_right": 22 + 9 * skill + rng.normal(0, 0.6),
        "length_wrong": 12 + 14 * skill + rng.normal(0, 1.2),
        "zero_variance_share": 0.12 + 0.4 * skill,
        "clip_share": 0.03 + rng.gamma(2, 0.004),
        "kl": 0.002 + 0.05 * skill,
        "mismatch_kl": 1e-6 * rng.gamma(4, 0.3),
        "mismatch_max": 3e-4 * rng.gamma(4, 0.3),
        "trace_valid": 0.45 + 0.5 * skill,
        "thought": 0.3 + 0.68 * skill,
        "by_task": {n: solved * (1 - 0.08 * i) for i, n in enumerate(RL_TASKS)},
        "rollout_seconds": 0.41,
        "update_seconds": 0.22,
        "refills": int(6 * skill),
        "curriculum": 4 + int(3 * skill),
    }


def kept_rollout(step: int, place: int, right: bool, stage: str = "rl") -> dict[str, Any]:
    """One answer: right ones think and wrong ones guess; one was never closed."""
    answer = "941" if right else "261"
    thought = "07+35=321+2=521+42=941" if right or place % 2 else ""
    response = f"<think>{thought}</think>{answer}"
    if not right and place % 5 == 4:
        answer, response = None, "<think>07+35=321+2=5</thin <b>bold</b> " + "2+2=4;" * 40
    return {
        "step": step,
        "stage": stage,
        "task": "chains",
        "difficulty": 4 + place % 2,
        "prompt": "07+35+2+42=",
        "response": response,
        "reward": float(right),
        "answer": answer,
        "reason": "right" if right else "wrong answer" if answer else "the thought is not closed",
        "tokens": len(response) // 2,
        "advantage": 0.625 - (not right),
        "version": step - 1,
        "measures": {"thought": 1.0, "trace_valid": float(right)},
    }


def make_rl_run(path: Path, *, kept: int = 12, every: int = 5) -> Path:
    """A finished run of three stages, the last of reinforcement, that keeps `kept` answers of
    each `every`-th step."""
    rng = np.random.default_rng(1)
    recipe = {"name": "zero-chains", "title": "R1-Zero in miniature: addition chains"}
    stages = [{"name": name, "kind": name, "steps": steps} for name, steps in RL_STAGES]
    total = sum(steps for _, steps in RL_STAGES)
    with RunFolder.create(path, recipe | {"stages": stages}, version="0.1.0") as folder:
        with folder.open_log() as log, folder.open_rollouts() as rollouts:
            first = 0
            for stage, steps in RL_STAGES:
                look = {"kind": "validation", "stage": stage, "step": first, "when": "before"}
                if stage == "rl":
                    log.append(look | {"tasks": look_at_tasks(0.02)})
                for step in range(first + 1, first + steps + 1):
                    record = step_record(step, total, 3, 8, rng) | {"stage": stage}
                    if stage == "rl":
                        own = rollout_record(step, first, first + steps, rng)
                        log.append(own)
                        for place in range(kept if step % every == 0 else 0):
                            right = place / kept < own["reward"]
                            rollouts.append(kept_rollout(step, place, right))
                        record |= {"loss": rng.normal(0, 0.02)}
                    log.append(record)
                    if stage == "rl" and (step - first) % 50 == 0 and step < first + steps:
                        share = (step - first) / steps
                        tasks = {"tasks": look_at_tasks(share)}
                        log.append({"kind": "validation", "stage": stage, "step": step, **tasks})
                first += steps
                ended = {"kind": "validation", "stage": stage, "step": first, "when": "after"}
                if stage == "pretrain":
                    log.append(ended | {"loss": 2.7, "bits_per_character": 1.5})
                else:
                    log.append(ended | {"tasks": look_at_tasks(0.97 if stage == "rl" else 0.02)})
        folder.set_status("finished", stage="rl", step=total, steps=total)
    return path


@pytest.fixture(scope="session")
def rl_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of reinforcement that tests only read."""
    return make_rl_run(tmp_path_factory.mktemp("runs") / "zero")
