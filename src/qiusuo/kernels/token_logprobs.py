"""Log p of every token straight from the hidden states: what reinforcement learning asks for.

As in ``cross_entropy.py`` no [tokens, vocabulary] matrix is kept, but here every token has a
gradient of its own, known only when the backward pass comes. So nothing is computed ahead: the
backward pass makes the logits of a chunk once more. Tokens with the label IGNORE (prompts, padding)
are left out before the first product. The softmax runs in float32; ScaleRL (arXiv:2510.13786) and
MiniMax-M1 (arXiv:2506.13585) found that the head's product wants float32 too, where the sampler's
log-probabilities are to be met: ``float32_head``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.cross_entropy import IGNORE

# M tokens, N of them counted, D hidden, W vocabulary, C tokens of a chunk.

CHUNK_ELEMENTS = 1 << 22  # logits of a chunk: 16 MiB in float32


def token_logprobs_reference(
    x_MD: Tensor, head_WD: Tensor, labels_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Log p(label) [M] and the entropy of the distribution [M, detached], in nats; both 0 where the
    label is IGNORE."""
    logprobs_MW = logits_of(x_MD, head_WD).log_softmax(-1)
    picked_M = logprobs_MW.gather(1, labels_M.clamp_min(0)[:, None]).squeeze(1)
    ignored_M = labels_M == IGNORE
    entropy_M = -(logprobs_MW.exp() * logprobs_MW).sum(-1).detach()
    return picked_M.masked_fill(ignored_M, 0), entropy_M.masked_fill(ignored_M, 0)


def token_logprobs(
    x_MD: Tensor, head_WD: Tensor, labels_M: Tensor, float32_head: bool = False
) -> tuple[Tensor, Tensor]:
    """As ``token_logprobs_reference``, a chunk at a time. Under autocast the products run in the
    autocast type, or with ``float32_head`` in float32. For the distribution at a temperature other
    than 1 give x divided by it."""
    x_MD, head_WD = in_product_type(x_MD, head_WD, float32_head)
    with torch.autocast(x_MD.device.type, enabled=False):
        logprobs_M, entropy_M = _TokenLogprobs.apply(x_MD, head_WD, labels_M)
    return logprobs_M, entropy_M


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, head_WD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        kept_N = torch.where(labels_M != IGNORE)[0]
        dtype = torch.promote_types(x_MD.dtype, torch.float32)
        logprobs_M = x_MD.new_zeros(len(x_MD), dtype=dtype)
        entropy_M = torch.zeros_like(logprobs_M)
        for rows_C in kept_N.split(chunk_rows(head_WD, CHUNK_ELEMENTS)):
            logprobs_CW = logits_of(x_MD[rows_C], head_WD).log_softmax(-1)
            logprobs_M[rows_C] = logprobs_CW.gather(1, labels_M[rows_C, None]).squeeze(1)
            entropy_M[rows_C] = -torch.linalg.vecdot(logprobs_CW.exp(), logprobs_CW)
        ctx.save_for_backward(x_MD, head_WD, labels_M, kept_N)
        ctx.mark_non_differentiable(entropy_M)
        return logprobs_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, head_WD, labels_M, kept_N = ctx.saved_tensors
        grad_M = grads[0]
        gradients = HeadGradients(x_MD, head_WD, ctx.needs_input_grad)
        for rows_C in kept_N.split(chunk_rows(head_WD, CHUNK_ELEMENTS)):
            x_CD = x_MD[rows_C]
            grad_CW = logits_of(x_CD, head_WD).softmax(-1).neg_()
            place_C = torch.arange(len(rows_C), device=rows_C.device)
            grad_CW[place_C, labels_M[rows_C]] += 1
            gradients.add(rows_C, x_CD, grad_CW.mul_(grad_M[rows_C, None]))
        return *gradients.finished(), None


class HeadGradients:
    """Sums up what the gradients of logits, chunk by chunk, mean for hidden states and head; only
    for those that ``wanted`` (x, head) names, so a frozen head costs nothing."""

    def __init__(self, x_MD: Tensor, head_WD: Tensor, wanted: tuple[bool, ...]) -> None:
        self.head_WD = head_WD
        self.grad_x_MD = torch.zeros_like(x_MD) if wanted[0] else None
        self.grad_head_WD: Tensor | None = None
        if wanted[1]:
            dtype = torch.promote_types(head_WD.dtype, torch.float32)
            self.grad_head_WD = torch.zeros_like(head_WD, dtype=dtype)

    def add(self, rows_C: Tensor, x_CD: Tensor, grad_CW: Tensor) -> None:
        grad_CW = grad_CW.to(self.head_WD.dtype)
        with torch.autocast(x_CD.device.type, enabled=False):
            if self.grad_x_MD is not None:
                self.grad_x_MD[rows_C] = grad_CW @ self.head_WD
            if self.grad_head_WD is not None:
                self.grad_head_WD += grad_CW.t() @ x_CD

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        grad_head_WD = self.grad_head_WD
        if grad_head_WD is not None:
            grad_head_WD = grad_head_WD.to(self.head_WD.dtype)
        return self.grad_x_MD, grad_head_WD


def logits_of(x_CD: Tensor, head_WD: Tensor) -> Tensor:
    """The product in the inputs' type, told in float32 at least."""
    with torch.autocast(x_CD.device.type, enabled=False):
        logits_CW = F.linear(x_CD, head_WD)
    return logits_CW.to(torch.promote_types(logits_CW.dtype, torch.float32))


def in_product_type(x_MD: Tensor, head_WD: Tensor, float32: bool) -> tuple[Tensor, Tensor]:
    """Hidden states and head in the type in which their product is to run."""
    device = x_MD.device.type
    if float32:
        return x_MD.float(), head_WD.float()
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return x_MD.to(dtype), head_WD.to(dtype)
    return x_MD, head_WD


def chunk_rows(head_WD: Tensor, elements: int) -> int:
    """So many tokens that their logits have about ``elements`` numbers."""
    return max(1, elements // head_WD.shape[0])
