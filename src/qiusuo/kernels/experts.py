"""The routed experts of a mixture: every token through its own few SwiGLU networks.

``experts_reference`` walks the experts and picks each one's tokens: the equation, as one reads it.
``experts_grouped`` sorts the (token, expert) pairs by expert once, so that every expert's rows are
one contiguous segment, runs one matrix product per segment, and adds the K results of a token in a
fixed order (no atomics: the same bits every time). Its backward pass is written by hand on the
sorted rows: nothing is gathered twice and the pair weights' gradient falls out on the way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.linear import FEW, few_rows, linear, tiles_for

# M tokens, K experts per token, P = M*K pairs, R rows (the pairs sorted, some of them padding),
# E experts, D hidden, F expert width, G = 2F.


def experts_reference(
    x_MD: Tensor, weights_MK: Tensor, indices_MK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over a token's experts of weight · down(silu(gate x) · up x) [M, D], expert by expert."""
    out_MD = torch.zeros_like(x_MD)
    for expert in range(gate_up_EGD.shape[0]):
        token, choice = torch.where(indices_MK == expert)
        gate, up = F.linear(x_MD[token], gate_up_EGD[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_EDF[expert])
        weighted = y * weights_MK[token, choice, None].to(y.dtype)
        out_MD = out_MD.index_add(0, token, weighted.to(out_MD.dtype))
    return out_MD


def experts_grouped(
    x_MD: Tensor,
    weights_MK: Tensor,
    indices_MK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    rows: int | None = None,
) -> Tensor:
    """As ``experts_reference``; under autocast the products run in the autocast type. ``rows`` as
    in ``linear``: products of always so many rows (without gradients)."""
    device = x_MD.device.type
    if rows is not None:
        return _experts_in_blocks(x_MD, weights_MK, indices_MK, gate_up_EGD, down_EDF, rows)
    library = tiles_for(x_MD, gate_up_EGD)
    if library is not None and down_EDF.is_contiguous():
        weights32_MK = weights_MK.float().contiguous()
        experts = ((gate_up_EGD, None), (down_EDF, None))
        return library.experts(x_MD.contiguous(), weights32_MK, indices_MK.contiguous(), *experts)
    if len(x_MD) == 1 and device == "cpu" and not torch.is_grad_enabled():
        return _experts_of_one(x_MD, weights_MK, indices_MK, gate_up_EGD, down_EDF)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_MD, gate_up_EGD, down_EDF = x_MD.to(dtype), gate_up_EGD.to(dtype), down_EDF.to(dtype)
    out_MD: Tensor = _GroupedExperts.apply(x_MD, weights_MK, indices_MK, gate_up_EGD, down_EDF)
    return out_MD


def _experts_of_one(
    x_1D: Tensor, weights_1K: Tensor, indices_1K: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """A single token: nothing to sort, its experts one after the other."""
    out_1D: Tensor | None = None
    for expert, weight in zip(indices_1K[0].tolist(), weights_1K[0].tolist(), strict=True):
        gate_1F, up_1F = linear(x_1D, gate_up_EGD[expert]).chunk(2, dim=-1)
        y_1D = linear(F.silu(gate_1F).mul_(up_1F).mul_(weight), down_EDF[expert])
        out_1D = y_1D if out_1D is None else out_1D.add_(y_1D)
    assert out_1D is not None
    return out_1D


def _experts_in_blocks(
    x_MD: Tensor,
    weights_MK: Tensor,
    indices_MK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    rows: int,
) -> Tensor:
    """Expert by expert, in products of ``rows``; a token's K results are added in its own order."""
    y_MKD = x_MD.new_empty(*indices_MK.shape, x_MD.shape[1])
    for expert in indices_MK.unique().tolist():
        token, choice = torch.where(indices_MK == expert)
        gate, up = linear(x_MD[token], gate_up_EGD[expert], rows=rows).chunk(2, dim=-1)
        y_MKD[token, choice] = linear(F.silu(gate) * up, down_EDF[expert], rows=rows)
    out_MD = torch.zeros_like(x_MD)
    for k in range(indices_MK.shape[1]):
        out_MD += y_MKD[:, k] * weights_MK[:, k, None].to(y_MKD.dtype)
    return out_MD


class _Layout(NamedTuple):
    """Where the pairs stand once sorted. ``place_P``: the row of each pair; ``token_R``: the token
    of each row; ``segments``: non-empty (expert, first row, last row + 1). Segments are rounded up
    to a few sizes; the rows between carry weight zero, so they add nothing anywhere."""

    place_P: Tensor
    token_R: Tensor
    segments: list[tuple[int, int, int]]


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weights_MK: Tensor,
        indices_MK: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        layout = sort_by_expert(indices_MK, gate_up_EGD.shape[0])
        x_RD = x_MD.index_select(0, layout.token_R)
        weight_R = x_RD.new_zeros(x_RD.shape[0], 1)
        weight_R[layout.place_P] = weights_MK.reshape(-1, 1).to(x_RD.dtype)
        h_RG = x_RD.new_empty(x_RD.shape[0], gate_up_EGD.shape[1])
        learning = any(ctx.needs_input_grad)
        for expert, start, stop in layout.segments:
            _product(x_RD[start:stop], gate_up_EGD[expert], h_RG[start:stop], learning)
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        act_RF = F.silu(gate_RF).mul_(up_RF)
        weighted_RF = act_RF * weight_R
        y_RD = torch.empty_like(x_RD)
        for expert, start, stop in layout.segments:
            _product(weighted_RF[start:stop], down_EDF[expert], y_RD[start:stop], learning)
        ctx.save_for_backward(
            x_RD, h_RG, act_RF, weight_R, layout.place_P, layout.token_R, gate_up_EGD, down_EDF
        )
        ctx.segments, ctx.weights_like = layout.segments, weights_MK
        return sum_choices(y_RD, layout.place_P, indices_MK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MD,) = grads
        x_RD, h_RG, act_RF, weight_R, place_P, token_R, gate_up_EGD, down_EDF = ctx.saved_tensors
        grad_RD = grad_MD.to(x_RD.dtype).index_select(0, token_R)
        weighted_RF = act_RF * weight_R
        grad_RF = torch.empty_like(act_RF)
        grad_down_EDF = torch.zeros_like(down_EDF)
        for expert, start, stop in ctx.segments:
            torch.mm(grad_RD[start:stop], down_EDF[expert], out=grad_RF[start:stop])
            torch.mm(grad_RD[start:stop].t(), weighted_RF[start:stop], out=grad_down_EDF[expert])
        grad_weight_R = (grad_RF * act_RF).sum(-1, dtype=torch.float32)
        grad_RF *= weight_R
        grad_h_RG = _swiglu_backward(grad_RF, h_RG)
        grad_x_RD = torch.empty_like(x_RD)
        grad_gate_up_EGD = torch.zeros_like(gate_up_EGD)
        for expert, start, stop in ctx.segments:
            torch.mm(grad_h_RG[start:stop], gate_up_EGD[expert], out=grad_x_RD[start:stop])
            torch.mm(grad_h_RG[start:stop].t(), x_RD[start:stop], out=grad_gate_up_EGD[expert])
        weights_MK = ctx.weights_like
        grad_weights_MK = grad_weight_R[place_P].view_as(weights_MK).to(weights_MK.dtype)
        grad_x_MD = sum_choices(grad_x_RD, place_P, weights_MK.shape[1])
        return grad_x_MD, grad_weights_MK, None, grad_gate_up_EGD, grad_down_EDF


def _product(x_RI: Tensor, weight_OI: Tensor, out_RO: Tensor, learning: bool) -> None:
    """x Wᵀ into ``out``."""
    if learning or len(x_RI) > FEW or x_RI.device.type != "cpu" or x_RI.dtype is torch.float32:
        torch.mm(x_RI, weight_OI.t(), out=out_RO)
    else:
        out_RO.copy_(few_rows(x_RI, weight_OI))


def _swiglu_backward(grad_RF: Tensor, h_RG: Tensor) -> Tensor:
    """Gradient of [gate, up] from that of silu(gate) · up; ``grad_RF`` is used up."""
    gate_RF, up_RF = h_RG.chunk(2, dim=-1)
    grad_h_RG = torch.empty_like(h_RG)
    grad_gate_RF, grad_up_RF = grad_h_RG.chunk(2, dim=-1)
    torch.mul(grad_RF, F.silu(gate_RF), out=grad_up_RF)
    grad_gate_RF.copy_(torch.ops.aten.silu_backward(grad_RF.mul_(up_RF), gate_RF))
    return grad_h_RG


def sort_by_expert(indices_MK: Tensor, experts: int) -> _Layout:
    expert_P = indices_MK.flatten()
    order_P = torch.argsort(expert_P, stable=True)
    segments, shifts, start, shift = [], [], 0, 0
    for expert, count in enumerate(torch.bincount(expert_P, minlength=experts).tolist()):
        shifts.append(shift)
        rows = _round_up(count)
        if rows:
            segments.append((expert, start, start + rows))
        start += rows
        shift += rows - count
    place_sorted_P = torch.arange(order_P.numel(), device=order_P.device)
    place_sorted_P += torch.tensor(shifts, device=order_P.device)[expert_P[order_P]]
    place_P = torch.empty_like(order_P)
    place_P[order_P] = place_sorted_P
    token_R = order_P.new_zeros(start)
    token_R[place_sorted_P] = order_P // indices_MK.shape[1]
    return _Layout(place_P, token_R, segments)


def _round_up(count: int) -> int:
    """The next of eight sizes per doubling. PyTorch's bf16 products compile code for every new
    shape (about 1 ms each); an expert's token count is new at every step, these sizes are not."""
    if count <= 16:
        return count
    grain = 1 << (count.bit_length() - 4)
    return -(-count // grain) * grain


def sum_choices(y_RD: Tensor, place_P: Tensor, choices: int) -> Tensor:
    """Bring sorted rows home and add each token's K of them, always in the same order."""
    y_PD = y_RD.index_select(0, place_P)
    return y_PD if choices == 1 else y_PD.unflatten(0, (-1, choices)).sum(1)
