"""The bytes before the weights of a GGUF file: metadata, then a table of tensors.

All is little-endian: a magic, a version, two counts, the metadata as (name, type, value), the
table as (name, dimensions, type, place), and from the next multiple of the alignment the weights.
Every length is held against the size of the file before anything is made of it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qiusuo.checkpoint.files import CheckpointError

MAGIC = b"GGUF"
VERSION = 3
READABLE_VERSIONS = (2, 3)
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_DIMENSIONS = 4

STRING, ARRAY = 8, 9
# Number types of metadata: their letters in `struct` and for numpy.
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7


@dataclass(frozen=True)
class Entry:
    """A tensor's place. ``shape`` as PyTorch counts it, the width last; ``offset`` from the
    beginning of the weights."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of ``shape[-1]`` numbers."""
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Header:
    """Metadata as plain values, tensors by name, and where the weights begin in the file."""

    metadata: Mapping[str, Any]
    tensors: dict[str, Entry]
    start: int


class Metadata(Mapping[str, Any]):
    """Lists, and a vocabulary is three long ones, stay in the file until they are asked for:
    nothing holds them while weights are loaded."""

    def __init__(self, reader: _Reader, count: int) -> None:
        self._reader = reader
        self._values: dict[str, Any] = {}
        self._lists: dict[str, int] = {}
        for _ in range(count):
            name = reader.string()
            kind = reader.number("I")
            self._lists.pop(name, None)  # the last of two counts
            if kind == ARRAY:
                self._lists[name], self._values[name] = reader.position, None
                reader.skip_list(name)
            else:
                self._values[name] = reader.value(kind, name)

    def __getitem__(self, name: str) -> Any:
        if name not in self._lists:
            return self._values[name]
        reader = self._reader
        reader.position = self._lists[name]
        found = reader.values(name)
        give_back(reader.data)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def give_back(data: mmap.mmap) -> None:
    """Let go of all pages of a mapped file, those too that the kernel fetched beside what was
    read; they come again when asked for."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        data.madvise(mmap.MADV_DONTNEED)


# Reading


def read_header(path: Path, data: mmap.mmap) -> Header:
    """The header of a mapped file. CheckpointError if it is no GGUF file or not all there."""
    if data[:4] != MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file: it begins with {data[:4]!r}, not b'GGUF'"
        )
    reader = _Reader(path, data)
    reader.position = 4
    version = reader.number("I")
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{path} is GGUF version {version}; only the little-endian versions 2 and 3 are read"
        )
    tensors, fields = reader.number("Q"), reader.number("Q")
    metadata = Metadata(reader, fields)
    entries = [_entry(path, reader) for _ in range(tensors)]
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path}: {ALIGNMENT_KEY} is {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    give_back(data)
    return Header(metadata, _checked(path, entries, len(data) - start), start)


def _entry(path: Path, reader: _Reader) -> Entry:
    name, dimensions = reader.string(), reader.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: {name} has {dimensions} dimensions; expected 1 to 4")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    number, offset = reader.number("I"), reader.number("Q")
    try:
        kind = GGMLQuantizationType(number).name
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} is of type {number}, which is not known") from error
    block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    if min(shape) < 1 or shape[-1] % block:
        raise CheckpointError(f"{path}: {name} of type {kind} cannot have the shape {shape}")
    return Entry(name, shape, kind, offset)


def _checked(path: Path, entries: list[Entry], size: int) -> dict[str, Entry]:
    tensors: dict[str, Entry] = {}
    for entry in entries:
        if entry.offset + entry.nbytes > size:
            raise CheckpointError(
                f"{path} is cut short: {entry.name} needs {entry.offset + entry.nbytes} bytes of "
                f"weights and the file holds {max(size, 0)}; download it again"
            )
        if tensors.setdefault(entry.name, entry) is not entry:
            raise CheckpointError(f"{path} holds {entry.name} twice")
    return tensors


class _Reader:
    """Walks through the mapped file; what would lie beyond its end is an error."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def take(self, size: int) -> int:
        """The place of the next ``size`` bytes."""
        place = self.position
        if size > len(self.data) - place:
            raise CheckpointError(f"{self.path} is cut short: it ends within its header")
        self.position += size
        return place

    def number(self, letter: str) -> Any:
        return struct.unpack_from("<" + letter, self.data, self.take(struct.calcsize(letter)))[0]

    def string(self) -> str:
        length = self.number("Q")
        place = self.take(length)
        try:
            return self.data[place : place + length].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: a text in the header is no UTF-8") from error

    def value(self, kind: int, name: str) -> Any:
        if kind == STRING:
            return self.string()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        raise CheckpointError(f"{self.path}: {name} is of type {kind}, which is not known")

    def values(self, name: str) -> list[Any]:
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            return [self.string() for _ in range(count)]
        letter = self._letter(inner, name)
        place = self.take(count * letter.itemsize)
        return np.frombuffer(self.data, letter, count, place).tolist()

    def skip_list(self, name: str) -> None:
        inner, count = self.number("I"), self.number("Q")
        if inner != STRING:
            self.take(count * self._letter(inner, name).itemsize)
            return
        for _ in range(count):
            self.take(self.number("Q"))

    def _letter(self, inner: int, name: str) -> np.dtype[Any]:
        if inner not in NUMBERS:  # lists of lists are allowed by the format and used by no one
            raise CheckpointError(f"{self.path}: {name} is a list of type {inner}, not known")
        return np.dtype(NUMBERS[inner]).newbyteorder("<")


# Writing


def header_bytes(metadata: Mapping[str, Any], tensors: Iterable[Entry]) -> bytes:
    """What ``read_header`` reads, padded up to the weights. Whole numbers are written as the type
    that llama.cpp asks for: unsigned where alone, signed in lists."""
    tensors = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for name, value in metadata.items():
        kind, content = _value(value)
        parts += _string(name), struct.pack("<I", kind), content
    for entry in tensors:
        parts += _string(entry.name), struct.pack("<I", len(entry.shape))
        parts += (struct.pack("<Q", size) for size in reversed(entry.shape))
        parts.append(struct.pack("<IQ", GGMLQuantizationType[entry.kind], entry.offset))
    content = b"".join(parts)
    return content + bytes(-len(content) % ALIGNMENT)


def _value(value: Any) -> tuple[int, bytes]:
    match value:
        case bool():
            return BOOL, struct.pack("<?", value)
        case int():
            return UINT32, struct.pack("<I", value)
        case float():
            return FLOAT32, struct.pack("<f", value)
        case str():
            return STRING, _string(value)
        case list():
            if value and isinstance(value[0], int):
                kind, content = INT32, struct.pack(f"<{len(value)}i", *value)
            else:
                kind, content = STRING, b"".join(map(_string, value))
            return ARRAY, struct.pack("<IQ", kind, len(value)) + content
    raise TypeError(f"GGUF metadata has no place for {value!r}")


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content
