"""Files and folders that appear whole or not at all.

Everything is written under a temporary name beside its place, flushed to the disk, and renamed:
after a crash or a full disk the old thing is still there, or nothing, never half of the new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qiusuo.data.errors import DataError


def sync(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a `DataError` that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk is full while writing {place}: free some space or choose a folder on "
                f"another disk; nothing that was whole before has been touched"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise DataError(f"cannot write {place}: {error.strerror}") from error
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, replacing what was there in one step."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files private to the user; these are ordinary ones.
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes `folder`, on failure it is removed.

    With `replace`, what stood at `folder` goes only after the new one is complete.
    """
    with disk_errors(folder):
        if folder.exists() and not replace:
            raise DataError(f"{folder} exists already: delete it or choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        try:
            partial.chmod(0o755)
            yield partial
            for path in sorted(partial.rglob("*"), reverse=True):
                sync(path)
            sync(partial)
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
                folder.rename(old / folder.name)
                partial.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
            else:
                partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(folder.parent)
