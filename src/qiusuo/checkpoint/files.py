"""Writing folders so that a reader finds either the old one or the whole new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the tensor or the file."""


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; on success it takes the place of ``folder``, else it goes.

    Raises CheckpointError where the disk refuses; what stood at ``folder`` is then untouched.
    """
    folder = folder.absolute()
    draft = folder.with_name(f".{folder.name}.draft-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        for file in [*draft.rglob("*"), draft]:
            _flush(file)
        _swap(draft, folder)
    except OSError as error:
        raise CheckpointError(f"could not write {folder}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(draft: Path, folder: Path) -> None:
    if not folder.exists():
        draft.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old)
