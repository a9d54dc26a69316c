"""Run a Python program that a model wrote, for rewards that come from what it does.

    run_program("print(6 * 7)").stdout == "42\\n"

The program has the standard library and an empty folder to write in. It has no network, sees no
file of the machine beside Python's and the system's libraries, runs as a user of its own, within
limits of time, memory, processes, files and output, and ends with all its children.
Hashes are not random, so a program that prints a set prints it again the same.
`sandbox_launcher.py` says how. This takes Linux, and root or unprivileged user namespaces; where
they are missing `run_program` refuses, because limits alone would leave a model's program the
network and, without root, your files.

What this does not do: guard against faults of the kernel (a virtual machine would), or limit what
all processes of a program take together: `memory_bytes` holds for each of them.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from qiusuo.tasks.task import TaskError

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
MAX_PROGRAM = 1 << 20  # bytes
MAX_STDIN = 1 << 16  # bytes: what a pipe holds, so that writing never waits
CHUNK = 1 << 16

Status = Literal["ok", "error", "timeout", "output"]


class SandboxError(TaskError):
    """A program that cannot be run in safety here; it was not run."""


@dataclass(frozen=True)
class Limits:
    """`seconds` of the clock, `cpu_seconds` of each process; `memory_bytes` of address space of
    each process; `processes` and threads at once; `file_bytes` of each file and `disk_bytes` of
    all; `output_bytes` of stdout and of stderr, more than which ends the program."""

    seconds: float = 5.0
    cpu_seconds: int = 4
    memory_bytes: int = 256 << 20
    processes: int = 8
    file_bytes: int = 1 << 20
    disk_bytes: int = 4 << 20
    output_bytes: int = 64 << 10


@dataclass(frozen=True)
class Ran:
    """How a program ended: `ok` with exit code 0, `error` with another one or by a signal (128 and
    its number), `timeout` by the clock or the CPU's, `output` by writing too much."""

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str


def run_program(program: str, stdin: str = "", limits: Limits = Limits()) -> Ran:
    """Run a program to its end or to the end of its limits. Blocks; threads may call it at once.

    `SandboxError` where it cannot be isolated; `TaskError` for a program of over 1 MiB or
    input of over 64 KiB. A program that is no Python, or not even text, is an `error` like any.
    """
    source = program.encode("utf-8", "surrogatepass")
    given = stdin.encode("utf-8", "surrogatepass")
    if len(source) > MAX_PROGRAM or len(given) > MAX_STDIN:
        raise TaskError("a program takes 1 MiB and its input 64 KiB at most; this is more")
    with tempfile.TemporaryDirectory(prefix="qiusuo-sandbox-") as name:
        folder = Path(name)
        (folder / "program.py").write_bytes(source)
        return _run(folder, given, limits)


def launch(
    folder: Path,
    limits: Limits,
    *,
    python: str = sys.executable,
    shown: Sequence[str] = (),
    quiet: bool = False,
) -> tuple[subprocess.Popen[bytes], int]:
    """Start `program.py` of an empty folder in the sandbox: the process, which ends when told to
    terminate and all behind it has ended, and a descriptor that says what kept it from running, or
    ends without a word once it runs. `shown` are folders that the program may read, `quiet` throws
    its stderr away. The limits that only `run_program` watches, seconds and output, are not kept.
    """
    status_out, status_in = os.pipe()
    settings = json.dumps({**asdict(limits), "status": status_in, "shown": list(shown)})
    try:
        process = subprocess.Popen(
            [python, "-I", "-S", str(LAUNCHER), settings, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else subprocess.PIPE,
            pass_fds=(status_in,),
            start_new_session=True,
            cwd=folder,
            env={},
        )
    except BaseException:
        os.close(status_out)
        raise
    finally:
        os.close(status_in)
    return process, status_out


def no_sandbox(fault: str) -> SandboxError:
    return SandboxError(
        f"this machine gives no sandbox ({fault}): run on Linux, as root or where user "
        "namespaces are allowed (sysctl user.max_user_namespaces, kernel.apparmor_restrict_"
        "unprivileged_userns=0; docker run --cap-add SYS_ADMIN)"
    )


def _run(folder: Path, stdin: bytes, limits: Limits) -> Ran:
    process, status_out = launch(folder, limits)
    with process, os.fdopen(status_out, "rb") as status:
        try:
            ended, stdout, stderr = _watch(process, stdin, limits)
        finally:
            process.terminate()  # the launcher ends when all behind it has ended
            process.wait()
        fault = status.read(1000).decode(errors="replace")
    if fault:
        raise no_sandbox(fault)
    code = process.returncode
    if ended is None and code == 128 + signal.SIGXCPU:
        ended = "timeout"
    if ended is not None:
        return Ran(ended, None, stdout, stderr)
    return Ran("ok" if code == 0 else "error", code, stdout, stderr)


def _watch(
    process: subprocess.Popen[bytes], stdin: bytes, limits: Limits
) -> tuple[Status | None, str, str]:
    """Read until the program ends or goes beyond its time or output; what ended it, if not
    itself, and what it wrote."""
    assert process.stdin and process.stdout and process.stderr  # noqa: PT018
    deadline = time.monotonic() + limits.seconds
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(stdin)
    texts: dict[IO[bytes], bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
    ended: Status | None = None
    with selectors.DefaultSelector() as selector:
        for stream in texts:
            selector.register(stream, selectors.EVENT_READ)
        while ended is None and selector.get_map():
            left = deadline - time.monotonic()
            ready = selector.select(max(left, 0))
            if left <= 0:
                ended = "timeout"
            for key, _ in ready:
                chunk = os.read(key.fd, CHUNK)
                text = texts[key.fileobj]  # type: ignore[index]
                text += chunk
                if not chunk:
                    selector.unregister(key.fileobj)
                if len(text) > limits.output_bytes:
                    ended = "output"
    if ended is None:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            ended = "timeout"
    stdout, stderr = (
        bytes(text[: limits.output_bytes]).decode(errors="replace") for text in texts.values()
    )
    return ended, stdout, stderr
