"""Writing folders and files so that a reader finds either the old one or the whole new one.

A new folder is filled beside the old, flushed, and exchanged with it in one step of the kernel's.
Where the system has no such step there are two renames, and between them the old folder stands
aside under a name that ``restore_folder`` knows. A process killed at any point loses nothing; what
it leaves lying about goes with the next write.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

if sys.platform != "win32":  # which neither locks nor flushes folders
    import fcntl


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the tensor or the file."""


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; on success it takes the place of ``folder``, else it goes.

    Raises CheckpointError where the disk refuses; what stood at ``folder`` is then untouched.
    """
    folder = folder.resolve()  # through a link: the link stays, what it points to is replaced
    draft = folder.with_name(f".{folder.name}.draft-{os.getpid()}")
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(folder)
        _sweep(folder)
        draft.mkdir()
        claim = _claim(draft)
    try:
        with _disk_errors(folder):
            yield draft
            for path in [*draft.rglob("*"), draft]:
                _flush(path)
            _swap(draft, folder)
            _flush(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # after an exchange: the old folder
        _release(claim)


@contextmanager
def replacing_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to fill; on success it takes the place of ``path``, else it goes.

    Raises CheckpointError where the disk refuses; what stood at ``path`` is then untouched.
    """
    path = path.resolve()  # through a link: the link stays, what it points to is replaced
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep_drafts(path)
            with draft.open("wb") as file:
                claim = _claim(draft)
                try:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                finally:
                    _release(claim)
            draft.replace(path)
            _flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"could not write {folder}: {error}") from error


def restore_folder(folder: Path) -> None:
    """Bring back a folder whose replacement was interrupted between its two renames."""
    folder = folder.resolve()
    if not folder.exists():
        with suppress(OSError):
            _aside(folder).rename(folder)


def _swap(draft: Path, folder: Path) -> None:
    if not folder.exists():
        draft.rename(folder)
        return
    if _exchange(draft, folder):
        return
    aside = _aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    try:
        draft.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.aside")


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders trade places at once; False where the system or the disk cannot."""
    paths = os.fsencode(one), os.fsencode(other)
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE and RENAME_SWAP are both 2
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return bool(library.renamex_np(*paths, swap) == 0)
        return bool(library.renameat2(here, paths[0], here, paths[1], swap) == 0)
    except (AttributeError, TypeError, OSError):
        return False


def _sweep(folder: Path) -> None:
    """Remove the drafts of dead writers, and an old folder that a new one has replaced."""
    if folder.exists():
        shutil.rmtree(_aside(folder), ignore_errors=True)
    _sweep_drafts(folder)


def _sweep_drafts(place: Path) -> None:
    for path in place.parent.iterdir():
        if path.name.startswith(f".{place.name}.draft-"):
            with suppress(OSError):  # claimed: its writer lives
                claim = _claim(path)
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
                _release(claim)


def _claim(place: Path) -> int | None:
    """Lock it until released or until its holder dies; OSError if another holds it."""
    if sys.platform == "win32":
        return None
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _release(claim: int | None) -> None:
    if claim is not None:
        os.close(claim)


def _flush(path: Path) -> None:
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
