"""Where and by which command a run was made: enough to judge its speed and to repeat it.

Names no host, user or folder beyond what the person typed: a run folder is published.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def describe_environment(version: str, command: Sequence[str] | None = None) -> dict[str, Any]:
    """The facts of this process as JSON values.

    `version` is qiusuo's; `command` the words that were typed (default: this process's own).
    Facts that the machine does not tell are null, memory is in bytes.
    """
    return {
        "qiusuo": version,
        "torch": _version_of("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "memory_bytes": _memory_bytes(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        **_git_state(),
        "command": shlex.join(_own_command() if command is None else command),
        "started": now(),
    }


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version_of(package: str) -> str | None:
    # Read from the installed metadata: importing torch takes a second, and this does not.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_command() -> list[str]:
    program = Path(sys.argv[0] or "python")
    name = [program.name]
    if program.name == "__main__.py":
        name = ["python", "-m", program.parent.name]
    return [*name, *sys.argv[1:]]


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _usable_cores() -> int:
    # In a container or under taskset this is fewer than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _git_state() -> dict[str, Any]:
    """The commit of the code that runs, and whether the code differs from it."""
    here = Path(__file__).parent
    # Someone else's repository may surround an installed copy of us: ask whether it is ours.
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"git_commit": None, "git_modified": None}
    changes = _git(here.parent, "status", "--porcelain", "--", ".")
    return {"git_commit": _git(here, "rev-parse", "HEAD"), "git_modified": bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
