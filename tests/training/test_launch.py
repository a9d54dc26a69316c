"""Processes that are launched together end together: whatever dies, and whoever is blocked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.training import processes

PATIENCE = 20  # seconds, for what should take three at most: a process that hangs does so for ever

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Launches so many processes that do a function's work in ``launched.py``."""
    started: list[subprocess.Popen[str]] = []

    def launched(work: str, count: int, ready: int) -> subprocess.Popen[str]:
        """As soon as so many processes have told that they are there."""
        command = [sys.executable, "-c", "from tests.training.launched import main; main()"]
        command += [str(count), work, str(tmp_path)]
        started.append(processes.started(command, dict(os.environ)))
        while len(pids(tmp_path)) < ready:
            assert started[-1].poll() is None, started[-1].communicate()
            time.sleep(0.01)
        return started[-1]

    yield launched
    for process in started:
        for pid in (process.pid, *pids(tmp_path).values()):
            if alive(pid):  # a test has failed
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def pids(folder: Path) -> dict[str, int]:
    """Those who told: rank and start, and their process."""
    return {file.name: int(file.read_text()) for file in folder.glob("[0-9]*")}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end(process: subprocess.Popen[str]) -> list[str]:
    """What it said, all lines."""
    out, err = process.communicate(timeout=PATIENCE)
    return (out + err).splitlines()


def test_survivors_that_wait_for_ever_are_ended_and_all_start_again(
    start: Start, tmp_path: Path
) -> None:
    process = start("stuck", count=3, ready=3)
    first = pids(tmp_path)
    os.kill(first["2-0"], signal.SIGKILL)
    assert end(process) == ["process 2 of 3 died (signal 9, Killed); restart 1", "0"]
    assert pids(tmp_path).keys() == {"0-0", "1-0", "2-0", "0-1", "1-1", "2-1"}
    assert not any(map(alive, first.values()))


def test_the_second_ctrl_c_ends_processes_that_cannot_answer(start: Start, tmp_path: Path) -> None:
    process = start("stuck", count=3, ready=3)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):  # it asked, and waits
        process.wait(timeout=1)
    assert all(map(alive, pids(tmp_path).values()))
    process.send_signal(signal.SIGINT)
    assert end(process) == ["None"]
    assert not any(map(alive, pids(tmp_path).values()))


def test_the_end_of_the_launcher_is_theirs(start: Start, tmp_path: Path) -> None:
    process = start("stuck", count=2, ready=2)
    os.kill(pids(tmp_path)["1-0"], signal.SIGCONT)
    process.kill()
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, pids(tmp_path).values())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert end(process) == []  # no word of semaphores or the like


def test_a_stop_is_told_to_all_and_answered(start: Start) -> None:
    process = start("obey", count=2, ready=2)
    process.send_signal(signal.SIGTERM)
    assert end(process) == ["130"]


def test_a_stop_before_they_listen_ends_them(start: Start) -> None:
    process = start("idle", count=2, ready=2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    assert end(process) == ["None"]


def test_what_dies_again_and_again_is_given_up(start: Start) -> None:
    *told, last = end(start("crash", count=2, ready=0))
    death = "process 1 of 2 died (signal 6, Aborted)"
    assert told == [f"{death}; restart {number}" for number in (1, 2, 3)]
    assert last.startswith(f"3 restarts were not enough: {death} again")


def test_what_a_person_must_mend_is_no_death(start: Start) -> None:
    assert end(start("answer", count=2, ready=0)) == ["3"]
