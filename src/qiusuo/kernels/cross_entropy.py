"""Cross-entropy straight from the hidden states, so that no [tokens, vocabulary] matrix is kept.

The head's product, its softmax and their gradients are made for a chunk of tokens at a time; only
the gradients of the hidden states and of the head survive it. Memory is therefore
tokens × hidden + vocabulary × hidden, whatever the number of tokens. Where a processor has AMX and
the products run in bfloat16, ``tile_head`` does it in squares that never leave the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import KINDS, at, native_for
from qiusuo.kernels.tile_head import head_fits_tiles, tile_cross_entropy

# M tokens, D hidden, W vocabulary, C tokens of a chunk.

IGNORE = -100
CHUNK_ELEMENTS = 15 << 20  # logits of a chunk: 30 MiB in bf16; from 32 on memory is mapped anew


def cross_entropy_reference(x_MD: Tensor, head_WD: Tensor, labels_M: Tensor) -> Tensor:
    """Sum of −log p(label) over tokens whose label is not IGNORE; float32 scalar, in nats."""
    logits_MW = F.linear(x_MD, head_WD).float()
    return F.cross_entropy(logits_MW, labels_M, ignore_index=IGNORE, reduction="sum")


def chunked_cross_entropy(x_MD: Tensor, head_WD: Tensor, labels_M: Tensor) -> Tensor:
    """As ``cross_entropy_reference``; under autocast the products run in the autocast type."""
    if head_fits_tiles(x_MD, head_WD):
        return tile_cross_entropy(x_MD, head_WD, labels_M)
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
        if not training:
            return _loss_only(x_MD, head_WD, labels_M)
        loss = x_MD.new_zeros((), dtype=torch.float32)
        grad_x_MD = torch.empty_like(x_MD)
        grad_head_WD = torch.zeros_like(head_WD, dtype=torch.float32)
        for x_CD, labels_C, grad_x_CD in zip(
            *(_chunks(t, head_WD) for t in (x_MD, labels_M, grad_x_MD)), strict=True
        ):
            grad_CW, chunk_loss = _logit_gradients(x_CD, head_WD, labels_C)
            loss += chunk_loss
            torch.mm(grad_CW, head_WD, out=grad_x_CD)
            grad_head_WD += grad_CW.t() @ x_CD
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


def _logit_gradients(x_CD: Tensor, head_WD: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """The loss's gradient for a chunk's logits, in their own type [C, W], and the chunk's loss."""
    logits_CW = x_CD @ head_WD.t()
    library = native_for(x_CD)
    if library is None:
        return _plain_gradients(logits_CW, labels_C)
    if len(labels_C) and int(labels_C.max()) >= len(head_WD):
        raise IndexError(f"label {int(labels_C.max())} of a vocabulary of {len(head_WD)}")
    nats_C = x_CD.new_empty(len(x_CD), dtype=torch.float32)
    library.run(
        "qiusuo_cross_entropy", at(logits_CW), KINDS[logits_CW.dtype], at(labels_C.contiguous()),
        at(nats_C), *logits_CW.shape,
    )  # fmt: skip
    return logits_CW, nats_C.sum()


def _plain_gradients(logits_CW: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """In bf16 a token's loss carries its probability's rounding, 0.002 nats: less than the rounding
    of the logits themselves."""
    probs_CW = logits_CW.softmax(-1)
    picked_C = probs_CW.gather(1, labels_C.clamp_min(0)[:, None]).squeeze(1).float()
    tiny = torch.finfo(torch.float32).tiny
    nats_C = picked_C.clamp_min_(tiny).log_().neg_()
    row_C = torch.arange(len(labels_C), device=labels_C.device)
    probs_CW[row_C, labels_C.clamp_min(0)] -= 1  # scatter_add_ is 1000 times slower on a CPU
    if (ignored_C := labels_C == IGNORE).any():
        probs_CW[ignored_C] = 0
    return probs_CW, nats_C.masked_fill_(ignored_C, 0).sum()


def _loss_only(x_MD: Tensor, head_WD: Tensor, labels_M: Tensor) -> Tensor:
    loss = x_MD.new_zeros((), dtype=torch.float32)
    for x_CD, labels_C in zip(*(_chunks(t, head_WD) for t in (x_MD, labels_M)), strict=True):
        loss += cross_entropy_reference(x_CD, head_WD, labels_C)
    return loss


def _chunks(t_M: Tensor, head_WD: Tensor) -> tuple[Tensor, ...]:
    """Pieces of so many rows that their logits have about CHUNK_ELEMENTS numbers."""
    return t_M.split(max(1, CHUNK_ELEMENTS // head_WD.shape[0]))
