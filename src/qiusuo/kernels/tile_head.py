"""The head's cross-entropy while it learns in bfloat16, on AMX (native/amx_training_head.cpp).

Logits exist for 32 rows and 256 columns at a time, in float32: as in FlashAttention a row's softmax
is summed while the columns go by, and the gradient of the hidden states with it. One number per row
is kept; from it the backward pass finds the softmax again, for the gradient of the head. So memory
is that of the hidden states and the head, whatever the vocabulary, and nothing is cut into chunks.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import KINDS, at
from qiusuo.kernels.signatures import TrainingHead
from qiusuo.kernels.tile_mlp import tile_library, tiles_learn

# M tokens, D hidden, W vocabulary.


def head_fits_tiles(x_MD: Tensor, head_WD: Tensor) -> bool:
    """Whether the kernel takes these."""
    if not tiles_learn(x_MD) or head_WD.dtype not in KINDS or head_WD.device.type != "cpu":
        return False
    if not torch.is_autocast_enabled("cpu") and head_WD.dtype is not torch.bfloat16:
        return False
    return head_WD.is_contiguous()


def tile_cross_entropy(x_MD: Tensor, head_WD: Tensor, labels_M: Tensor) -> Tensor:
    """Sum of −log p(label) over labels that are not negative, float32; only where
    ``head_fits_tiles``. IndexError for a label beyond the vocabulary."""
    if x_MD.shape[1] != head_WD.shape[1] or labels_M.shape != x_MD.shape[:1]:
        raise ValueError(
            f"hidden states {tuple(x_MD.shape)}, head {tuple(head_WD.shape)} and labels "
            f"{tuple(labels_M.shape)} do not fit together"
        )
    if len(labels_M) and int(labels_M.max()) >= len(head_WD):
        raise IndexError(f"label {int(labels_M.max())} of a vocabulary of {len(head_WD)}")
    training = torch.is_grad_enabled()
    loss: Tensor = _TileHead.apply(x_MD.contiguous(), head_WD, labels_M.contiguous(), training)
    return loss


class _TileHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, head_WD: Tensor, labels_M: Tensor, training: bool
    ) -> Tensor:
        nats_M, sums_M = torch.empty(2, len(x_MD))
        wanted = training and ctx.needs_input_grad[0]
        grad_x_MD = torch.empty_like(x_MD, dtype=torch.bfloat16) if wanted else None
        call = _call(x_MD, head_WD, labels_M)
        tile_library().qiusuo_training_head(byref(call), at(nats_M), at(sums_M), at(grad_x_MD))
        if training:
            ctx.save_for_backward(x_MD, head_WD, labels_M, sums_M, grad_x_MD)
        return nats_M.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, head_WD, labels_M, sums_M, grad_x_MD = ctx.saved_tensors
        (scale,) = grads
        if grad_x_MD is not None:
            grad_x_MD = (grad_x_MD * scale).to(x_MD.dtype)
        grad_head_WD = None
        if ctx.needs_input_grad[1]:
            grad_head_WD = torch.empty_like(head_WD)
            scale_M = scale.float() * (labels_M >= 0)
            call = _call(x_MD, head_WD, labels_M)
            tile_library().qiusuo_training_head_backward(
                byref(call), at(sums_M), at(scale_M), at(grad_head_WD)
            )
        return grad_x_MD, grad_head_WD, None, None


def _call(x_MD: Tensor, head_WD: Tensor, labels_M: Tensor) -> TrainingHead:
    (M, D), W = x_MD.shape, len(head_WD)
    return TrainingHead(
        at(x_MD), KINDS[x_MD.dtype], at(head_WD), KINDS[head_WD.dtype], at(labels_M), M, D, W
    )
