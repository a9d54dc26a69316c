"""Where fetched things lie: `$QIUSUO_HOME` or `~/.cache/qiusuo`.

archives/   packages as they were fetched, and the model files taken out of them
models/     one folder for each model that was pulled, finished or not there
locks/      one file for each thing that is, or was, being fetched
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from qiusuo.data.atomic import disk_errors
from qiusuo.data.errors import DataError

if sys.platform != "win32":
    import fcntl


def cache_folder() -> Path:
    """Where everything that is fetched or prepared is kept."""
    home = os.environ.get("QIUSUO_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "qiusuo"


@contextlib.contextmanager
def only_one(name: str, cache: Path | None = None) -> Iterator[None]:
    """Hold the cache's lock for `name`; `DataError` if someone else is at it.

    The kernel drops the lock when its holder ends, however it ends. The file stays: deleting it
    would let two processes lock two files of one name. Windows has no such lock and gets none.
    """
    path = (cache or cache_folder()) / "locks" / f"{name}.lock"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"{name} is being fetched or converted by another process just now: wait until "
                    f"it is done, or stop it, and try again (what it has fetched is kept)"
                ) from error
        yield


def require_space(place: Path, needed: int) -> None:
    """`DataError` unless the disk of `place` has room for `needed` bytes."""
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DataError(
            f"{place} has {show_bytes(free)} free and {show_bytes(needed)} are still to come: "
            f"free {show_bytes(needed - free)} more, or point QIUSUO_HOME at another disk"
        )


def show_bytes(count: int) -> str:
    """A size for people: `1.5 GB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
