"""Beginnings that survive a restart: full pages of cache as files, one a page.

    <folder>/<mark>/<key>      the page's bytes over all layers, and a sha256 of key and bytes

The key stands for the namespace and every token up to the page's end (pages.py); the mark for all
else that the numbers depend on: config, weights, dtype, what entries are rounded to, page size,
tokenizer, drafter. So whoever finds a file may use it, and another model never looks at it. A page
is written as soon as it is full, which is a millisecond beside the passes that filled it, and is
there even if the process is killed in the next moment. Nothing is forced to the disk: after a power
cut a file may be broken, and its sum says so. Over the limit the files unused for longest go, other
models' too.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from qiusuo.engine.paged_cache import PagedCache
from qiusuo.engine.request import RequestError
from qiusuo.model.transformer import Transformer

FORMAT = "qiusuo prefix 1"
DIGEST = hashlib.sha256().digest_size
OURS = re.compile(r"[0-9a-f]{64}(\.\d+)?")  # with a number: being written, by that process
ABANDONED = 3600.0  # seconds after which a file that is being written has no writer any more
ROOM = 0.9  # of the limit is left after files were removed, so that this is rare
CHUNK = 1024  # words of 8 bytes that are added up


class DiskPrefix:
    """Pages of ``cache`` under ``folder``, for at most ``most`` bytes of files.

    Several processes may use one folder: files appear whole, and one that is gone is a page not
    found. Each counts what it writes itself and looks at the others' every sixteenth of the limit.
    """

    def __init__(self, folder: Path, most: int, mark: str, cache: PagedCache) -> None:
        self.folder, self.most, self.cache = folder, most, cache
        self.own = folder / mark
        self.size = sum(part.nbytes for part in cache.parts(0)) + DIGEST
        if most < self.size:
            raise RequestError(f"prefix_disk_bytes {most:,} is less than one page, {self.size:,}")
        self.full = False  # nothing more can be written
        self.unseen = 0  # bytes written since the folder was last looked at
        try:
            self.own.mkdir(parents=True, exist_ok=True, mode=0o700)  # it tells of what was asked
            self.used = self._trim(most)
        except OSError as error:
            reason = error.strerror
            raise RequestError(f"prefix_folder {folder} cannot be written: {reason}") from error

    # -- one page ---------------------------------------------------------------------------

    def keep(self, key: bytes, page: int) -> None:
        """A full page is in use: write it if it is not there. Never fails: a disk that cannot be
        written is left alone from then on, with one warning."""
        if self.full:
            return
        path = self._path(key)
        try:
            os.utime(path)
        except FileNotFoundError:
            self._write(path, key, page)
        except OSError as error:
            self._give_up(error)

    def read(self, key: bytes) -> Tensor | None:
        """The page's bytes, or None. A file that is not what was written is removed."""
        path = self._path(key)
        stored = torch.empty(self.size, dtype=torch.uint8)
        try:
            with path.open("rb", buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size == self.size
                whole = whole and file.readinto(stored.numpy().data) == self.size
        except OSError:
            return None
        data, digest = stored[:-DIGEST], stored[-DIGEST:]
        if not whole or _digest(key, data) != digest.numpy().tobytes():
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return data

    def restore(self, page: int, data: Tensor) -> None:
        """Put what ``read`` gave into a page of the cache."""
        start = 0
        for part in self.cache.parts(page):
            # A copy begins where its type may begin.
            entries = data[start : start + part.nbytes].clone().view(part.dtype)
            part.copy_(entries.view(part.shape))
            start += part.nbytes

    def _path(self, key: bytes) -> Path:
        return self.own / key.hex()

    def _write(self, path: Path, key: bytes, page: int) -> None:
        data = torch.cat([_bytes(part) for part in self.cache.parts(page)])
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            if self.used + self.size > self.most or self.unseen > self.most // 16:
                self.used = self._trim(self.most - self.size)
            with unfinished.open("wb", buffering=0) as file:
                for piece in (data.numpy().data, _digest(key, data)):
                    if file.write(piece) != len(piece):
                        raise OSError("the disk took only part of a page")
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            self._give_up(error)
            return
        self.used += self.size
        self.unseen += self.size

    def _give_up(self, error: OSError) -> None:
        self.full = True
        warnings.warn(
            f"{self.folder}: beginnings are no longer kept on disk ({error.strerror or error})",
            RuntimeWarning,
            stacklevel=2,
        )

    # -- all files --------------------------------------------------------------------------

    def _trim(self, most: int) -> int:
        """Bytes of files, after those unused for longest were removed if they were over ``most``.
        Only what is named as we name files is looked at: the folder may hold other things."""
        now, files, used = time.time(), [], 0
        for path in _files(self.folder):
            with suppress(OSError):
                known = path.stat()
                if path.suffix and now - known.st_mtime > ABANDONED:
                    path.unlink()
                    continue
                used += known.st_size
                if not path.suffix:
                    files.append((known.st_mtime_ns, known.st_size, path))
        self.unseen = 0
        if used <= most:
            return used
        for _, size, path in sorted(files):
            if used <= most * ROOM:
                break
            with suppress(FileNotFoundError):  # another process was faster
                path.unlink()
            used -= size
        return used


def _files(folder: Path) -> Iterable[Path]:
    with suppress(OSError):
        for own in folder.iterdir():
            if OURS.fullmatch(own.name) and own.is_dir() and not own.is_symlink():
                yield from (path for path in own.iterdir() if OURS.fullmatch(path.name))


def _digest(key: bytes, data: Tensor) -> bytes:
    digest = hashlib.sha256(key)
    digest.update(data.numpy().data)
    return digest.digest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8)


def model_mark(models: Iterable[Transformer], page_tokens: int, beside: str) -> str:
    """A name for all that the entries of a page depend on, 64 hexadecimal digits.

    Of the weights every byte counts, at the speed of memory: as 8-byte words in a table of 1024
    columns, the sums of rows and of columns (modulo 2^64) are hashed. A tensor that differs by
    training, by rounding or by the order of its rows has others. ``beside``: what the caller knows
    that models do not show, such as the tokenizer."""
    digest = hashlib.sha256(repr((FORMAT, page_tokens, beside)).encode())
    for model in models:
        digest.update(repr(model.config).encode())
        for name, tensor in model.state_dict().items():
            digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
            data = _bytes(tensor)
            words = data[: len(data) // (8 * CHUNK) * 8 * CHUNK].view(torch.int64).view(-1, CHUNK)
            for part in (words.sum(0), words.sum(1), data[words.nbytes :]):
                digest.update(part.numpy().data)
    return digest.hexdigest()
