"""Named recipes of reinforcement learning: which value, and who says so.

What a paper does not say is ours, and marked so. Learning rates are not here: those of billions of
parameters do not carry over to a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qiusuo.training.rl.advantages import Scale
from qiusuo.training.rl.policy_loss import PolicyOptions


@dataclass(frozen=True)
class Preset:
    """``same_groups``: groups whose rewards are all the same are kept, dropped, or dropped and
    others drawn for them ("refill"). ``overlong``: a response that was cut off counts with its
    reward ("reward"), is masked ("mask"), or is punished from a buffer on ("soft"). ``updates`` of
    the weights per batch of rollouts. ``refresh_reference``: steps after which the reference
    becomes the policy (None: never)."""

    paper: str
    loss: PolicyOptions
    scale: Scale
    group_size: int
    same_groups: Literal["keep", "drop", "refill"]
    overlong: Literal["reward", "mask", "soft"]
    updates: int
    refresh_reference: int | None
    sources: dict[str, str]  # the place of each value


PRESETS: dict[str, Preset] = {
    "ours": Preset(
        paper="DAPO's clip and token mean, Dr.GRPO's plain advantage; strictly on-policy",
        loss=PolicyOptions(clip_low=0.2, clip_high=0.28),
        scale="none",
        group_size=8,
        same_groups="refill",
        overlong="mask",
        updates=1,
        refresh_reference=None,
        sources={
            "clip": "DAPO §4.1",
            "aggregation": "DAPO eq. 8",
            "scale": "Dr.GRPO §3.2",
            "same_groups": "DAPO §3.2",
            "overlong": "DAPO §3.4",
            "group_size, updates": "ours",
        },
    ),
    "r1": Preset(
        paper="DeepSeek-R1, arXiv:2501.12948v2 (Nature 645, 633) and its supplement",
        loss=PolicyOptions(clip_low=10.0, clip_high=10.0, aggregation="sequence", kl=0.001),
        scale="group",
        group_size=16,
        same_groups="keep",
        overlong="reward",
        updates=16,
        refresh_reference=400,
        sources={
            "clip": "first RL stage of R1: ε = 10; 1 − ε < 0, so only ρ > 11 is clipped",
            "aggregation": "DeepSeekMath (arXiv:2402.03300) eq. 3: mean over o, then over G",
            "kl": "R1-Zero's training details: 0.001, k3 of DeepSeekMath eq. 4",
            "scale": "eq. 3: (r − mean)/std",
            "group_size, updates": "16 samples a question; 8,192 rollouts in 16 minibatches",
            "refresh_reference": "every 400 steps",
            "same_groups, overlong": "ours: nothing said",
        },
    ),
    "dr_grpo": Preset(
        paper="Dr.GRPO, arXiv:2503.20783",
        loss=PolicyOptions(clip_low=0.2, clip_high=0.2, aggregation="constant"),
        scale="none",
        group_size=8,
        same_groups="keep",
        overlong="reward",
        updates=1,
        refresh_reference=None,
        sources={
            "clip": "the customary 0.2 (default of TRL and verl)",
            "aggregation": "§3.2 and listing 1: sum over tokens / constant budget",
            "kl": "published script: β = 0",
            "scale": "§3.2: without std",
            "group_size": "published script: 8 samples",
            "updates, same_groups, overlong": "ours",
        },
    ),
    "dapo": Preset(
        paper="DAPO, arXiv:2503.14476",
        loss=PolicyOptions(clip_low=0.2, clip_high=0.28),
        scale="group",
        group_size=16,
        same_groups="refill",
        overlong="soft",
        updates=16,
        refresh_reference=None,
        sources={
            "clip": "§4.1: 0.2 / 0.28, eq. 10",
            "aggregation": "eq. 12: mean over all tokens of the group",
            "kl": "§2.3: none",
            "scale": "eq. 9",
            "same_groups": "§3.2, eq. 11",
            "overlong": "§3.4, eq. 13: a buffer of a fifth of the longest (4,096 of 20,480)",
            "group_size, updates": "§4.1: 16 samples, 16 updates a rollout step",
        },
    ),
    "cispo": Preset(
        paper="MiniMax-M1, arXiv:2506.13585; ε_max as ScaleRL, arXiv:2510.13786",
        loss=PolicyOptions(ratio="cispo", clip_low=None, clip_high=4.0),
        scale="group",
        group_size=16,
        same_groups="drop",
        overlong="reward",
        updates=16,
        refresh_reference=None,
        sources={
            "clip": "M1 §3.1: no lower bound, the upper is tuned and not told; "
            "ScaleRL's ε_max: ρ at most 5",
            "aggregation": "M1 eq. 4: mean over all tokens of the group",
            "kl": "M1 §3.1: none",
            "scale": "M1 eq. 2 (GRPO's)",
            "updates": "M1 §3.1: 16 rounds of off-policy updates",
            "same_groups": "ScaleRL: zero-variance filtering",
            "group_size": "ScaleRL: 16 samples a prompt",
            "overlong": "ours",
        },
    ),
    "gspo": Preset(
        paper="GSPO, arXiv:2507.18071v2",
        loss=PolicyOptions(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence"),
        scale="group",
        group_size=8,
        same_groups="keep",
        overlong="reward",
        updates=4,
        refresh_reference=None,
        sources={
            "clip": "§5.1: 3e-4 / 4e-4, on the ratio of eq. 7",
            "aggregation": "eq. 5: mean over responses",
            "kl": "none in eq. 5",
            "scale": "eq. 6",
            "updates": "§5.1: a batch of rollouts in four minibatches",
            "group_size, same_groups, overlong": "ours: nothing said",
        },
    ),
}
