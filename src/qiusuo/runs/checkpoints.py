"""Checkpoints that are whole or absent, whatever kills the process that writes them.

A checkpoint is filled under a temporary name, every byte is synced, and one rename gives it
its own: whoever sees `step-00001234` may trust it. Deleting goes the other way, the name first.
These functions take the `checkpoints` folder; `RunFolder` holds the lock around them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qiusuo.runs.durable import TEMPORARY, disk_full, is_disk_full, sync_directory, sync_tree

_STEP = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(re.escape(TEMPORARY) + r"replaced-(step-\d{8,})")


@contextmanager
def write_checkpoint(parent: Path, step: int) -> Iterator[Path]:
    """Fill the folder that this yields; on success it becomes the checkpoint of `step`.

    On any error nothing of it remains and earlier ones are untouched; a full disk becomes a
    RunError. A checkpoint of the same step is replaced.
    """
    name = f"step-{step:08d}"
    final = parent / name
    temporary = parent / f"{TEMPORARY}{name}"
    replaced = parent / f"{TEMPORARY}replaced-{name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync_directory(parent)
    except BaseException as error:
        _restore_replaced(parent)
        full = None
        if is_disk_full(error, parent):  # asked while the disk still is full
            full = disk_full(final, _last_good(parent), temporary)
        _discard(temporary)
        if full:
            raise full from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Remove `folder` and give its room back at once.

    A writer that failed may still hold its file open, and a deleted file keeps its blocks
    until it is closed; an emptied one does not. The next, smaller save needs that room.
    """
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):
                os.truncate(path, 0)
    shutil.rmtree(folder, ignore_errors=True)


def list_checkpoints(parent: Path) -> list[tuple[int, Path]]:
    """Every whole checkpoint as (step, path), the earliest first."""
    if not parent.is_dir():
        return []
    found = ((_STEP.fullmatch(path.name), path) for path in parent.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def prune_checkpoints(parent: Path, keep: int, protect: Collection[int]) -> list[int]:
    """Delete all but the last `keep` (at least one) and the steps in `protect`.

    Returns the steps deleted.
    """
    deleted = []
    for step, path in list_checkpoints(parent)[: -max(keep, 1)]:
        if step not in protect:
            doomed = path.with_name(f"{TEMPORARY}deleted-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed)
            deleted.append(step)
    return deleted


def clean_leftovers(folder: Path) -> None:
    """Remove what a killed process left unfinished in `folder`, files as well as folders."""
    _restore_replaced(folder)
    for entry in folder.glob(f"{TEMPORARY}*"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _restore_replaced(parent: Path) -> None:
    """Put back a checkpoint that was set aside for a successor that never came."""
    for entry in parent.glob(f"{TEMPORARY}replaced-*"):
        match = _REPLACED.fullmatch(entry.name)
        if match and not (parent / match[1]).exists():
            entry.rename(parent / match[1])


def _last_good(parent: Path) -> str:
    known = list_checkpoints(parent)
    if not known:
        return "there is no earlier checkpoint"
    return f"the last good checkpoint, {known[-1][1].name}, is intact"
