"""Which servers are alive: each holds a lock on a file of its own beside the database.

The kernel drops the lock when the process ends, however it ends, and a process id that is used
again means nothing here. So what a killed server had reserved can be told from what another living
server on the same database has reserved.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qiusuo.server.database import DatabaseError


class Owner:
    """One server's mark of life: ``token``, alive until ``close`` or the end of the process."""

    def __init__(self, database: Path) -> None:
        while True:
            self.token = f"{os.getpid()}-{secrets.token_hex(8)}"
            path = _file(database, self.token)
            file = path.open("x", encoding="ascii")
            # Between its making and its locking another server may have taken it for a dead one's.
            if _lock(file) and path.exists():
                self._file, self._path = file, path
                return
            file.close()

    def close(self) -> None:
        """Say that this server is gone; again does nothing."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def owners(database: Path) -> set[str]:
    """Tokens of servers, alive or dead, that have a file."""
    start = _file(database, "").name
    return {path.name.removeprefix(start) for path in database.parent.glob(f"{_escaped(start)}*")}


@contextmanager
def found_dead(database: Path, token: str) -> Iterator[bool]:
    """Whether that server is gone. Nobody else finds it dead meanwhile; its file is removed after,
    unless an exception says that what it left is not yet dealt with."""
    path = _file(database, token)
    try:
        file = path.open("r", encoding="ascii")
    except FileNotFoundError:
        yield True
        return
    with file:
        dead = _lock(file)
        yield dead
        if dead:
            path.unlink(missing_ok=True)


def _file(database: Path, token: str) -> Path:
    return database.with_name(f"{database.name}-server-{token}")


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _lock(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError as error:
        raise DatabaseError(
            "the ledger needs POSIX file locks, which this system lacks; on Windows use WSL"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
