"""Rotary position embedding, with YaRN's and Llama's stretched frequencies.

A query and a key are turned by angles that grow with their positions, so that their product
depends on the distance only. A pair is turned as one complex number: adjacent elements (x0, x1) in
DeepSeek's checkpoints, (x0, x[R/2]) in Llama's and Qwen's. To stretch a context, the fast pairs are
kept, the slow ones slowed, and those between blended.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qiusuo.model.config import ModelConfig
from qiusuo.model.rope_scaling import LlamaScaling, YarnScaling

# B batch, T tokens, R rope width, P = R/2 pairs.


def frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair [P], float32."""
    width = config.rotary_dim
    pair_P = torch.arange(0, width, 2, dtype=torch.float32)
    plain_P = config.rope_theta ** (-pair_P / width)
    match config.rope_scaling:
        case YarnScaling() as yarn:
            return _yarn(plain_P, config.rope_theta, yarn)
        case LlamaScaling() as scaling:
            return _llama(plain_P, scaling)
    return plain_P


def _yarn(plain_P: Tensor, theta: float, yarn: YarnScaling) -> Tensor:
    """arXiv:2309.00071 §3.2-3.3."""
    pairs = len(plain_P)

    def turning_dim(rotations: float) -> float:
        """The (real-valued) pair number that turns this many times over the original context."""
        wavelengths = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return pairs * math.log(wavelengths) / math.log(theta)

    low = max(math.floor(turning_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(turning_dim(yarn.beta_slow)), 2 * pairs - 1)
    steepness = max(high - low, 0.001)  # a step where both ends fall together
    ramp_P = ((torch.arange(pairs) - low) / steepness).clamp(0, 1)
    return plain_P / yarn.factor * ramp_P + plain_P * (1 - ramp_P)


def _llama(plain_P: Tensor, scaling: LlamaScaling) -> Tensor:
    """Llama 3.1's released code: blend by how often a pair turns over the original context."""
    turns_P = scaling.original_max_position_embeddings * plain_P / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return plain_P * kept_P + plain_P / scaling.factor * (1 - kept_P)


def rotations(config: ModelConfig, positions_BT: Tensor) -> Tensor:
    """The complex turn of every pair at these positions [B, T, P] (or [T, P]), complex64."""
    frequencies_P = frequencies(config).to(positions_BT.device)
    angles_BTP = positions_BT.to(torch.float32)[..., None] * frequencies_P
    magnitude = 1.0
    if isinstance(yarn := config.rope_scaling, YarnScaling):
        magnitude = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim)
    return torch.polar(torch.full_like(angles_BTP, magnitude), angles_BTP)
