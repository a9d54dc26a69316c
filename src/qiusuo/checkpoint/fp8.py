"""DeepSeek's FP8 weights: e4m3 numbers with one float32 scale for every block of 128×128.

A weight [out, in] has its scales [⌈out/128⌉, ⌈in/128⌉] beside it as ``weight_scale_inv``; the
number meant is ``fp8 · scale``. Blocks at the right and lower edge are as small as what is left.
(DeepSeek-V3, arXiv:2412.19437 §3.3 and README_WEIGHTS; activations are another matter, not stored.
How numbers are rounded is the business of kernels/fp8.py.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.stored import StoredTensor
from qiusuo.kernels.fp8 import BLOCK

# N rows, C columns, n and c blocks of them.

SCALE = "_scale_inv"
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
# Projections of attention and of (routed and shared) experts; the router, the embedding, the head,
# the norms and an MTP module's eh_proj stay in bf16, as in DeepSeek's own files.
_PROJECTION = re.compile(r"\.(self_attn|mlp)\.(.+\.)?\w+_proj(_with_mqa)?\.weight$")


def is_quantized_name(name: str) -> bool:
    """Whether DeepSeek stores the tensor of that name in FP8."""
    return _PROJECTION.search(name) is not None


@dataclass(frozen=True)
class Fp8Tensor:
    """A weight and its scales as one ``StoredTensor`` of exact float32 products."""

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def kind(self) -> str:
        return self.weight.kind

    @property
    def stored_bytes(self) -> int:
        return self.weight.stored_bytes + self.scale.stored_bytes

    @property
    def place(self) -> str:
        return self.weight.place

    def rows(self, start: int, stop: int) -> Tensor:
        high, wide = self.block
        first = start // high
        scale_nc = self.scale.rows(first, -(-stop // high)).float()
        scale_nC = scale_nc.repeat_interleave(wide, 1)[:, : self.shape[1]]
        numbers_NC = self.weight.rows(start, stop).float()
        for block, scale_C in enumerate(scale_nC, start=first):
            numbers_NC[max(block * high - start, 0) : (block + 1) * high - start] *= scale_C
        return numbers_NC


def pair_scales(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None
) -> dict[str, StoredTensor]:
    """The tensors with every FP8 weight joined with its scales, which are then no names of their
    own. CheckpointError for a weight without scales, scales without a weight, a wrong shape, or a
    ``quantization_config`` of another method."""
    quantization = quantization or {"quant_method": "fp8"}
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"quantization_config must be an object, not {quantization!r}")
    method = quantization.get("quant_method")
    if method != "fp8":
        raise CheckpointError(
            f"quantization_config.quant_method {method!r} is not read; expected 'fp8', or the "
            "checkpoint in bf16, or a GGUF of it"
        )
    block = quantization.get("weight_block_size") or (BLOCK, BLOCK)
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(f"weight_block_size must be two positive numbers, not {block!r}")
    paired: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            weight = tensors.get(name.removesuffix(SCALE))
            if weight is None or weight.kind != "F8_E4M3":
                raise CheckpointError(f"{tensor.place} stands beside no FP8 weight")
        elif tensor.kind.startswith("F8"):
            paired[name] = _joined(tensor, tensors.get(name + SCALE), (block[0], block[1]))
        else:
            paired[name] = tensor
    return paired


def _joined(weight: StoredTensor, scale: StoredTensor | None, block: tuple[int, int]) -> Fp8Tensor:
    if weight.kind != "F8_E4M3" or len(weight.shape) != 2:
        raise CheckpointError(
            f"{weight.place} is {weight.kind} of shape {weight.shape}; expected a matrix in F8_E4M3"
        )
    if scale is None:
        raise CheckpointError(
            f"{weight.place} is FP8, but its {SCALE.removeprefix('_')} is missing"
        )
    expected = tuple(math.ceil(n / b) for n, b in zip(weight.shape, block, strict=True))
    if scale.shape != expected or scale.kind not in ("F32", "BF16"):
        raise CheckpointError(
            f"{scale.place} is {scale.kind} of shape {scale.shape}; a weight of shape "
            f"{weight.shape} in blocks of {block} needs F32 of shape {expected}"
        )
    return Fp8Tensor(weight, scale, block)
