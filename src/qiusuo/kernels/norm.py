"""RMSNorm: divide by the root mean square, multiply by a learned weight (arXiv:1910.07467).

The reference is the equation in float32. The fast form keeps one number per row for its backward
pass, and writes that pass by hand: PyTorch's own is a chain of eight element-wise passes on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import native_for

# D width of the normalised axis.


def rms_norm_reference(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The equation; statistics in float32, the result in x's type."""
    x32_D = x_D.float()
    normed_D = x32_D * torch.rsqrt(x32_D.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed_D.to(x_D.dtype)


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As ``rms_norm_reference``, with a hand-written backward pass; without one, PyTorch's own."""
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled(x_D.device.type):
        library = native_for(x_D)
        if library is not None and x_D.dtype is weight_D.dtype:
            return library.rms_norm(x_D.contiguous(), weight_D.contiguous(), eps)
        return F.rms_norm(x_D, weight_D.shape, weight_D, eps)
    out_D: Tensor = _RMSNorm.apply(x_D, weight_D, eps)
    return out_D


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x_D.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x_D, weight_D, scale)
        device = x_D.device.type
        out_dtype = x_D.dtype
        if torch.is_autocast_enabled(device):
            out_dtype = torch.get_autocast_dtype(device)
        return (x_D * scale).to(x_D.dtype).mul_(weight_D).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_D, weight_D, scale = ctx.saved_tensors
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
        return grad_x_D.to(x_D.dtype), grad_weight_D.to(weight_D.dtype), None
