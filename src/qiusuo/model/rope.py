"""Rotary position embedding on adjacent pairs, with YaRN's stretched frequencies.

A query and a key are turned by angles that grow with their positions, so that their product
depends on the distance only. DeepSeek turns the adjacent pairs (x0, x1), (x2, x3), ... as complex
numbers. YaRN keeps the fast pairs, slows the slow ones by ``factor`` and blends between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qiusuo.model.config import ModelConfig

# B batch, T tokens, R rope width, P = R/2 pairs.


def frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair [P], float32 (YaRN: arXiv:2309.00071 §3.2-3.3)."""
    width = config.qk_rope_head_dim
    pair_P = torch.arange(0, width, 2, dtype=torch.float32)
    plain_P = config.rope_theta ** (-pair_P / width)
    yarn = config.rope_scaling
    if yarn is None:
        return plain_P

    def turning_dim(rotations: float) -> float:
        """The (real-valued) pair number that turns this many times over the original context."""
        wavelengths = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    low = max(math.floor(turning_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(turning_dim(yarn.beta_slow)), width - 1)
    steepness = max(high - low, 0.001)  # a step where both ends fall together
    ramp_P = ((torch.arange(width // 2) - low) / steepness).clamp(0, 1)
    return plain_P / yarn.factor * ramp_P + plain_P * (1 - ramp_P)


def rotations(config: ModelConfig, positions_BT: Tensor) -> Tensor:
    """The complex turn of every pair at these positions [B, T, P] (or [T, P]), complex64."""
    frequencies_P = frequencies(config).to(positions_BT.device)
    angles_BTP = positions_BT.to(torch.float32)[..., None] * frequencies_P
    magnitude = 1.0
    if (yarn := config.rope_scaling) is not None:
        magnitude = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim)
    return torch.polar(torch.full_like(angles_BTP, magnitude), angles_BTP)


def rotate(x_BTHR: Tensor, turns_BTP: Tensor) -> Tensor:
    """Turn the pairs of ``x`` [B, T, H, R]; computed in float32, returned in x's type."""
    pairs = torch.view_as_complex(x_BTHR.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * turns_BTP.unsqueeze(-2)).flatten(-2)
    return turned.to(x_BTHR.dtype)
