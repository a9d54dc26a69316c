"""How much better a response was than the others to the same question: GRPO's advantage.

A = (r − mean of its group) / scale (DeepSeekMath, arXiv:2402.03300 §4.1.2). Dividing by the group's
own deviation makes nearly solved and nearly hopeless questions count as much as those at the edge
of competence (Dr.GRPO, arXiv:2503.20783 §3.1), so the default divides by nothing. A group whose
rewards are all the same teaches nothing; it is named, so that another question may take its place.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

# P prompts, G responses to each, B responses.

EPS = 1e-4  # beside a deviation, as in TRL

Scale = Literal["none", "group", "batch"]


class Advantages(NamedTuple):
    values_PG: Tensor  # float32
    same_P: Tensor  # bool: every response to this prompt got the same reward


def group_advantages(rewards_PG: Tensor, scale: Scale = "none") -> Advantages:
    """Advantages of P groups of G ≥ 2 responses; exactly 0 in groups without variance.

    ``scale``: "group" divides by each group's deviation (of a sample, G−1: as TRL and verl do),
    "batch" by that of all centred rewards of the batch (ScaleRL, arXiv:2510.13786; TRL's "batch"
    takes the rewards as they are). ValueError where G < 2 or a reward is no number."""
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            f"rewards {tuple(rewards_PG.shape)}: [prompts, responses], two responses at least"
        )
    rewards_PG = rewards_PG.float()
    if not rewards_PG.isfinite().all():
        raise ValueError("rewards: every one must be a finite number")
    same_P = rewards_PG.amax(1) == rewards_PG.amin(1)
    values_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    values_PG = values_PG.masked_fill(same_P[:, None], 0)  # not the rounding of the mean
    if scale == "group":
        values_PG = values_PG / (rewards_PG.std(1, keepdim=True) + EPS)
    elif scale == "batch":
        values_PG = values_PG / (values_PG.std() + EPS)
    elif scale != "none":
        raise ValueError(f"scale {scale!r}: none, group or batch")
    return Advantages(values_PG, same_P)


def soft_overlong_penalty(lengths_B: Tensor, longest: int, buffer: int) -> Tensor:
    """What is added to the reward of a response of so many tokens: 0 up to ``longest − buffer``,
    from there falling evenly to −1 at ``longest`` (DAPO, arXiv:2503.14476 eq. 13)."""
    if not 0 < buffer <= longest:
        raise ValueError(f"buffer {buffer}: from 1 to the longest response, {longest}")
    return ((longest - buffer - lengths_B.float()) / buffer).clamp(-1, 0)
