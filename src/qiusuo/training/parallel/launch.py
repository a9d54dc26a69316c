"""``qiusuo train --nproc N``: N processes on this machine, started anew where one dies.

The launcher starts the processes, each in a session of its own, and looks at them ten times a
second. When one died (it was killed, it crashed), the others get a few seconds to leave and are
then killed: a process that waits in a collective for a dead one may wait for ever, and its main
thread answers no signal. Nothing is lost by that but steps since the last checkpoint, from which
all start again. An error that a person must mend is not such a death: the processes say it, return
an exit code in peace, and nothing is started again.

The first Ctrl-C (or SIGTERM) asks all to finish their step and save, and waits; the second kills
them. What ends the launcher itself ends them too (worker.py).

The processes meet as torchrun's do, through the same variables and at a store that the launcher
keeps, a new one for each start: else they would find the addresses of the dead. PyTorch's elastic
agent, which torchrun is, leaves survivors thirty seconds and cannot be hurried while it waits.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch.distributed import TCPStore

from qiusuo.training.parallel.stopping import StopAsked
from qiusuo.training.parallel.worker import ANSWERS, BEREFT, LENGTH_BYTES, be_worker

RESTARTS = 3  # of one call: what dies more often has a reason that starting it anew does not mend
LEAVING_SECONDS = 3.0  # that others have after a death, to say what they met
LOOK_SECONDS = 0.1
HOST = "127.0.0.1"


class LaunchError(RuntimeError):
    """The processes died again and again."""


def launch(
    count: int, work: Callable[..., int], *arguments: Any, tell: Callable[[str, int], None]
) -> int | None:
    """Call ``work(*arguments)``, a function of a module that returns one of ANSWERS, in ``count``
    new processes: the largest answer, or None where they were stopped before all could answer.
    ``tell`` is given each death, in words, and the number of the restart that follows. LaunchError
    where they died more than RESTARTS times."""
    given = pickle.dumps((sys.path, pickle.dumps((work, arguments))))
    with StopAsked(2) as asked:
        for restart in range(RESTARTS + 1):
            workers = _Workers(count, restart, given)
            try:
                codes = workers.wait(asked)
            finally:
                workers.kill()
            answers = [code for code in codes if code in ANSWERS]
            if len(answers) == count:
                return max(answers)
            if asked.times:
                return None
            death = _first_death(codes)
            if restart < RESTARTS:
                tell(death, restart + 1)
    raise LaunchError(
        f"{RESTARTS} restarts were not enough: {death} again; the last whole checkpoint is in place"
    )


class _Workers:
    """All processes of one start."""

    def __init__(self, count: int, restart: int, given: bytes) -> None:
        self.store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        common = {
            "OMP_NUM_THREADS": str(max(1, (cores or 1) // count)),
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(restart),
        }
        self.processes = []
        for rank in range(count):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(_start(environment, given))

    def codes(self) -> list[int | None]:
        """The exit codes: minus its signal of one that was killed, None of one that lives."""
        return [process.poll() for process in self.processes]

    def wait(self, asked: StopAsked) -> list[int | None]:
        """The codes when all have ended, or when there is no use in waiting for those that live."""
        passed_on, died_at = False, math.inf
        while None in (codes := self.codes()) and asked.times < 2:
            if asked.times and not passed_on:
                passed_on = True
                self.send(signal.SIGTERM)
            if any(_dead(code) for code in codes):
                died_at = min(died_at, time.monotonic())
            if time.monotonic() - died_at > LEAVING_SECONDS:
                break
            time.sleep(LOOK_SECONDS)
        return codes

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    def kill(self) -> None:
        """End those that live."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _start(environment: dict[str, str], given: bytes) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {be_worker.__module__} import be_worker; be_worker()"],
        stdin=subprocess.PIPE,
        env=environment,
        bufsize=0,
        start_new_session=True,
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # of one that has died already
        process.stdin.write(len(given).to_bytes(LENGTH_BYTES, "big") + given)
    return process


def _dead(code: int | None) -> bool:
    return code is not None and code not in ANSWERS


def _first_death(codes: Sequence[int | None]) -> str:
    """The death that brought the others, in words: rather one by a signal than one that a process
    ended with itself, and that rather than one whose reason was another's."""
    dead = [(code == BEREFT, code > 0, rank, code) for rank, code in enumerate(codes) if code]
    *_, rank, code = min(entry for entry in dead if _dead(entry[-1]))
    how = f"exit code {code}" if code > 0 else f"signal {-code}, {signal.strsignal(-code)}"
    return f"process {rank} of {len(codes)} died ({how})"
