"""Trainings in several real processes, for tests: started, watched, killed, stopped."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qiusuo.runs.log import read_log
from tests.training import lives

TRAFFIC = {"communication_bytes", "communication_bytes_modelled"}
ROUNDED = {"loss", "mtp_loss", "balance_loss", "grad_norm", "bits_per_character"}
PATIENCE = 300  # seconds, of a whole life of the tiny recipe on a busy machine


def train(home: Path, count: int, *words: str | Path) -> subprocess.Popen[str]:
    """``qiusuo train`` with so many processes."""
    return started(lives.command("train", *words, "--nproc", str(count)), lives.environment(home))


def torchrun(home: Path, options: Sequence[str], *words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "--", "qiusuo"]
    return started([*command, "train", *map(str, words)], lives.environment(home))


def started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors; a process that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"hangs: {out}\n{err}")
    return process.returncode, out, err


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Return as soon as the log has the step; fail if the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while step not in (lives.steps_done(run) if run.exists() else []):
        if process.poll() is not None:
            pytest.fail(f"ended before step {step}: {process.communicate()}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no step {step}: {process.communicate()}")
        time.sleep(0.005)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the training processes, the first rank first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"be_worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def told(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_log(run / "log.jsonl") if record["kind"] == kind]


def assert_parity(run: Path, other: Path, bound: float = 1e-5) -> None:
    """The same numbers at every step and look, but for rounding: ``other`` is of one process."""
    for kind in ("step", "validation"):
        pairs = list(zip(told(run, kind), told(other, kind), strict=True))
        assert pairs or kind == "validation"
        for mine, theirs in pairs:
            for key in ("step", "tokens", "lr", "when", "stage"):
                assert mine.get(key) == theirs.get(key), key
            assert mine.keys() - TRAFFIC == theirs.keys()
            for key in theirs.keys() & ROUNDED:
                assert mine[key] == pytest.approx(theirs[key], rel=bound), key
            assert mine.get("max_violation") == theirs.get("max_violation")
            assert mine.get("expert_load") == theirs.get("expert_load")
