"""Every head's rows times a matrix of its own: the two halves of absorbed MLA.

A decoding step does it with one row a head: as much reading of the weights as a layer's other
products, in pieces so small that PyTorch's batched product reads them at a third of the speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qiusuo.kernels.low_bit import LowBit, dequantize
from qiusuo.kernels.native import native_for

# B batch, T tokens, M = B*T, H heads, I in, O out.

FEW = 32  # rows of a head; for more, PyTorch's product is faster than a kernel without tiles


def per_head_reference(x_BTHI: Tensor, weight_HOI: Tensor | LowBit) -> Tensor:
    """x[h] W[h]ᵀ of every head [B, T, H, O]."""
    if isinstance(weight_HOI, LowBit):
        weight_HOI = dequantize(weight_HOI)
    x_HMI = x_BTHI.flatten(0, 1).transpose(0, 1)
    out_HMO = torch.bmm(x_HMI, weight_HOI.to(x_HMI.dtype).transpose(1, 2))
    return out_HMO.transpose(0, 1).unflatten(0, x_BTHI.shape[:2])


def per_head(x_BTHI: Tensor, weight_HOI: Tensor | LowBit) -> Tensor:
    """As ``per_head_reference``."""
    library = native_for(x_BTHI)
    if library is not None and not library.has_tiles and x_BTHI.shape[:2].numel() > FEW:
        library = None
    if isinstance(weight_HOI, LowBit):
        parts: tuple[Tensor, Tensor | None] = weight_HOI.codes, weight_HOI.scales
    else:
        parts = weight_HOI, None
        if weight_HOI.dtype is not torch.bfloat16 or not weight_HOI.is_contiguous():
            library = None
    if library is None:
        return per_head_reference(x_BTHI, weight_HOI)
    return library.heads(x_BTHI.flatten(0, 1).contiguous(), *parts).unflatten(0, x_BTHI.shape[:2])
