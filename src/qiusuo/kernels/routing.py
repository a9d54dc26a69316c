"""Which experts a token goes to: scores, the best of the best groups, their weights.

A dozen small operations on a few numbers each; natively one call instead, and one backward. So is
the loss that keeps experts evenly busy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import at, native_for

# M tokens, E experts, K of them per token, g groups, X = E/g.


class Choice(NamedTuple):
    """How a router chooses. ``sigmoid``: scores of DeepSeek-V3 (groups count as their two best),
    else softmax, those of V2 (groups count as their best)."""

    groups: int
    kept_groups: int
    per_token: int
    sigmoid: bool
    normalized: bool
    scaling: float


class Routing(NamedTuple):
    """One MoE layer's choices: what balancing, replay and the report look at."""

    scores_ME: Tensor  # float32, unbiased, before any choice
    indices_MK: Tensor
    weights_MK: Tensor  # float32


def choose_experts_reference(
    logits_ME: Tensor, bias_E: Tensor | None, choice: Choice, replayed_MK: Tensor | None = None
) -> Routing:
    """The equations (DeepSeek-V3, arXiv:2412.19437 §2.1.2). ``bias`` takes part in the choice and
    not in the weights. ``replayed``: take these experts, but where a row begins with −1."""
    scores_ME = logits_ME.sigmoid() if choice.sigmoid else logits_ME.softmax(-1)
    indices_MK = _best(scores_ME.detach(), bias_E, choice)
    if replayed_MK is not None:
        indices_MK = torch.where(replayed_MK[:, :1] < 0, indices_MK, replayed_MK.long())
    weights_MK = scores_ME.gather(1, indices_MK)
    if choice.normalized:
        weights_MK = weights_MK / (weights_MK.sum(-1, keepdim=True) + 1e-20)
    return Routing(scores_ME, indices_MK, weights_MK * choice.scaling)


def choose_experts(
    logits_ME: Tensor, bias_E: Tensor | None, choice: Choice, replayed_MK: Tensor | None = None
) -> Routing:
    """As ``choose_experts_reference``; of equal scores another one may be chosen."""
    with torch.no_grad():
        library = native_for(logits_ME)
    if library is None:
        return choose_experts_reference(logits_ME, bias_E, choice, replayed_MK)
    logits_ME = logits_ME.float().contiguous()
    bias_E = None if bias_E is None else bias_E.float()
    if replayed_MK is not None:
        replayed_MK = replayed_MK.long().contiguous()
    if torch.is_grad_enabled() and logits_ME.requires_grad:
        return Routing(*_Chosen.apply(logits_ME, bias_E, replayed_MK, choice))
    return Routing(*library.choose_experts(logits_ME, bias_E, replayed_MK, *choice))


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_ME: Tensor,
        bias_E: Tensor | None,
        replayed_MK: Tensor | None,
        choice: Choice,
    ) -> tuple[Tensor, Tensor, Tensor]:
        library = native_for(logits_ME)
        assert library is not None
        scores_ME, indices_MK, weights_MK = library.choose_experts(
            logits_ME, bias_E, replayed_MK, *choice
        )
        ctx.save_for_backward(scores_ME, indices_MK)
        ctx.library, ctx.choice = library, choice
        ctx.mark_non_differentiable(indices_MK)
        ctx.set_materialize_grads(False)
        return scores_ME, indices_MK, weights_MK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scores_ME, indices_MK = ctx.saved_tensors
        choice: Choice = ctx.choice
        of_scores_ME, _, of_weights_MK = (g if g is None else g.contiguous() for g in grads)
        grad_ME = torch.empty_like(scores_ME)
        ctx.library.begin()
        ctx.library.library.qiusuo_choose_experts_backward(
            at(scores_ME), at(indices_MK), scores_ME.shape[1], choice.per_token, choice.sigmoid,
            choice.normalized, choice.scaling, at(of_scores_ME), at(of_weights_MK), at(grad_ME),
            len(grad_ME),
        )  # fmt: skip
        return grad_ME, None, None, None


def _best(scores_ME: Tensor, bias_E: Tensor | None, choice: Choice) -> Tensor:
    """Group-limited top-k [M, K] of the biased scores."""
    if bias_E is not None:
        scores_ME = scores_ME + bias_E
    if choice.kept_groups < choice.groups:
        scores_MgX = scores_ME.unflatten(-1, (choice.groups, -1))
        if choice.sigmoid:
            group_scores_Mg = scores_MgX.topk(2, dim=-1).values.sum(-1)
        else:
            group_scores_Mg = scores_MgX.amax(-1)
        kept = group_scores_Mg.topk(choice.kept_groups, dim=-1).indices
        dropped_Mg = torch.ones_like(group_scores_Mg, dtype=torch.bool).scatter_(1, kept, False)
        # −inf, not 0: with negative biases a zero would win over an expert that was kept.
        scores_ME = scores_MgX.masked_fill(dropped_Mg[..., None], float("-inf")).flatten(1)
    return scores_ME.topk(choice.per_token, dim=-1).indices


def balance_loss_reference(scores_ME: Tensor, choices: int, sequences: int) -> Tensor:
    """Σᵢ fᵢ Pᵢ, averaged over sequences (V3 eq. 17-20); 1 when even. Float32 scalar.

    fᵢ counts the top-K of the *unbiased* scores, so the loss does not see the bias's work."""
    scores_BTE = scores_ME.unflatten(0, (sequences, -1))
    tokens, experts = scores_BTE.shape[1:]
    with torch.no_grad():
        top_BP = scores_BTE.topk(choices, dim=-1).indices.flatten(1)
        count_BE = scores_BTE.new_zeros(sequences, experts)
        count_BE.scatter_add_(1, top_BP, torch.ones_like(top_BP, dtype=count_BE.dtype))
        fraction_BE = count_BE * (experts / (choices * tokens))
    share_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (fraction_BE * share_BE).sum(-1).mean()


def balance_loss(scores_ME: Tensor, choices: int, sequences: int) -> Tensor:
    """As ``balance_loss_reference``; natively with its gradient, in one pass."""
    with torch.no_grad():
        library = native_for(scores_ME) if scores_ME.dtype is torch.float32 else None
    if library is None:
        return balance_loss_reference(scores_ME, choices, sequences)
    loss: Tensor = _Balance.apply(scores_ME, choices, sequences)
    return loss


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_ME: Tensor, choices: int, sequences: int) -> Tensor:
        library = native_for(scores_ME)
        assert library is not None
        scores_ME = scores_ME.contiguous()
        losses_B, grad_ME = scores_ME.new_empty(sequences), torch.empty_like(scores_ME)
        (rows, experts), tokens = scores_ME.shape, len(scores_ME) // sequences
        assert rows == tokens * sequences
        library.begin()
        library.library.qiusuo_balance(
            at(scores_ME), sequences, tokens, experts, choices, at(losses_B), at(grad_ME)
        )
        ctx.save_for_backward(grad_ME)
        return losses_B.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_ME,) = ctx.saved_tensors
        return grad_ME * grads[0], None, None
