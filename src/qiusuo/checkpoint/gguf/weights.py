"""The weights of a GGUF file: read in place a few rows at a time, and made.

A file is mapped into memory and never read whole: what a reader asks for is copied or dequantised,
and the pages it came from are given back, so that a file larger than memory can be walked through.
"""

from __future__ import annotations

import functools
import mmap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.gguf.header import Entry, Header, give_back
from qiusuo.checkpoint.stored import DTYPES, narrowed

PLAIN = {kind: DTYPES[kind] for kind in ("F32", "F16", "BF16")}
LARGEST_Q8_0 = 127 * 65504.0  # 127 steps of a float16 scale


class WeightFile:
    """A mapped GGUF file."""

    def __init__(self, path: Path, data: mmap.mmap, start: int) -> None:
        self.path, self.data, self.start = path, data, start

    def copy(self, offset: int, size: int) -> np.ndarray:
        """``size`` bytes at ``offset`` of the weights; the file's own pages are given back."""
        first = self.start + offset
        content = np.frombuffer(self.data, np.uint8, size, first).copy()
        give_back(self.data)
        return content


def file_tensors(path: Path, data: mmap.mmap, header: Header) -> dict[str, FileTensor]:
    """The tensors of a mapped file by their own names. CheckpointError for a type that cannot be
    read."""
    file = WeightFile(path, data, header.start)
    for entry in header.tensors.values():
        if not _readable(entry.kind):
            raise CheckpointError(
                f"{path}: {entry.name} is of type {entry.kind}, which cannot be read; use a file "
                "of another type, such as Q8_0, BF16 or Q4_K_M"
            )
    return {name: FileTensor(file, entry) for name, entry in header.tensors.items()}


@functools.cache
def _readable(kind: str) -> bool:
    try:
        decode(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file, or some matrices or rows of one."""

    file: WeightFile
    entry: Entry

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def kind(self) -> str:
        return self.entry.kind

    @property
    def stored_bytes(self) -> int:
        return self.entry.nbytes

    @property
    def place(self) -> str:
        return f"{self.file.path}: {self.name}"

    def rows(self, start: int, stop: int) -> Tensor:
        """In the stored type where that is a plain one, else dequantised to float32."""
        entry = self.entry
        if len(self.shape) == 1:
            return decode(self.file.copy(entry.offset, entry.nbytes)[None], self.kind)[
                0, start:stop
            ]
        count, step = stop - start, entry.nbytes // self.shape[0]
        if count == 0:
            return torch.empty((0, *self.shape[1:]), dtype=PLAIN.get(self.kind, torch.float32))
        content = self.file.copy(entry.offset + start * step, count * step)
        rows = decode(content.reshape(-1, entry.row_bytes), self.kind)
        return rows.view(count, *self.shape[1:])

    def matrix(self, index: int) -> FileTensor:
        """One of the matrices of a stack."""
        stack = self.part(index, index + 1)
        return replace(stack, entry=replace(stack.entry, shape=self.shape[1:]))

    def part(self, start: int, stop: int) -> FileTensor:
        """Only these rows of the first dimension."""
        step = self.stored_bytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return replace(
            self, entry=replace(self.entry, shape=shape, offset=self.entry.offset + start * step)
        )


def decode(rows: np.ndarray, kind: str) -> Tensor:
    """Stored rows (uint8 [rows, bytes]) as numbers."""
    if kind in PLAIN:
        return torch.from_numpy(rows).view(PLAIN[kind])
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType[kind]))


def encode(rows: Tensor, kind: str, place: str) -> bytes:
    """Numbers as they are stored; the width must be a multiple of the kind's blocks.
    CheckpointError naming ``place`` for numbers that ``kind`` cannot hold."""
    if kind in PLAIN:
        plain = narrowed(rows, PLAIN[kind], place).contiguous()
        return plain.view(torch.uint8).numpy().tobytes()
    if rows.numel() and not bool(rows.abs().amax() <= LARGEST_Q8_0):  # NaN is not, either
        raise CheckpointError(
            f"{place} holds NaN, infinity or a number beyond {LARGEST_Q8_0:g}, which {kind} "
            "cannot hold: choose bfloat16 or float32"
        )
    quantised: np.ndarray = quantize(rows.float().contiguous().numpy(), GGMLQuantizationType[kind])
    return quantised.tobytes()
