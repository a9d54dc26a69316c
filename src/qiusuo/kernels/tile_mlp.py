"""SwiGLU networks that learn in bfloat16, on AMX (native/amx_training_mlp*.cpp).

Under autocast PyTorch casts every weight, multiplies, and casts every gradient back. Here float32
weights are rounded while they are laid out for the tiles, once a call, the gradients of weights
leave as the float32 sums they are, and a SwiGLU network is one call: what lies between its
products stays in the cache, and is found again on the way back, which is faster than to fetch it
from memory. Activations and their gradients are bfloat16.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.expert_rows import sort_by_expert, sum_choices
from qiusuo.kernels.native import KINDS, at, native
from qiusuo.kernels.signatures import TrainingMlp

# M tokens, K experts per token, P = M*K pairs, R rows (the pairs, sorted by expert), E experts,
# D hidden, F width, G = 2F.

MANY = 32  # rows below which laying out a weight costs more than is won
LARGE = (
    1 << 19
)  # numbers of a matrix beyond which it leaves the second-level cache: PyTorch is ahead


def tiles_learn(x: Tensor) -> bool:
    """Whether rows x are multiplied in bfloat16 while something learns or is looked at between
    steps (by autocast or by their type), on a processor with AMX. A compiler cannot look into the
    kernel: what it traces goes PyTorch's way."""
    if x.device.type != "cpu" or x.dtype not in KINDS or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") is not torch.bfloat16:
            return False
    elif not torch.is_grad_enabled() or x.dtype is not torch.bfloat16:
        return False
    library = native()
    return library is not None and library.has_tiles and x.numel() >= MANY * x.shape[-1]


def fit_tiles(*weights: Tensor) -> bool:
    """Whether the kernels read these weights, learn all of them, and win by it."""
    if torch.is_grad_enabled() and not all(weight.requires_grad for weight in weights):
        return False
    if not torch.is_autocast_enabled("cpu") and weights[0].dtype is not torch.bfloat16:
        return False
    return all(
        weight.dtype == weights[0].dtype
        and weight.dtype in KINDS
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.shape[-1] * weight.shape[-2] <= LARGE
        for weight in weights
    )


def tile_mlp(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate x) · up x) in bfloat16; only where ``tiles_learn`` and ``fit_tiles``."""
    _check_widths(x, gate_FD)
    if up_FD.shape != gate_FD.shape or down_DF.shape != gate_FD.shape[::-1]:
        raise ValueError(
            f"gate {tuple(gate_FD.shape)}, up {tuple(up_FD.shape)} and down "
            f"{tuple(down_DF.shape)} do not fit together"
        )
    x_MD = x.reshape(-1, x.shape[-1]).contiguous()
    out_MD: Tensor = _TileMLP.apply(x_MD, gate_FD, up_FD, down_DF)
    return out_MD.view(x.shape)


def tile_experts(
    x_MD: Tensor, weights_MK: Tensor, indices_MK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """``experts.experts_grouped`` in bfloat16; only where ``tiles_learn`` and ``fit_tiles``."""
    _check_widths(x_MD, gate_up_EGD)
    (E, G, D), (M, K) = gate_up_EGD.shape, indices_MK.shape
    if down_EDF.shape != (E, D, G // 2) or weights_MK.shape != (M, K) or len(x_MD) != M:
        raise ValueError(
            f"tokens {tuple(x_MD.shape)}, their weights {tuple(weights_MK.shape)} and experts "
            f"{tuple(indices_MK.shape)}, gate_up {tuple(gate_up_EGD.shape)} and down "
            f"{tuple(down_EDF.shape)} do not fit together"
        )
    out_MD: Tensor = _TileExperts.apply(
        x_MD.contiguous(), weights_MK, indices_MK, gate_up_EGD, down_EDF
    )
    return out_MD


class _TileMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        starts = torch.tensor([0, len(x_MD)])
        call = _mlp(x_MD, gate_FD, up_FD, down_DF, starts)
        ctx.save_for_backward(x_MD, gate_FD, up_FD, down_DF, starts)
        return _run(call, x_MD, len(x_MD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x_MD, gate_FD, up_FD, down_DF, starts = ctx.saved_tensors
        call = _mlp(x_MD, gate_FD, up_FD, down_DF, starts)
        grad_MD = grads[0].to(torch.bfloat16).contiguous()
        grad_x_MD = torch.empty_like(grad_MD)
        weights = tuple(torch.empty_like(weight) for weight in (gate_FD, up_FD, down_DF))
        tile_library().qiusuo_training_mlp_backward(
            byref(call), at(grad_MD), at(grad_x_MD), None, *map(at, weights)
        )
        return grad_x_MD.to(x_MD.dtype), *weights


class _TileExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weights_MK: Tensor,
        indices_MK: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        layout = sort_by_expert(indices_MK, len(gate_up_EGD), filled=False)
        weights_P = weights_MK.detach().flatten().float()
        call = _experts(x_MD, gate_up_EGD, down_EDF, layout.starts, layout.pair_R, weights_P)
        y_RD = _run(call, x_MD, len(layout.pair_R))
        ctx.save_for_backward(x_MD, gate_up_EGD, down_EDF, *layout, weights_P)
        ctx.weights_like = weights_MK
        return sum_choices(y_RD, layout.place_P, indices_MK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gate_up_EGD, down_EDF, place_P, pair_R, starts, weights_P = ctx.saved_tensors
        weights_MK = ctx.weights_like
        call = _experts(x_MD, gate_up_EGD, down_EDF, starts, pair_R, weights_P)
        grad_MD = grads[0].to(torch.bfloat16).contiguous()
        grad_RD = grad_MD.new_empty(len(pair_R), grad_MD.shape[1])
        grad_weights_P = torch.empty_like(weights_P)
        grad_gate_up_EGD, grad_down_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
        tile_library().qiusuo_training_mlp_backward(
            byref(call), at(grad_MD), at(grad_RD), at(grad_weights_P),
            *_gate_and_up(grad_gate_up_EGD), at(grad_down_EDF),
        )  # fmt: skip
        for idle in (starts.diff() == 0).nonzero().flatten().tolist():
            grad_gate_up_EGD[idle].zero_()
            grad_down_EDF[idle].zero_()
        grad_x_MD = sum_choices(grad_RD, place_P, weights_MK.shape[1]).to(x_MD.dtype)
        grad_weights_MK = grad_weights_P.view_as(weights_MK).to(weights_MK.dtype)
        return grad_x_MD, grad_weights_MK, None, grad_gate_up_EGD, grad_down_EDF


def tile_library() -> Any:
    """The library, where ``tiles_learn`` has said that it is there."""
    library = native()
    assert library is not None
    library.begin()
    return library.library


def _told(rows: Tensor) -> tuple[int | None, int]:
    return at(rows), KINDS[rows.dtype]


def _run(call: TrainingMlp, x: Tensor, rows: int) -> Tensor:
    y_RD = x.new_empty(rows, call.D, dtype=torch.bfloat16)
    tile_library().qiusuo_training_mlp(byref(call), at(y_RD))
    return y_RD


def _mlp(
    x_MD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, starts: Tensor
) -> TrainingMlp:
    return TrainingMlp(
        *_told(x_MD), at(gate_FD), at(up_FD), *_told(down_DF), 0, 0, at(starts), None, None, 1, 1,
        *down_DF.shape,
    )  # fmt: skip


def _experts(
    x_MD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    starts: Tensor,
    pair_R: Tensor,
    weights_P: Tensor,
) -> TrainingMlp:
    return TrainingMlp(
        *_told(x_MD), *_gate_and_up(gate_up_EGD), *_told(down_EDF), gate_up_EGD[0].numel(),
        down_EDF[0].numel(), at(starts), at(pair_R), at(weights_P),
        len(weights_P) // max(1, len(x_MD)), *down_EDF.shape,
    )  # fmt: skip


def _gate_and_up(stack_EGD: Tensor) -> tuple[int, int]:
    gate = stack_EGD.data_ptr()
    return gate, gate + stack_EGD[0].numel() // 2 * stack_EGD.itemsize


def _check_widths(x: Tensor, weight: Tensor) -> None:
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"rows of {x.shape[-1]} numbers, a weight of {weight.shape[-1]} columns")
