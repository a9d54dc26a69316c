"""How the learning rate moves: a share of its peak for every step."""

from __future__ import annotations

import math

from qiusuo.training.sections import ScheduleSection


def learning_rate_share(schedule: ScheduleSection, step: int, steps: int) -> float:
    """Share of the peak, in (0, 1], at ``step`` (from 0) of ``steps``.

    wsd (MiniCPM, arXiv:2404.06395 §4): linear warm-up, a plateau, then a linear fall over the last
    ``decay_fraction`` of the steps. cosine: from warm-up's end to the last step.
    """
    # A run of few steps must not end before its rate has been up.
    warmup = min(schedule.warmup_steps, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    final = schedule.final_fraction
    if schedule.kind == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    left = (steps - step) / max(1.0, schedule.decay_fraction * steps)
    return final + (1 - final) * min(1.0, left)
