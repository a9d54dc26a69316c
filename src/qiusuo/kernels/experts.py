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

# M tokens, K experts per token, P = M*K pairs, E experts, D hidden, F expert width, G = 2F.


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
    x_MD: Tensor, weights_MK: Tensor, indices_MK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """As ``experts_reference``; under autocast the products run in the autocast type."""
    device = x_MD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_MD, gate_up_EGD, down_EDF = x_MD.to(dtype), gate_up_EGD.to(dtype), down_EDF.to(dtype)
    out_MD: Tensor = _GroupedExperts.apply(x_MD, weights_MK, indices_MK, gate_up_EGD, down_EDF)
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
        pairs = weights_MK.numel()
        order_P, place_P, segments = _sort_by_expert(indices_MK, gate_up_EGD.shape[0])
        token_P = order_P // indices_MK.shape[1]
        x_PD = x_MD[token_P]
        h_PG = x_PD.new_empty(pairs, gate_up_EGD.shape[1])
        for expert, start, stop in segments:
            torch.mm(x_PD[start:stop], gate_up_EGD[expert].t(), out=h_PG[start:stop])
        weight_P = weights_MK.flatten()[order_P, None].to(h_PG.dtype)
        gate_PF, up_PF = h_PG.chunk(2, dim=-1)
        act_PF = F.silu(gate_PF).mul_(up_PF)
        y_PD = torch.empty_like(x_PD)
        weighted_PF = act_PF * weight_P
        for expert, start, stop in segments:
            torch.mm(weighted_PF[start:stop], down_EDF[expert].t(), out=y_PD[start:stop])
        ctx.save_for_backward(
            x_PD, h_PG, act_PF, weight_P, token_P, order_P, place_P, gate_up_EGD, down_EDF
        )
        ctx.segments, ctx.weights_like = segments, weights_MK
        return _sum_choices(y_PD, place_P, indices_MK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MD,) = grads
        x_PD, h_PG, act_PF, weight_P, token_P, order_P, place_P, gate_up_EGD, down_EDF = (
            ctx.saved_tensors
        )
        grad_PD = grad_MD.to(x_PD.dtype)[token_P]
        weighted_PF = act_PF * weight_P
        grad_PF = torch.empty_like(act_PF)
        grad_down_EDF = torch.zeros_like(down_EDF)
        for expert, start, stop in ctx.segments:
            torch.mm(grad_PD[start:stop], down_EDF[expert], out=grad_PF[start:stop])
            torch.mm(grad_PD[start:stop].t(), weighted_PF[start:stop], out=grad_down_EDF[expert])
        grad_weight_P = (grad_PF.float() * act_PF.float()).sum(-1)
        grad_PF *= weight_P
        gate_PF, up_PF = h_PG.chunk(2, dim=-1)
        grad_h_PG = torch.empty_like(h_PG)
        grad_gate_PF, grad_up_PF = grad_h_PG.chunk(2, dim=-1)
        torch.mul(grad_PF, F.silu(gate_PF), out=grad_up_PF)
        grad_gate_PF.copy_(torch.ops.aten.silu_backward(grad_PF.mul_(up_PF), gate_PF))
        grad_x_PD = torch.empty_like(x_PD)
        grad_gate_up_EGD = torch.zeros_like(gate_up_EGD)
        for expert, start, stop in ctx.segments:
            torch.mm(grad_h_PG[start:stop], gate_up_EGD[expert], out=grad_x_PD[start:stop])
            torch.mm(grad_h_PG[start:stop].t(), x_PD[start:stop], out=grad_gate_up_EGD[expert])
        weights_MK = ctx.weights_like
        grad_weights_MK = grad_weight_P[place_P].view_as(weights_MK).to(weights_MK.dtype)
        grad_x_MD = _sum_choices(grad_x_PD, place_P, weights_MK.shape[1])
        return grad_x_MD, grad_weights_MK, None, grad_gate_up_EGD, grad_down_EDF


def _sort_by_expert(
    indices_MK: Tensor, experts: int
) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """(pair at each sorted place, sorted place of each pair, non-empty (expert, start, stop))."""
    expert_P = indices_MK.flatten()
    order_P = torch.argsort(expert_P, stable=True)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    segments, start = [], 0
    for expert, count in enumerate(torch.bincount(expert_P, minlength=experts).tolist()):
        if count:
            segments.append((expert, start, start + count))
        start += count
    return order_P, place_P, segments


def _sum_choices(y_PD: Tensor, place_P: Tensor, choices: int) -> Tensor:
    """Bring sorted rows home and add each token's K of them, always in the same order."""
    y_MKD = y_PD[place_P].unflatten(0, (-1, choices))
    return y_MKD.sum(1)
