"""Our side of reasoning-gym: one server in the sandbox for each Python, started when it is needed.

The package is never imported here: it takes two seconds and 30 packages, and some of its scorers
run answers as code. The sandbox keeps such code from files and network.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from qiusuo.tasks.sandbox import Limits, launch, no_sandbox
from qiusuo.tasks.task import TaskError

VERSION = "0.1.25"  # whose games were tried
SERVER = Path(__file__).with_name("gym_server.py")
LIMITS = Limits(cpu_seconds=7 * 86400, memory_bytes=2 << 30, processes=16, file_bytes=1 << 20)
START_SECONDS = 60.0  # the import, on a busy machine
FIND = (
    "import importlib.util as u, os; s = u.find_spec('reasoning_gym'); "
    "print(os.path.dirname(os.path.dirname(s.origin)) if s else '')"
)


class GymServer:
    """Questions to reasoning-gym, one at a time; threads may ask at once. A server that has died
    is started anew with the next question."""

    def __init__(self, python: str) -> None:
        self.python = python
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize | None = None

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply; None if there was none in time, or the server died of the question.
        `TaskError` where no server can be had."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            reply = self._exchange(question, seconds)
            if reply is None:
                self.close()
            return reply

    def close(self) -> None:
        """End the server; the next question starts another."""
        if self._end:
            self._end()
        self._process = None

    def _start(self) -> None:
        self.close()
        packages = _packages(self.python)
        folder = tempfile.TemporaryDirectory(prefix="qiusuo-gym-")
        (Path(folder.name) / "program.py").write_bytes(SERVER.read_bytes())
        process, status = launch(
            Path(folder.name), LIMITS, python=self.python, shown=[packages], quiet=True
        )
        self._process = process
        self._end = weakref.finalize(self, _end, process, folder)
        with os.fdopen(status, "rb") as file:
            fault = file.read(1000).decode(errors="replace")
        if fault:
            self.close()
            raise no_sandbox(fault)
        reply = self._exchange({"packages": packages}, START_SECONDS)
        if reply is None or reply.get("version") != VERSION:
            self.close()
            found = "it does not start" if reply is None else reply.get("fault", reply)
            raise TaskError(
                f"tasks of gym/ need reasoning-gym {VERSION}, and {self.python} gives: {found}; "
                "pip install 'qiusuo[gym]'"
            )

    def _exchange(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        assert self._process and self._process.stdin and self._process.stdout  # noqa: PT018
        deadline = time.monotonic() + seconds
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                return None
            line += chunk
        reply: dict[str, Any] = json.loads(line)
        return reply


@cache
def gym_server(python: str) -> GymServer:
    """The server of this Python, shared by all tasks."""
    return GymServer(python)


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.terminate()  # the launcher ends when all behind it has ended
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            with suppress(BrokenPipeError):
                stream.close()
    folder.cleanup()


def _packages(python: str) -> str:
    """The folder that has the package."""
    try:
        # No imports from where we happen to be.
        found = subprocess.run(
            [python, "-I", "-c", FIND], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise TaskError(f"tasks of gym/ need a Python; {python!r} does not run: {error}") from error
    if not found:
        raise TaskError(
            f"tasks of gym/ need reasoning-gym, which {python} does not have: "
            "pip install 'qiusuo[gym]'"
        )
    return found
