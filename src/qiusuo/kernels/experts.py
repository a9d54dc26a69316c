"""The routed experts of a mixture: every token through its own few SwiGLU networks.

``experts_reference`` walks the experts and picks each one's tokens: the equation, as one reads it.
``experts_grouped`` sorts the (token, expert) pairs by expert once, so that every expert's rows are
one contiguous segment, runs one matrix product per segment, and adds the K results of a token in a
fixed order (no atomics: the same bits every time). Its backward pass is written by hand on the
sorted rows: nothing is gathered twice and the pair weights' gradient falls out on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.expert_rows import gather_rows, sort_by_expert, sum_choices
from qiusuo.kernels.linear import FEW, few_rows, linear, tiles_for
from qiusuo.kernels.swiglu import WeightedRows
from qiusuo.kernels.tile_mlp import fit_tiles, tile_experts, tiles_learn

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
    if tiles_learn(x_MD) and fit_tiles(gate_up_EGD, down_EDF):
        return tile_experts(x_MD, weights_MK, indices_MK, gate_up_EGD, down_EDF)
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
        weights_P = weights_MK.detach().flatten().to(_exact(x_MD.dtype))
        x_RD = gather_rows(x_MD, layout.pair_R, indices_MK.shape[1], gate_up_EGD.dtype)
        h_RG = x_RD.new_empty(x_RD.shape[0], gate_up_EGD.shape[1])
        learning = any(ctx.needs_input_grad)
        y_RD = torch.empty_like(x_RD)
        segments = layout.segments()
        for expert, start, stop in segments:
            own_RG = h_RG[start:stop]
            _product(x_RD[start:stop], gate_up_EGD[expert], own_RG, learning)
            weighted_RF = WeightedRows(own_RG, weights_P, layout.pair_R[start:stop]).weighted()
            _product(weighted_RF, down_EDF[expert], y_RD[start:stop], learning)
        if learning:
            kept = (x_RD, h_RG, weights_P, layout.place_P, layout.pair_R, gate_up_EGD, down_EDF)
            ctx.save_for_backward(*kept)
        ctx.segments, ctx.weights_like = segments, weights_MK
        return sum_choices(y_RD, layout.place_P, indices_MK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, h_RG, weights_P, place_P, pair_R, gate_up_EGD, down_EDF = ctx.saved_tensors
        weights_MK = ctx.weights_like
        choices = weights_MK.shape[1]
        grad_RD = gather_rows(grads[0], pair_R, choices, x_RD.dtype)
        grad_x_RD, grad_weights_P = torch.empty_like(x_RD), torch.empty_like(weights_P)
        grad_gate_up_EGD, grad_down_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
        for expert, start, stop in ctx.segments:  # one at a time, while its rows are in the cache
            toward_RD = grad_RD[start:stop]
            rows = WeightedRows(h_RG[start:stop], weights_P, pair_R[start:stop])
            grad_h_RG, weighted_RF = rows.backward(toward_RD @ down_EDF[expert], grad_weights_P)
            torch.mm(toward_RD.t(), weighted_RF, out=grad_down_EDF[expert])
            torch.mm(grad_h_RG, gate_up_EGD[expert], out=grad_x_RD[start:stop])
            torch.mm(grad_h_RG.t(), x_RD[start:stop], out=grad_gate_up_EGD[expert])
        busy = {expert for expert, *_ in ctx.segments}
        for idle in set(range(len(down_EDF))) - busy:
            grad_gate_up_EGD[idle].zero_()
            grad_down_EDF[idle].zero_()
        grad_weights_MK = grad_weights_P.view_as(weights_MK).to(weights_MK.dtype)
        grad_x_MD = sum_choices(grad_x_RD, place_P, choices)
        return grad_x_MD, grad_weights_MK, None, grad_gate_up_EGD, grad_down_EDF


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Of a row's weight: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _product(x_RI: Tensor, weight_OI: Tensor, out_RO: Tensor, learning: bool) -> None:
    """x Wᵀ into ``out``."""
    if learning or len(x_RI) > FEW or x_RI.device.type != "cpu" or x_RI.dtype is torch.float32:
        torch.mm(x_RI, weight_OI.t(), out=out_RO)
    else:
        out_RO.copy_(few_rows(x_RI, weight_OI))
