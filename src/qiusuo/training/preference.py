"""Direct preference optimisation (arXiv:2305.18290): raise what is preferred above what is not, as
far from where the policy began as β allows, without a reward model.

    h = β [ (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l)) ]
    L = −(1−ε) log σ(h) − ε log σ(−h)  −  α log π(y_w) / |y_w|

The first term with ε = 0 is the paper's equation 7, whose β log(π/π_ref) is the implicit reward; ε
is the share of pairs that are labelled the wrong way round (cDPO). The last is RPO's
(arXiv:2404.19733): DPO alone may lower both answers, as long as the wrong one falls further.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# P pairs.


class Answers(NamedTuple):
    """Log-probabilities of whole answers, in nats, by the policy and by its reference."""

    policy_P: Tensor
    reference_P: Tensor


class PreferenceLoss(NamedTuple):
    """``loss_P`` of each pair; the implicit rewards are detached."""

    loss_P: Tensor
    chosen_reward_P: Tensor
    rejected_reward_P: Tensor


def preference_loss(
    chosen: Answers,
    rejected: Answers,
    chosen_tokens_P: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> PreferenceLoss:
    """``chosen_tokens``: the lengths |y_w|."""
    chosen_P = beta * (chosen.policy_P - chosen.reference_P)
    rejected_P = beta * (rejected.policy_P - rejected.reference_P)
    margin_P = chosen_P - rejected_P
    loss_P = -(1 - label_smoothing) * F.logsigmoid(margin_P)
    if label_smoothing:
        loss_P = loss_P - label_smoothing * F.logsigmoid(-margin_P)
    if sft_weight:
        loss_P = loss_P - sft_weight * chosen.policy_P / torch.clamp(chosen_tokens_P, min=1)
    return PreferenceLoss(loss_P, chosen_P.detach(), rejected_P.detach())
