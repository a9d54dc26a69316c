"""How a file survives a kill: write beside it, sync, rename.

A rename inside one file system is all or nothing, so a reader sees the old file or the new
one, never half of one. `fsync` before the rename makes that true after a power cut too. All
that a run folder must not lose goes through here.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qiusuo.runs.words import format_bytes

TEMPORARY = ".partial-"  # every unfinished file or folder of ours begins with this

_FULL = {errno.ENOSPC, errno.EDQUOT}
_TORCH_HINTS = ("iostream error", "unexpected pos", "writing file", "file write failed")


class RunError(RuntimeError):
    """A run folder cannot do what was asked; the message names the thing and the remedy."""


def write_text(path: Path, text: str, *, sync: bool = True) -> Path:
    """Replace the file at `path` by `text` (UTF-8), wholly or not at all.

    With `sync=False` a power cut may lose the new text (never tear it): for files that are
    rewritten often and matter little. Raises RunError when the disk is full.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
        if sync:
            sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error, path.parent):
            raise disk_full(path, "the file's earlier version is intact") from error
        raise
    return path


def write_json(path: Path, value: Any, *, sync: bool = True) -> Path:
    """Replace the file at `path` by `value` as indented JSON; see `write_text`."""
    text = json.dumps(to_json(value), ensure_ascii=False, indent=2, allow_nan=False)
    return write_text(path, text + "\n", sync=sync)


def read_json(path: Path) -> Any:
    """The JSON value in `path`; RunError names the file when it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); restore or delete it") from error


def to_json(value: Any) -> Any:
    """`value` in JSON's types: tensors, arrays and their scalars know `tolist`.

    What is not finite becomes "NaN", "Infinity" or "-Infinity": JSON has no such numbers.
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def sync_directory(folder: Path) -> None:
    """Make the names in `folder` durable, not only the bytes behind them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and itself, durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                sync_directory(path)  # fsync cares about the inode, not about its kind
        sync_directory(Path(parent))


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether `error` came from a full disk, whoever raised it.

    safetensors (Rust) keeps only the words of the system's error. `torch.save` keeps not even
    those, only "iostream error" or "unexpected pos", which count when next to nothing is left.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    words = str(error)
    if "No space left on device" in words or "os error 28" in words:
        return True
    vague = isinstance(error, RuntimeError) and any(hint in words for hint in _TORCH_HINTS)
    return vague and shutil.disk_usage(folder).free < 8 << 20


def disk_full(path: Path, intact: str, unfinished: Path | None = None) -> RunError:
    """The error for a full disk: what could not be written, what is free, what still stands.

    `unfinished` is the file or folder about to be removed: its room counts as free.
    """
    free = shutil.disk_usage(path.parent).free
    for entry in [unfinished, *unfinished.rglob("*")] if unfinished else ():
        free += entry.stat().st_blocks * 512
    room = format_bytes(free)
    return RunError(
        f"the disk is full: could not write {path} ({room} free without it); {intact}. "
        "Free some space and resume."
    )
