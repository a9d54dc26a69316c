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
        "balance_loss": 1.01,
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
