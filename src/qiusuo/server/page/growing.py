"""Files that grow by lines while they are read: each byte is read once, each line given whole.

A resumed run may have its log rewritten up to its last checkpoint. Another inode or a shorter file
says so, and what was known begins anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

CHUNK = 4 << 20  # bytes read at once
LONGEST_LINE = 64 << 20  # what is longer is no line of ours


class GrowingFile:
    """Whole new lines of the file at ``path``; ``end`` is where the next ones begin."""

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0
        self._identity: tuple[int, int] | None = None

    def chunk(self, most: int = CHUNK) -> tuple[int, bytes] | None:
        """(place, bytes) of about ``most`` new bytes ending in a newline; None where there are
        none yet."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._meet(None, 0)
            return None
        with file:
            status = os.fstat(file.fileno())
            self._meet((status.st_dev, status.st_ino), status.st_size)
            whole = _whole_lines(file, self.end, most)
        start, self.end = self.end, self.end + len(whole)
        return (start, whole) if whole else None

    def forget(self) -> None:
        """The lines before no longer hold: the file is another one."""

    def _meet(self, identity: tuple[int, int] | None, size: int) -> None:
        if self._identity is not None and (identity != self._identity or size < self.end):
            self.end = 0
            self.forget()
        self._identity = identity


class Tail(GrowingFile):
    """The lines after byte ``after``, for one reader of a live stream; None: what comes from now
    on. ``rewritten``: they were given from the file's beginning, as it has become another one."""

    def __init__(self, path: Path, after: int | None) -> None:
        super().__init__(path)
        self.rewritten = False
        while after is None and self.chunk() is not None:
            continue
        if after is not None and path.is_file():
            status = path.stat()
            self._identity = (status.st_dev, status.st_ino)
            self.end = _line_start(path, after)

    def forget(self) -> None:
        self.rewritten = True


def _whole_lines(file: IO[bytes], start: int, most: int) -> bytes:
    """Bytes from ``start`` to a newline: at least one line, if it is whole."""
    file.seek(start)
    data = file.read(most)
    while (cut := data.rfind(b"\n") + 1) == 0 and most <= len(data) < LONGEST_LINE:
        more = file.read(most)
        if not more:
            break
        data += more
    return data[:cut]


def _line_start(path: Path, place: int) -> int:
    """``place``, or the start of the next line where it is in the midst of one."""
    size = path.stat().st_size
    if not 0 < place <= size:
        return place  # behind the end: ``_meet`` sees that the file became shorter
    with path.open("rb") as file:
        file.seek(place - 1)
        while line := file.readline(CHUNK):
            if line.endswith(b"\n"):
                break
        return file.tell()
