"""A checkpoint as its readers and writers see it: a config, tensors by name, a tokenizer.

Whatever the format, a tensor is something with a shape that is read a few rows at a time, under
the name that Hugging Face's files give it. So one loader, one inventory and one writer for each
format do for all of them, and nothing ever holds more than a few rows beside what it fills.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.config import ModelConfig

if TYPE_CHECKING:
    from qiusuo.checkpoint.low_bit import LowBitFile

CHUNK_BYTES = 1 << 20  # as fast as 8 MB, and all that a reader and a writer hold of it is small
NO_SAMPLING: Mapping[str, float] = MappingProxyType({})
Progress = Callable[[int, int], None]
"""Called with bytes so far and bytes in all."""


class StoredTensor(Protocol):
    """A tensor of a checkpoint. ``kind`` is what its numbers are stored as ("BF16", "F8_E4M3",
    "Q4_K" ...), ``stored_bytes`` what they take there; ``place`` names it in messages."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def place(self) -> str: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the first dimension, in a type that holds them exactly (float32 for FP8 and
        quantised ones); the memory is the reader's until the next call."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` under the names of a Hugging Face folder: experts apart, MTP copies included
    where stored. ``read_tokenizer`` gives None where there is none. ``sampling``: the temperature,
    top_k and top_p that its makers recommend, as far as they say. ``low_bit``: the file of a
    quantised model, as a model in memory holds it; ``tensors`` then give the numbers meant."""

    place: Path
    format: str  # "Hugging Face", "GGUF" ...
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    read_tokenizer: Callable[[], Tokenizer | None]
    sampling: Mapping[str, float] = field(default_factory=dict)
    low_bit: LowBitFile | None = None

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.stored_bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor that a model holds already."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def kind(self) -> str:
        return KINDS[self.tensor.dtype]

    @property
    def stored_bytes(self) -> int:
        return self.tensor.nbytes

    @property
    def place(self) -> str:
        return self.name

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].detach().cpu()


def chunks(
    tensor: StoredTensor, row_multiple: int = 1, first: int = 0, count: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) over the whole tensor, or over ``count`` of its rows from ``first`` on:
    about ``CHUNK_BYTES`` of float32 at a time, a multiple of ``row_multiple`` rows but at the end.
    """
    end = tensor.shape[0] if count is None else first + count
    width = 4 * max(1, torch.Size(tensor.shape[1:]).numel())
    step = max(1, CHUNK_BYTES // (width * row_multiple)) * row_multiple
    for start in range(first, end, step):
        yield start, tensor.rows(start, min(start + step, end))


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The types of numbers that weights are stored as, by what safetensors and GGUF call them."""
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def kept_kind(kind: str) -> str:
    """What weights stored as ``kind`` are loaded and written as where nothing else is asked:
    the same if it can be computed with, else bfloat16."""
    return {"F64": "F32", "F32": "F32", "F16": "F16"}.get(kind, "BF16")


def narrowed(rows: Tensor, dtype: torch.dtype, place: str) -> Tensor:
    """``rows`` in ``dtype``. CheckpointError naming ``place`` if a finite number has become
    infinite; NaN and infinity stay what they are."""
    out = rows.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(rows.dtype).max and not out.isfinite().all():
        lost = rows[~out.isfinite() & rows.isfinite()]
        if len(lost):
            raise CheckpointError(
                f"{place} holds {lost[0].item():.6g}, beyond the largest number of "
                f"{str(dtype).removeprefix('torch.')}, {torch.finfo(dtype).max:g}: choose "
                "bfloat16 or float32"
            )
    return out
