"""RMSNorm: divide by the root mean square, multiply by a learned weight (arXiv:1910.07467).

The reference is the equation in float32. The fast form keeps one number per row for its backward
pass, and writes that pass by hand: PyTorch's own is a chain of eight element-wise passes on a CPU,
here it is one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import KINDS, Native, at, native_for

# D width of the normalised axis.


def rms_norm_reference(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The equation; statistics in float32, the result in x's type."""
    x32_D = x_D.float()
    normed_D = x32_D * torch.rsqrt(x32_D.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed_D.to(x_D.dtype)


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As ``rms_norm_reference``; under autocast the result has the autocast type."""
    out_dtype = normed_dtype(x_D)
    if torch.is_grad_enabled():
        out_D: Tensor = _RMSNorm.apply(x_D, weight_D, eps, out_dtype)
        return out_D
    library = _library(x_D, weight_D, out_dtype)
    if library is not None:
        return native_norm(library, x_D, weight_D, eps, out_dtype, None)
    return F.rms_norm(x_D, weight_D.shape, weight_D, eps).to(out_dtype)


def normed_dtype(x_D: Tensor) -> torch.dtype:
    device = x_D.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_D.dtype


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_D: Tensor, weight_D: Tensor, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        library = _library(x_D, weight_D, out_dtype)
        if library is not None:
            scale = x_D.new_empty(*x_D.shape[:-1], 1, dtype=torch.float32)
            out_D = native_norm(library, x_D, weight_D, eps, out_dtype, scale)
        else:
            norm = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True, dtype=torch.float32)
            scale = (norm.square() / x_D.shape[-1] + eps).rsqrt_()
            out_D = (x_D * scale).to(x_D.dtype).mul_(weight_D).to(out_dtype)
        ctx.save_for_backward(x_D, weight_D, scale)
        return out_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_D, weight_D, scale = ctx.saved_tensors
        library = _library(x_D, weight_D, grads[0].dtype)
        if library is not None:
            grad_x_D, _, grad_weight_D = native_gradients(library, grads[0], x_D, weight_D, scale)
            return grad_x_D, grad_weight_D, None, None
        width = x_D.shape[-1]
        x32_D, weight32_D, grad_D = x_D.float(), weight_D.float(), grads[0].float()
        # LayerNorm's fused kernel, told that the mean is zero, gives this gradient less one term:
        # scale · mean(grad · weight), which is added back.
        grad_x_D, grad_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_D,
            x32_D,
            [width],
            torch.zeros_like(scale),
            scale,
            weight32_D,
            None,
            [True, True, False],
        )
        grad_x_D.addcmul_(scale, (grad_D @ weight32_D)[..., None], value=1 / width)
        return grad_x_D.to(x_D.dtype), grad_weight_D.to(weight_D.dtype), None, None


def _library(x_D: Tensor, weight_D: Tensor, other: torch.dtype) -> Native | None:
    return native_for(x_D) if weight_D.dtype in KINDS and other in KINDS else None


def native_norm(
    library: Native,
    x_D: Tensor,
    weight_D: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    scale: Tensor | None,
) -> Tensor:
    """``scale``: room for each row's 1/rms."""
    width = x_D.shape[-1]
    x_RD, weight_D = as_rows(x_D), weight_D.contiguous()
    out_D = torch.empty(x_D.shape, dtype=out_dtype)
    library.run(
        "qiusuo_rms_norm", at(x_RD), KINDS[x_D.dtype], x_RD.stride(0), at(weight_D),
        KINDS[weight_D.dtype], at(out_D), KINDS[out_dtype], at(scale), len(x_RD), width, eps,
    )  # fmt: skip
    return out_D


def native_gradients(
    library: Native,
    grad_D: Tensor,
    x_D: Tensor,
    weight_D: Tensor,
    scale: Tensor,
    past_D: Tensor | None = None,
    also_rounded: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, of x once more in bfloat16 where that is wanted, and of the weight. ``past``:
    a gradient of x's type that reaches x past the norm, and is added."""
    width = x_D.shape[-1]
    x_RD, grad_D, weight_D = as_rows(x_D), grad_D.contiguous(), weight_D.contiguous()
    past_D = None if past_D is None else past_D.contiguous()
    grad_x_D = torch.empty(x_D.shape, dtype=x_D.dtype)
    rounded_D = torch.empty(x_D.shape, dtype=torch.bfloat16) if also_rounded else None
    grad_weight_D = torch.empty(width)
    library.run(
        "qiusuo_rms_norm_backward", at(grad_D), KINDS[grad_D.dtype], at(x_RD), KINDS[x_D.dtype],
        x_RD.stride(0), at(weight_D), KINDS[weight_D.dtype], at(scale), at(past_D), at(grad_x_D),
        at(rounded_D), at(grad_weight_D), len(x_RD), width,
    )  # fmt: skip
    return grad_x_D, rounded_D, grad_weight_D.to(weight_D.dtype)


def as_rows(x_D: Tensor) -> Tensor:
    """x as rows [R, D] at one distance from each other: a part of wider rows where it stands."""
    if x_D.stride(-1) != 1:
        x_D = x_D.contiguous()
    return x_D.reshape(-1, x_D.shape[-1])
