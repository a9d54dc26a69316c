"""Projections that learn in bfloat16, on AMX (native/amx_training_linear.cpp): one, or several of
the same rows, as queries, keys and values are.

Under autocast PyTorch casts every weight, multiplies by each, makes for every layer a gradient of
the rows of its own, adds these up, and casts every weight's gradient. Here it is one call: the rows
are laid out once for all layers, the gradient of the rows is one sum in float32, and those of the
weights leave as the float32 sums they are.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import KINDS, at
from qiusuo.kernels.signatures import Projection, TrainingLinear
from qiusuo.kernels.tile_mlp import tile_library

# M rows, D in, O out.

LARGE = 1 << 18  # numbers of a weight alone, beyond which PyTorch is as fast


def gain_by_tiles(*weights_OD: Tensor) -> bool:
    """Whether these weights are faster here than with PyTorch: several at any size that
    ``fit_tiles`` takes, by what they share."""
    return len(weights_OD) > 1 or (len(weights_OD) == 1 and weights_OD[0].numel() <= LARGE)


def linears_reference(x: Tensor, *weights_OD: Tensor) -> tuple[Tensor, ...]:
    """The equation: x Wᵀ for each weight."""
    return tuple(F.linear(x, weight_OD) for weight_OD in weights_OD)


def tile_linears(x: Tensor, *weights_OD: Tensor) -> tuple[Tensor, ...]:
    """As ``linears_reference``, in bfloat16; only where ``tiles_learn`` and ``fit_tiles`` (of
    tile_mlp.py)."""
    for weight_OD in weights_OD:
        if weight_OD.shape[1] != x.shape[-1]:
            raise ValueError(
                f"rows of {x.shape[-1]} numbers, a weight of {weight_OD.shape[1]} columns"
            )
    x_MD = x.reshape(-1, x.shape[-1]).contiguous()
    ys_MO = _TileLinears.apply(x_MD, *weights_OD)
    return tuple(y_MO.view(*x.shape[:-1], -1) for y_MO in ys_MO)


class _TileLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, *weights_OD: Tensor) -> tuple[Tensor, ...]:
        ys_MO = tuple(
            x_MD.new_empty(len(x_MD), len(weight_OD), dtype=torch.bfloat16)
            for weight_OD in weights_OD
        )
        parts = [Projection(at(w), len(w), at(y)) for w, y in zip(weights_OD, ys_MO, strict=True)]
        tile_library().qiusuo_training_linear(byref(_call(x_MD, weights_OD[0], parts)))
        ctx.save_for_backward(x_MD, *weights_OD)
        ctx.set_materialize_grads(False)
        return ys_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """A layer whose result nobody used takes no part."""
        x_MD, *weights_OD = ctx.saved_tensors
        kept, parts = [], []
        grad_weights: list[Tensor | None] = [None] * len(grads)
        for i, (weight_OD, grad) in enumerate(zip(weights_OD, grads, strict=True)):
            if grad is None:
                continue
            grad_MO = grad.to(torch.bfloat16).contiguous()
            grad_weights[i] = grad_OD = torch.empty_like(weight_OD)
            kept.append(grad_MO)
            parts.append(Projection(at(weight_OD), len(weight_OD), at(grad_MO), at(grad_OD)))
        if not parts:
            return (None,) * (1 + len(grads))
        grad_x_MD = torch.empty_like(x_MD) if ctx.needs_input_grad[0] else None
        call = _call(x_MD, weights_OD[0], parts)
        tile_library().qiusuo_training_linear_backward(byref(call), at(grad_x_MD))
        return grad_x_MD, *grad_weights


def _call(x_MD: Tensor, weight_OD: Tensor, parts: list[Projection]) -> TrainingLinear:
    layers = (Projection * len(parts))(*parts)
    return TrainingLinear(
        at(x_MD), KINDS[x_MD.dtype], KINDS[weight_OD.dtype], *x_MD.shape, len(parts), layers
    )
