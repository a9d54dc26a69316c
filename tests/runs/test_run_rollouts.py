"""Answers are found by their step in a file of any size, and survive what the log survives."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.runs.conftest import kept_rollout

from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.rollouts import (
    MOST_PAGE_BYTES,
    MOST_SCAN_BYTES,
    RolloutLog,
    read_rollouts,
    rollout_steps,
    split_response,
)


def rollout(step: int, number: int, size: int = 20, reward: float = 1.0) -> dict[str, Any]:
    return {"step": step, "number": number, "response": "求" * size, "reward": reward}


def write(path: Path, rollouts: list[dict[str, Any]]) -> None:
    with RolloutLog(path) as log:
        for one in rollouts:
            log.append(one)


def everything(path: Path, **asked: Any) -> list[dict[str, Any]]:
    """All pages, one behind the other."""
    found: list[dict[str, Any]] = []
    start: int | None = None
    while True:
        page = read_rollouts(path, start=start, **asked)
        found += page.rollouts
        if page.next is None:
            return found
        start = page.next


@pytest.mark.parametrize("seed", range(4))
def test_pages_are_what_a_whole_reading_gives(tmp_path: Path, seed: int) -> None:
    path, chance = tmp_path / "rollouts.jsonl", random.Random(seed)
    rollouts, step = [], chance.choice([0, 7])
    for number in range(300):
        step += chance.choice([0, 0, 0, 1, 25])
        size = 20_000 if chance.random() < 0.02 else chance.randrange(400)
        rollouts.append(rollout(step, number, size, float(chance.random() < 0.5)))
    write(path, rollouts)
    assert rollout_steps(path) == (rollouts[0]["step"], step)
    for _ in range(40):
        first = chance.randrange(-1, step + 3)
        last = chance.choice([None, first, first + 40])
        right = chance.choice([None, True, False])
        wanted = [
            one
            for one in rollouts
            if first <= one["step"] <= (step if last is None else last)
            and (right is None or bool(one["reward"]) == right)
        ]
        most = chance.choice([1, 9, 500])
        page = read_rollouts(path, first, last, right=right, most=most)
        assert page.rollouts == wanted[: len(page.rollouts)]
        assert len(page.rollouts) == min(most, len(wanted)) or page.next is not None
        assert everything(path, first=first, last=last, right=right, most=most) == wanted


def test_only_what_is_shown_is_read(tmp_path: Path) -> None:
    """A file with damage that a whole reading would meet, and pages that do not meet it."""
    path = tmp_path / "rollouts.jsonl"
    write(path, [rollout(number, number, 1000) for number in range(1, 3001)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        for share in (0.3, 0.6, 0.85):
            file.seek(int(size * share))
            file.write(b"x\n" * 2000)
    assert [r["step"] for r in read_rollouts(path, most=3).rollouts] == [1, 2, 3]
    assert rollout_steps(path) == (1, 3000)
    assert [r["step"] for r in read_rollouts(path, 2990, most=3).rollouts] == [2990, 2991, 2992]
    with pytest.raises(RunError, match=r"rollouts\.jsonl: the line at byte \d+ is no rollout"):
        everything(path, most=200)


def test_pages_are_bounded_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    size = MOST_PAGE_BYTES // 10  # three bytes a character
    write(path, [rollout(1, number, size, float(number == 0)) for number in range(40)])
    page = read_rollouts(path)
    assert len(page.rollouts) == 3
    assert page.next is not None
    assert len(everything(path)) == 40
    rare = read_rollouts(path, right=True, most=5)  # only the first is: the rest is looked through
    assert len(rare.rollouts) == 1
    assert rare.next is not None
    assert rare.next < 2 * MOST_SCAN_BYTES
    huge = tmp_path / "huge.jsonl"
    write(huge, [rollout(1, 0, MOST_PAGE_BYTES)])  # one there is, however large
    assert len(read_rollouts(huge).rollouts) == 1


def test_a_resumed_run_takes_back_its_answers(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {"name": "x"}) as run:
        with run.open_rollouts() as log:
            for step in range(5, 500, 5):
                for place in range(3):
                    log.append(kept_rollout(step, place, True))
            assert log.truncate_after(251) == 3 * 49
            assert log.truncate_after(251) == 0
            with pytest.raises(RunError, match=r"step 250, after step 3.*truncate_after"):
                log.append(kept_rollout(3, 0, True))
            log.append(kept_rollout(252, 0, False))
        assert rollout_steps(run.rollouts_path) == (5, 252)
        with run.open_rollouts() as log:
            assert log.truncate_after(4) == 3 * 50 + 1
            log.append(kept_rollout(1, 0, True))
        assert everything(run.rollouts_path) == [kept_rollout(1, 0, True)]
    assert [entry.name for entry in run.path.glob(".partial*")] == []
    with pytest.raises(RunError, match="write rollouts"):
        RunFolder.open(run.path, lock=False).open_rollouts()


@pytest.mark.parametrize("cut", [1, 7, 70_000])
def test_a_torn_last_line_is_passed_over_and_mended(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rollouts.jsonl"
    write(path, [rollout(1, 0), rollout(2, 1), rollout(3, 2, 50_000)])
    path.write_bytes(path.read_bytes()[:-cut])
    assert everything(path) == [rollout(1, 0), rollout(2, 1)]
    assert rollout_steps(path) == (1, 2)
    write(path, [rollout(3, 9)])
    numbers = [one["number"] for one in everything(path)]
    assert numbers == ([0, 1, 2, 9] if cut == 1 else [0, 1, 9])  # only its newline was lost


def test_nothing_and_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    assert rollout_steps(path) is None
    assert read_rollouts(path).rollouts == []
    with RolloutLog(path) as log:
        assert log.truncate_after(3) == 0
        for bad in ({}, {"step": "1"}, {"step": True}, {"step": 1, "x": object()}):
            with pytest.raises(RunError):
                log.append(bad)
    assert path.read_bytes() == b""
    assert rollout_steps(path) is None
    write(path, [{"step": 1, "response": "NaN", "advantage": float("nan")}])
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert everything(path)[0]["response"] == "NaN"


@pytest.mark.parametrize(
    ("response", "parts"),
    [
        ("<think>a\nb</think>42", ("a\nb", "42")),
        ("</think>42", ("", "42")),
        ("  <think></think>", ("", "")),
        ("<think>never closed", ("never closed", "")),
        ("plain words", (None, "plain words")),
        ("a</think>b</think>c", ("a", "b</think>c")),
        ("", (None, "")),
    ],
)
def test_a_response_is_taken_apart(response: str, parts: tuple[str | None, str]) -> None:
    assert split_response(response) == parts
