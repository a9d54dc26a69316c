"""How the next token is drawn from the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# B rows, W vocabulary.

TINY = 1e-20  # a lower temperature draws the same, until logits over it overflow float32


@dataclass(frozen=True)
class Sampling:
    """``temperature=0`` takes the likeliest token. ``top_k`` and ``top_p`` narrow what is drawn
    from; ``seed`` makes a row's draws the same whatever else is in the batch."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or a positive number, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in 0..2**64-1, not {self.seed}")


def choose(logits_BW: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """One token id per row [B]. ``uniforms``: a number in [0, 1) per row decides each draw."""
    if sampling.temperature == 0:
        return logits_BW.argmax(-1)
    probs_BW = (logits_BW / max(sampling.temperature, TINY)).softmax(-1)
    sorted_BW, ids_BW = probs_BW.sort(dim=-1, descending=True, stable=True)
    cumulative_BW = sorted_BW.cumsum(-1)
    # A token stays if the mass before it is still below top_p: the first always does.
    kept_BW = cumulative_BW - sorted_BW < sampling.top_p
    if sampling.top_k is not None:
        kept_BW[:, sampling.top_k :] = False
    cumulative_BW = torch.where(kept_BW, sorted_BW, 0).cumsum(-1)
    drawn_B = uniforms_B.to(cumulative_BW) * cumulative_BW[:, -1]
    place_B = torch.searchsorted(cumulative_BW, drawn_B[:, None], right=True).squeeze(1)
    last_B = kept_BW.sum(-1) - 1  # rounding must not step past the kept tokens
    return ids_BW.gather(1, torch.minimum(place_B, last_B)[:, None]).squeeze(1)
