"""The safetensors format: a header of names, types and places, then the numbers.

Read and written here and not through the library, for memory: the library maps a whole file, whose
pages then count as the process's own, and writes only what is all in memory at once. Here a reader
takes a few rows, a writer gives a few, and a file of any size costs a few megabytes. Every header
is checked against its file before a number is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.stored import DTYPES

FILE_DTYPES = DTYPES | {  # what a file may hold; of these no weights are made
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100_000_000  # the library's own limit


# -- reading ------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file (a ``StoredTensor``); the file is open while it is read."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def place(self) -> str:
        return f"{self.path}: {self.name}"

    @property
    def stored_bytes(self) -> int:
        return math.prod(self.shape) * FILE_DTYPES[self.kind].itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        dtype, width = FILE_DTYPES[self.kind], math.prod(self.shape[1:])
        out = torch.empty((stop - start, *self.shape[1:]), dtype=dtype)
        if out.numel() == 0:
            return out
        buffer = out.view(torch.uint8).numpy().reshape(-1).data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * width * dtype.itemsize)
            if not _fill(file, buffer):
                raise CheckpointError(f"{self.place} cannot be read to its end: the file shrank")
        return out


def read_header(path: Path) -> dict[str, FileTensor]:
    """Every tensor of a file by name, each checked to lie inside it. CheckpointError otherwise."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise CheckpointError(
                f"{path} is damaged, cut short or not a safetensors file: its header would be "
                f"{length:,} bytes, the file has {size:,}"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that cannot be read: {error!r}") from error
    _check_places(path, tensors, 8 + length, size)
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands there twice")
        found[name] = value
    return found


def _check_places(path: Path, tensors: dict[str, FileTensor], start: int, size: int) -> None:
    """The format's own rule: tensors fill the file from the header to its end, without a hole."""
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.stored_bytes)):
        if (stop := tensor.offset + tensor.stored_bytes) > size:
            raise CheckpointError(
                f"{path} is cut short: {tensor.name} ends at byte {stop:,} of {size:,}"
            )
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: {tensor.name} begins at byte {tensor.offset:,}, but what stands before "
                f"it ends at {end:,}"
            )
        end = stop
    if end != size:
        raise CheckpointError(f"{path} goes on to byte {size:,}, but its tensors end at {end:,}")


def _entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> FileTensor:
    kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))  # no bool
    if kind not in FILE_DTYPES or not whole:
        raise CheckpointError(f"{path}: {name} has type {kind!r} and shape {shape}, unknown here")
    tensor = FileTensor(path, name, kind, tuple(shape), data_start + start)
    if stop - start != tensor.stored_bytes:
        raise CheckpointError(
            f"{path}: {name} of type {kind} and shape {shape} needs {tensor.stored_bytes:,} bytes, "
            f"the header gives it {stop - start:,}"
        )
    return tensor


def _fill(file: BinaryIO, buffer: memoryview) -> bool:
    while len(buffer):
        got = file.readinto(buffer)  # type: ignore[attr-defined]
        if not got:
            return False
        buffer = buffer[got:]
    return True


# -- writing ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A tensor that a file will have."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * FILE_DTYPES[self.kind].itemsize


@dataclass(frozen=True)
class Outgoing(Planned):
    """A tensor to write: ``pieces`` gives its numbers in order, in the type of ``kind``."""

    pieces: Callable[[], Iterable[Tensor]]


def write_file(path: Path, tensors: Sequence[Outgoing], wrote: Callable[[int], None]) -> None:
    """Write one file; ``wrote`` is told of every piece's bytes. OSError where the disk refuses."""
    with path.open("wb") as file:
        file.write(encode_header(tensors))
        for tensor in tensors:
            _write_pieces(file, tensor, wrote)


def encode_header(tensors: Sequence[Planned], multiple: int = 8) -> bytes:
    """What stands before the tensors' numbers, which begin at a multiple of so many bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        offsets = [start, start + tensor.bytes]
        entry = {"dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": offsets}
        header[tensor.name] = entry
        start += tensor.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    return len(text).to_bytes(8, "little") + text


def _write_pieces(file: BinaryIO, tensor: Outgoing, wrote: Callable[[int], None]) -> None:
    written = 0
    for piece in tensor.pieces():
        assert piece.dtype == FILE_DTYPES[tensor.kind], tensor.name
        content = piece.contiguous().view(-1).view(torch.uint8).numpy().data
        file.write(content)
        written += len(content)
        wrote(len(content))
    assert written == tensor.bytes, tensor.name
