"""RMSNorm: divide by the root mean square, multiply by a learned weight (arXiv:1910.07467).

The reference is the equation in float32. The fast form keeps one number per row for its backward
pass, and writes that pass by hand: PyTorch's own is a chain of eight element-wise passes on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# D width of the normalised axis.


def rms_norm_reference(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The equation; statistics in float32, the result in x's type."""
    x32_D = x_D.float()
    normed_D = x32_D * torch.rsqrt(x32_D.square().mean(-1, keepdim=True) + eps)
    return weight_D * normed_D.to(x_D.dtype)


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As ``rms_norm_reference``, with a hand-written backward pass."""
    out_D: Tensor = _RMSNorm.apply(x_D, weight_D, eps)
    return out_D


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x_D.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x_D, weight_D, scale)
        return (x_D * scale).to(x_D.dtype) * weight_D

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_D, weight_D, scale = ctx.saved_tensors
        (grad_D,) = grads
        normed_D = x_D * scale
        toward_weight_D = (grad_D * normed_D).flatten(0, -2).sum(0, dtype=torch.float32)
        grad_normed_D = grad_D * weight_D
        along = (grad_normed_D * normed_D).mean(-1, keepdim=True, dtype=torch.float32)
        grad_x_D = torch.addcmul(grad_normed_D, normed_D, along, value=-1).mul_(scale)
        return grad_x_D.to(x_D.dtype), toward_weight_D.to(weight_D.dtype), None
