"""How a token's row stands in the cache: as the model's numbers, or rounded to int8.

Fewer bytes a row are a longer context in the same memory. Reading less of it for every token makes
decoding hardly faster: what memory saves, unpacking takes (docs/log.md). An int8 row holds

    codes    of the ``rounded`` numbers, a byte each, filled up to whole blocks of 32
    exact    the other numbers, in the model's type
    scales   a bfloat16 for each block; a number is scale · code
    filling  to whole 32 bytes

For DeepSeek-V3 that is 512 + 128 + 32 = 672 bytes where bfloat16 takes 1,152. A block of 32 leaves
less error than one of 64 or 128 and costs nothing here: with fewer scales the filling is larger.
The scale is bfloat16 and not float16 because it needs a wide range (a latent is of any size) and
no exact place: codes are found with the rounded scale, so no number is off by more than half a
step. MLA's rope key stays as it is: all heads share its 64 numbers, and the fast turning ones say
which of two neighbours is meant. Keys and values of the dense models are all rounded.

A row's bytes depend on its own numbers alone, and native and PyTorch's arithmetic give the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qiusuo.kernels.native import KINDS, Native, native

# N rows of Z numbers, or W bytes; S rows of the cache, c numbers of a block, n blocks of a row.

BLOCK = 32
ALIGNED = 32  # bytes: a block's codes then never lie in two lines of the processor's cache


class Rows(Protocol):
    """``width``: elements of type ``stored`` that a row takes."""

    @property
    def width(self) -> int: ...
    @property
    def stored(self) -> torch.dtype: ...

    def keep(self, rows_NZ: Tensor, entries_SW: Tensor, slots_N: Tensor) -> None:
        """Write rows into the cache's rows ``slots``."""
        ...

    def read(self, entries_W: Tensor) -> Tensor:
        """The numbers [..., Z] that rows of the cache [..., W] mean."""
        ...


def row_bytes(rows: Rows) -> int:
    return rows.width * rows.stored.itemsize


@dataclass(frozen=True)
class PlainRows:
    width: int
    stored: torch.dtype

    def keep(self, rows_NZ: Tensor, entries_SW: Tensor, slots_N: Tensor) -> None:
        entries_SW.index_copy_(0, slots_N, rows_NZ.to(self.stored))

    def read(self, entries_W: Tensor) -> Tensor:
        return entries_W


@dataclass(frozen=True)
class Int8Rows:
    """``rounded`` numbers in int8 and then ``exact`` ones in ``dtype``, which is also what is read.
    A block with a number that is not finite is read as NaN."""

    rounded: int
    exact: int
    dtype: torch.dtype
    stored = torch.uint8

    @cached_property
    def blocks(self) -> int:
        return -(-self.rounded // BLOCK)

    @cached_property
    def scales_at(self) -> int:
        return self.blocks * BLOCK + self.exact * self.dtype.itemsize

    @cached_property
    def width(self) -> int:
        return -(-(self.scales_at + 2 * self.blocks) // ALIGNED) * ALIGNED

    def keep(self, rows_NZ: Tensor, entries_SW: Tensor, slots_N: Tensor) -> None:
        rows_NZ = rows_NZ.to(self.dtype)
        library = self._library(entries_SW)
        if library is None:
            entries_SW.index_copy_(0, slots_N, self.rows_reference(rows_NZ))
        else:
            library.keep_rows(rows_NZ, entries_SW, slots_N, self.rounded)

    def read(self, entries_W: Tensor) -> Tensor:
        library = self._library(entries_W)
        if library is None:
            return self.numbers_reference(entries_W)
        flat = entries_W.reshape(-1, self.width)
        rows_NZ = library.unpack_rows(flat, self.rounded, self.exact, self.dtype)
        return rows_NZ.view(*entries_W.shape[:-1], -1)

    def _library(self, entries: Tensor) -> Native | None:
        if entries.device.type != "cpu" or self.dtype not in KINDS:
            return None
        return native()

    def rows_reference(self, rows_NZ: Tensor) -> Tensor:
        """Bytes [N, W] of rows [N, Z] of type ``dtype``."""
        rounded_NX, exact_NY = rows_NZ.split((self.rounded, self.exact), -1)
        padded = F.pad(rounded_NX.float(), (0, -self.rounded % BLOCK))
        blocks_Nnc = padded.unflatten(-1, (self.blocks, BLOCK))
        most_Nn1 = blocks_Nnc.abs().amax(-1, keepdim=True)
        finite_Nn1 = most_Nn1.isfinite()
        unknown = torch.tensor(torch.nan, dtype=torch.bfloat16, device=rows_NZ.device)
        scales_Nn1 = torch.where(finite_Nn1, (most_Nn1 / 127).bfloat16(), unknown)
        divisor_Nn1 = torch.where(finite_Nn1 & (scales_Nn1 != 0), scales_Nn1.float(), 1)
        levels_Nnc = torch.where(finite_Nn1, blocks_Nnc / divisor_Nn1, 0)
        codes_Nnc = levels_Nnc.round().clamp(-127, 127).to(torch.int8)
        parts = (
            codes_Nnc.flatten(-2).view(torch.uint8),
            exact_NY.contiguous().view(torch.uint8),
            scales_Nn1.flatten(-2).view(torch.uint8),
        )
        filling = self.width - self.scales_at - 2 * self.blocks
        return F.pad(torch.cat(parts, -1), (0, filling))

    def numbers_reference(self, entries_W: Tensor) -> Tensor:
        """Numbers [..., Z] of bytes [..., W]."""
        ends = (self.blocks * BLOCK, self.scales_at, self.scales_at + 2 * self.blocks)
        codes, exact, scales = (
            part.contiguous() for part in entries_W[..., : ends[2]].tensor_split(ends[:2], -1)
        )
        levels_nc = codes.view(torch.int8).float().unflatten(-1, (self.blocks, BLOCK))
        numbers = levels_nc * scales.view(torch.bfloat16).float()[..., None]
        rounded_X = numbers.flatten(-2)[..., : self.rounded].to(self.dtype)
        return torch.cat((rounded_X, exact.view(self.dtype)), -1)
