"""A matrix times a few rows: what decoding does all day.

One row is bound by the bytes of the matrix, and PyTorch's matrix-vector product reads them faster
than its matrix-matrix product does (docs/log.md). Low-bit weights will find their place here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# M rows, O out, I in.


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
    one_row = x.numel() == weight_OI.shape[1] and x.dtype == weight_OI.dtype
    if not one_row or x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight_OI, bias_O)
    out_O = torch.mv(weight_OI, x.reshape(-1))
    if bias_O is not None:
        out_O += bias_O
    return out_O.view(*x.shape[:-1], -1)


def in_blocks(x_MI: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Rows in blocks of exactly so many, the last filled up with zeros."""
    return F.pad(x_MI, (0, 0, 0, -len(x_MI) % rows)).split(rows)
