"""Reinforcement and chains of stages, killed at any moment: what goes on is the same, bit for bit.

Real processes, really killed; rollouts, traces, curriculum, guard and reference among what counts.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import read_log
from tests.training import dying_trying, lives

# Whole lives of reinforcement, killed again and again.
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("no_pictures")]


@pytest.fixture(scope="module")
def dead(home: Path, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that died on their way, by the way, and a whole one of each recipe."""
    folder = tmp_path_factory.mktemp("dead")
    program = [sys.executable, "-m", "tests.training.dying_trying", taught, folder]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        program, env=lives.environment(home), cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ways = [line.split() for line in done.stdout.splitlines()]
    ends = {words[0]: words[1] for words in ways if words and words[0] in dying_trying.WAYS}
    assert ends == dict.fromkeys(dying_trying.WAYS, str(-signal.SIGKILL))
    return folder


def test_the_whole_runs_have_had_what_may_be_lost(dead: Path) -> None:
    tries = [r for r in read_log(dead / "rl-whole" / "log.jsonl") if r["kind"] == "rollout"]
    assert len(tries) == 7
    assert any(record["refills"] for record in tries)
    assert tries[-1]["curriculum"]["parity"] == 8
    hardest = [max(record["curriculum"].values()) for record in tries]
    assert hardest[0] < hardest[-1] == 10
    assert tries[2]["kl"] > 0
    assert (dead / "chain-whole" / "traces" / "sample.jsonl").stat().st_size > 0
    for run in ("rl-whole", "chain-whole"):
        assert (dead / run / "rollouts.jsonl").stat().st_size > 0
    looks = [r for r in read_log(dead / "chain-whole" / "log.jsonl") if r["kind"] == "validation"]
    assert [(r["step"], r["stage"], r.get("when")) for r in looks] == [
        (0, "teach", "before"),
        (3, "teach", "after"),
        (6, "rl", "after"),
        (12, "refine", "after"),
    ]


@pytest.mark.parametrize("way", dying_trying.WAYS)
def test_killed_and_resumed(dead: Path, way: str) -> None:
    run = dead / way
    assert RunFolder.open(run, lock=False).status().get("state") in (None, "running")
    assert lives.go_on(run)
    lives.assert_same_life(run, dead / f"{way.partition('-')[0]}-whole")
