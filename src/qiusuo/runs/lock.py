"""One writer at a time: two trainings in one folder would ruin both.

The kernel holds the lock for the open file and drops it when the process ends, however it
ends, so nothing stale is ever left to clean. The process id inside is only for people.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from qiusuo.runs.durable import RunError


class RunLock:
    """An exclusive lock on the run folder `path`, held until `release` or the process's end.

    Raises RunError naming the holder's process id when another holds it.
    """

    def __init__(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError as error:
            raise RunError(
                "a run folder is locked with POSIX file locks, which this system lacks; "
                "on Windows train inside WSL"
            ) from error
        file = (path / ".lock").open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise RunError(
                f"{path} is in use by process {holder or '(unknown)'}; "
                "wait for it, stop it, or train into another folder"
            ) from error
        self._file: IO[str] | None = file
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()

    @property
    def held(self) -> bool:
        """Whether this object still holds the lock."""
        return self._file is not None

    def release(self) -> None:
        """Let others in; harmless when already released."""
        if self._file is not None:
            # The file stays: deleting it would let two processes lock two files of one name.
            self._file.truncate(0)
            self._file.close()
            self._file = None


def writer_of(path: Path) -> int | None:
    """The id of the living process that writes the run folder `path`, or None.

    Looks without touching the lock, so that a reader never stands in a writer's way.
    """
    try:
        process = int((path / ".lock").read_text(encoding="ascii"))
        os.kill(process, 0)
    except PermissionError:  # it lives, and belongs to another user
        return process
    except (OSError, ValueError, OverflowError):
        return None
    return process
