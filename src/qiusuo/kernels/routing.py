"""Which experts a token goes to: scores, the best of the best groups, their weights.

A dozen small operations on a few numbers each; in decoding, one native call instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qiusuo.kernels.native import native_for

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
    library = native_for(logits_ME)
    if library is None or replayed_MK is not None:
        return choose_experts_reference(logits_ME, bias_E, choice, replayed_MK)
    bias_E = None if bias_E is None else bias_E.float()
    return Routing(*library.choose_experts(logits_ME.float().contiguous(), bias_E, *choice))


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
