"""A matrix times a few rows: what decoding does all day.

A few rows are bound by the bytes of the matrix. PyTorch reads them faster in a matrix-vector
product, and in bf16 in a product with the matrix on the left, than with it on the right as a layer
is written; the native kernel on AMX is faster than either for a large matrix (docs/log.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qiusuo.kernels.native import Native, native_for

# M rows, O out, I in.

FEW = 128
LARGE = 1 << 18  # numbers of a matrix, below which a call costs more than the product


def linear_reference(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The equation."""
    out = x @ weight_OI.T
    return out if bias_O is None else out + bias_O


def linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """As ``linear_reference`` for x [..., I], by the faster way for so many rows.

    With ``rows``, products are always of so many rows, some of them padding: the library sums in
    another order for another number of rows, and a row's result must not depend on the others."""
    if rows is not None:
        x_MI = x.reshape(-1, x.shape[-1])
        blocks = [F.linear(block, weight_OI, bias_O) for block in in_blocks(x_MI, rows)]
        return torch.cat(blocks)[: len(x_MI)].view(*x.shape[:-1], -1)
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != weight_OI.dtype:
        return F.linear(x, weight_OI, bias_O)
    x_MI = x.reshape(-1, x.shape[-1])
    library = tiles_for(x_MI, weight_OI)
    if library is not None:
        bias = None if bias_O is None else bias_O.float()
        return library.linear(x_MI.contiguous(), weight_OI, None, bias).view(*x.shape[:-1], -1)
    if not 0 < len(x_MI) <= FEW:
        return F.linear(x, weight_OI, bias_O)
    out_MO = few_rows(x_MI, weight_OI)
    if bias_O is not None:
        out_MO += bias_O
    return out_MO.view(*x.shape[:-1], -1)


def tiles_for(x_MI: Tensor, weight: Tensor) -> Native | None:
    """The native library where its AMX kernels take these in bfloat16, and are worth the call."""
    if weight.dtype is not torch.bfloat16 or x_MI.dtype is not torch.bfloat16 or not len(x_MI):
        return None
    if not weight.is_contiguous() or weight.shape[-1] * weight.shape[-2] < LARGE:
        return None
    library = native_for(x_MI)
    return library if library is not None and library.has_tiles else None


def few_rows(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """x Wᵀ [M, O] for up to ``FEW`` rows, on a CPU and without gradients."""
    if len(x_MI) == 1:
        return torch.mv(weight_OI, x_MI[0])[None]
    if x_MI.dtype is torch.float32:
        return F.linear(x_MI, weight_OI)
    return torch.mm(weight_OI, x_MI.t()).t().contiguous()


def in_blocks(x_MI: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Rows in blocks of exactly so many, the last filled up with zeros."""
    return F.pad(x_MI, (0, 0, 0, -len(x_MI) % rows)).split(rows)
