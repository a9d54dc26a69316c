"""The latent cache: what a model remembers of the tokens it has read.

MLA needs one row per token and layer, [latent; rope key], never expanded keys and values. Rows of
a batch are right-aligned: shorter prompts start with padding, so every row grows at one place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qiusuo.model.config import ModelConfig

# L layers, B rows, S capacity, T new tokens, C latent, R rope width, X = C + R.


class LatentCache:
    """``entries`` [L, B, S, X]; the first ``length`` places of every row are filled."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.first_width = config.cache_parts[0]
        shape = (config.num_hidden_layers, rows, capacity, config.cache_width)
        self.entries_LBSX = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def layer(self, number: int) -> LayerCache:
        return LayerCache(self, number)

    def advance(self, tokens: int) -> None:
        """Count the tokens that all layers have appended."""
        self.length += tokens

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these rows only."""
        self.entries_LBSX = self.entries_LBSX[:, rows_B]


class LayerCache:
    """One layer's view, as the attention module wants it (``KeyValueStore``)."""

    def __init__(self, cache: LatentCache, number: int) -> None:
        self.cache, self.number = cache, number

    def append(self, latent_BTC: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor]:
        start = self.cache.length
        stop = start + latent_BTC.shape[1]
        entries_BSX = self.cache.entries_LBSX[self.number]
        width = self.cache.first_width
        entries_BSX[:, start:stop, :width] = latent_BTC
        entries_BSX[:, start:stop, width:] = k_rope_BTR
        seen_BSX = entries_BSX[:, :stop]
        return seen_BSX[..., :width], seen_BSX[..., width:]
