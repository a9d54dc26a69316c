"""The weights of a checkpoint as they are after a format: ours, or one of llama.cpp's.

The same matrices are taken in every format, those that `qiusuo quantize` takes, and the head and
`kv_b_proj` have 8 bits in all of them. llama.cpp's numbers come from its own quantiser, in the
wheel xllamacpp, which searches for its scales where Python's gguf only divides.

Formats need rows of whole blocks. Q8_0 and Q4_0 have 32 numbers in a block, Q4_K 256: as in
llama-quantize, rows that are not so long are Q5_0 instead of Q4_K, with a bit more a weight; in
MIXED they are Q4_0, with as many. Where even 32 does not divide them they stay bfloat16.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as from_gguf
from torch import Tensor

from qiusuo.checkpoint.calibration import Calibration
from qiusuo.checkpoint.stored import Checkpoint, StoredTensor
from qiusuo.checkpoint.tensors import Part, copies, disk_layout, meta_state
from qiusuo.kernels.low_bit import dequantize, quantize

EIGHT = ("lm_head.weight", "kv_b_proj.weight")  # in 8 bits where the rest has four
# What those are stored as, by what the rest is.
MIXED = "Q4_K and Q4_0"
FINER = dict.fromkeys(("Q8_0", "Q4_0", "Q4_K", MIXED), "Q8_0") | {
    "int8": "int8",
    "int4": "int8",
}
OURS = {"int8": 8, "int4": 4}


class Coded:
    """The weights of a checkpoint after they have been stored as ``kind``."""

    def __init__(self, kind: str, calibration: Calibration | None = None) -> None:
        self.kind, self.calibration = kind, calibration
        self.taken: dict[str, int] = {}  # numbers stored as each kind
        self.bits = 0.0

    def checkpoint(self, plain: Checkpoint) -> Checkpoint:
        tensors, parts = (
            dict(plain.tensors),
            dict(disk_layout(plain.config, meta_state(plain.config))),
        )
        for name in copies(plain.config):  # the same numbers again, in an MTP module
            tensors.pop(name, None)
        for name, tensor in tensors.items():
            if is_quantized(name):
                kind = FINER[self.kind] if name.endswith(EIGHT) else self.kind
                tensors[name] = self._through(tensor, kind, parts[name])
        return replace(plain, tensors=tensors)

    def _through(self, tensor: StoredTensor, kind: str, part: Part) -> StoredTensor:
        kind, columns = stored_kind(kind, tensor.shape[1]), tensor.shape[1]
        numbers = tensor.shape[0] * columns
        self.taken[kind] = self.taken.get(kind, 0) + numbers
        self.bits += numbers * bits_of(kind, columns)
        if kind in OURS and self.calibration is not None:
            matters = self.calibration.of(part)
            return _Through(tensor, lambda rows: dequantize(quantize(rows, OURS[kind], matters)))
        return _Through(tensor, CODERS.get(kind) or through_llama(kind))

    def facts(self) -> dict[str, float]:
        whole = sum(self.taken.values())
        own = sum(self.taken.get(kind, 0) for kind in {self.kind, FINER[self.kind]})
        if self.kind == MIXED:
            own = whole
        return {"bits per weight": self.bits / whole, "other types": 1 - own / whole}


def is_quantized(name: str) -> bool:
    """Attention, experts, MLPs and head; not routers, norms, embeddings, nor what joins MTP."""
    return name.endswith(("_proj.weight", "_with_mqa.weight", "lm_head.weight")) and (
        "eh_proj" not in name
    )


def stored_kind(kind: str, columns: int) -> str:
    if kind in CODERS:
        return kind
    if kind in ("Q4_K", MIXED):
        long = columns % 256 == 0
        kind = "Q4_K" if long else "Q5_0" if kind == "Q4_K" else "Q4_0"
    return "bfloat16" if columns % 32 else kind


def bits_of(kind: str, columns: int) -> float:
    if kind in OURS:
        coded = quantize(torch.zeros(1, columns), OURS[kind])
        return 8 * coded.nbytes / columns
    if kind == "bfloat16":
        return 16.0
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8 * size / numbers


CODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda rows: dequantize(quantize(rows, 8)),
    "int4": lambda rows: dequantize(quantize(rows, 4)),
    "bfloat16": lambda rows: rows,
}


def through_llama(kind: str) -> Callable[[Tensor], Tensor]:
    """By llama.cpp's own quantiser, which searches for its scales; Python's gguf only divides."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llama.cpp's quantisers are in the wheel xllamacpp: install it")
    [library] = Path(found.submodule_search_locations[0]).glob("xllamacpp*.so")
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    chunk.restype = ctypes.c_size_t
    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]

    def coder(rows: Tensor) -> Tensor:
        plain = rows.float().contiguous()
        height, columns = plain.shape
        coded = torch.empty(height, columns // block * size, dtype=torch.uint8)
        chunk(int(number), plain.data_ptr(), coded.data_ptr(), 0, height, columns, None)
        return torch.from_numpy(from_gguf(coded.numpy(), number))

    return coder


@dataclass(frozen=True)
class _Through:
    tensor: StoredTensor
    coder: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def kind(self) -> str:
        return "F32"

    @property
    def stored_bytes(self) -> int:
        return self.tensor.stored_bytes

    @property
    def place(self) -> str:
        return self.tensor.place

    def rows(self, start: int, stop: int) -> Tensor:
        return self.coder(self.tensor.rows(start, stop).float())
