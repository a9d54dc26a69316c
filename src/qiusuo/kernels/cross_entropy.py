"""Cross-entropy straight from the hidden states, so that no [tokens, vocabulary] matrix is kept.

The head's product, its softmax and their gradients are computed for one chunk of tokens at a time;
only the gradients of the hidden states and of the head survive a chunk. Memory is therefore
tokens × hidden + vocabulary × hidden, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# M tokens, D hidden, W vocabulary, C tokens of a chunk.

IGNORE = -100
CHUNK_ELEMENTS = 1 << 22  # logits of one chunk: 16 MiB in float32


def cross_entropy_reference(x_MD: Tensor, head_WD: Tensor, labels_M: Tensor) -> Tensor:
    """Sum of −log p(label) over tokens whose label is not IGNORE; float32 scalar, in nats."""
    logits_MW = F.linear(x_MD, head_WD).float()
    return F.cross_entropy(logits_MW, labels_M, ignore_index=IGNORE, reduction="sum")


def chunked_cross_entropy(x_MD: Tensor, head_WD: Tensor, labels_M: Tensor) -> Tensor:
    """As ``cross_entropy_reference``; under autocast the products run in the autocast type."""
    device = x_MD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_MD, head_WD = x_MD.to(dtype), head_WD.to(dtype)
    loss: Tensor = _ChunkedCrossEntropy.apply(x_MD, head_WD, labels_M, torch.is_grad_enabled())
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, head_WD: Tensor, labels_M: Tensor, training: bool
    ) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // head_WD.shape[0])
        loss = x_MD.new_zeros((), dtype=torch.float32)
        grad_x_MD = torch.empty_like(x_MD) if training else None
        grad_head_WD = torch.zeros_like(head_WD, dtype=torch.float32) if training else None
        for start in range(0, x_MD.shape[0], rows):
            x_CD, labels_C = x_MD[start : start + rows], labels_M[start : start + rows]
            logits_CW = (x_CD @ head_WD.t()).float()
            logp_CW = logits_CW.log_softmax(-1)
            loss += F.nll_loss(logp_CW, labels_C, ignore_index=IGNORE, reduction="sum")
            if grad_x_MD is None or grad_head_WD is None:
                continue
            counted_C1 = (labels_C != IGNORE)[:, None]
            grad_CW = logp_CW.exp_()
            grad_CW.scatter_add_(1, labels_C.clamp_min(0)[:, None], -counted_C1.to(grad_CW.dtype))
            grad_CW = (grad_CW * counted_C1).to(x_CD.dtype)
            torch.mm(grad_CW, head_WD, out=grad_x_MD[start : start + rows])
            grad_head_WD += grad_CW.t() @ x_CD
        if training:
            ctx.save_for_backward(grad_x_MD, grad_head_WD)
            ctx.head_dtype = head_WD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_MD, grad_head_WD = ctx.saved_tensors
        (scale,) = grads
        grad_head_WD = (grad_head_WD * scale).to(ctx.head_dtype)
        return grad_x_MD * scale.to(grad_x_MD.dtype), grad_head_WD, None, None
