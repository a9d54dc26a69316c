"""SwiGLU between its products: silu(gate) · up (arXiv:2002.05202), one pass forward and backward.

Natively all of it is float32 inside and rounded once; written out in PyTorch's operations it is two
passes forward and five backward. The experts' rows carry a weight each, which is part of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import KINDS, Native, at, native_for

# R rows, F width, G = 2F, P pairs of (token, expert).


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The equation."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As ``swiglu_reference``, for gate and up of one shape and type."""
    with torch.no_grad():
        library = native_for(gate)
    if library is None:
        return swiglu_reference(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        out: Tensor = _Swiglu.apply(gate, up)
        return out
    return _forward(library, gate, up)


def _forward(library: Native, gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    library.run("qiusuo_swiglu", *_told(gate, up), at(out))
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        library = native_for(gate)
        assert library is not None
        return _forward(library, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (one.contiguous() for one in ctx.saved_tensors)
        grad = grads[0].to(gate.dtype).contiguous()
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        library = native_for(gate)
        assert library is not None
        library.run(
            "qiusuo_swiglu_backward", *_told(gate, up), at(grad), at(grad_gate), at(grad_up), None,
            None,
        )  # fmt: skip
        return grad_gate, grad_up


def _told(gate: Tensor, up: Tensor) -> tuple[int | None, ...]:
    width = gate.shape[-1]
    rows = gate.numel() // max(1, width)
    return KINDS[gate.dtype], at(gate), at(up), width, None, None, rows, width


class WeightedRows(NamedTuple):
    """Rows [gate, up] side by side, and where each row's weight is found: ``pair_R`` points into
    ``weights_P`` (float32), −1 is the weight 0."""

    h_RG: Tensor
    weights_P: Tensor
    pair_R: Tensor

    def weighted(self) -> Tensor:
        """silu(gate) · up · weight [R, F]. Without gradients."""
        library = native_for(self.h_RG)
        if library is None:
            return activated(self.h_RG) * self._weight_R1()
        out_RF = self.h_RG.new_empty(len(self.h_RG), self.h_RG.shape[1] // 2)
        library.run("qiusuo_swiglu", *self._told(), at(out_RF))
        return out_RF

    def backward(self, grad_RF: Tensor, grad_weights_P: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of ``weighted``: that of h, and ``weighted`` once more. These rows'
        entries of the weights' gradient are written to ``grad_weights_P``."""
        library = native_for(self.h_RG)
        if library is None:
            return self._plain_backward(grad_RF, grad_weights_P)
        h_RG, weighted_RF = self.h_RG, torch.empty_like(grad_RF)
        grad_h_RG = torch.empty_like(h_RG)
        middle = grad_RF.shape[1] * h_RG.itemsize
        grad_gate = grad_h_RG.data_ptr()
        library.run(
            "qiusuo_swiglu_backward", *self._told(), at(grad_RF), grad_gate, grad_gate + middle,
            at(grad_weights_P), at(weighted_RF),
        )  # fmt: skip
        return grad_h_RG, weighted_RF

    def _told(self) -> tuple[int | None, ...]:
        (rows, both), gate = self.h_RG.shape, self.h_RG.data_ptr()
        up = gate + both // 2 * self.h_RG.itemsize
        kind, weights, pair = KINDS[self.h_RG.dtype], at(self.weights_P), at(self.pair_R)
        return kind, gate, up, both, weights, pair, rows, both // 2

    def _weight_R1(self) -> Tensor:
        weight_R = self.weights_P[self.pair_R.clamp_min(0)].masked_fill_(self.pair_R < 0, 0)
        return weight_R[:, None].to(self.h_RG.dtype)

    def _plain_backward(self, grad_RF: Tensor, grad_weights_P: Tensor) -> tuple[Tensor, Tensor]:
        act_RF, weight_R1 = activated(self.h_RG), self._weight_R1()
        grad_weight_R = (grad_RF * act_RF).sum(-1, dtype=torch.float32)
        kept_R = self.pair_R >= 0
        grad_weights_P[self.pair_R[kept_R]] = grad_weight_R[kept_R].to(grad_weights_P.dtype)
        grad_h_RG = activated_backward(grad_RF * weight_R1, self.h_RG)
        return grad_h_RG, act_RF * weight_R1


def activated(h_RG: Tensor) -> Tensor:
    """silu(gate) · up [R, F] of rows [gate, up]. Without gradients."""
    gate_RF, up_RF = h_RG.chunk(2, dim=-1)
    return F.silu(gate_RF).mul_(up_RF)


def activated_backward(grad_RF: Tensor, h_RG: Tensor) -> Tensor:
    """Gradient of [gate, up] from that of silu(gate) · up; ``grad_RF`` is used up."""
    gate_RF, up_RF = h_RG.chunk(2, dim=-1)
    grad_h_RG = torch.empty_like(h_RG)
    grad_gate_RF, grad_up_RF = grad_h_RG.chunk(2, dim=-1)
    torch.mul(grad_RF, F.silu(gate_RF), out=grad_up_RF)
    grad_gate_RF.copy_(torch.ops.aten.silu_backward(grad_RF.mul_(up_RF), gate_RF))
    return grad_h_RG
