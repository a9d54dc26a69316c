"""The latent cache: what a model remembers of the tokens it has read.

MLA needs one row per token and layer, [latent; rope key], never expanded keys and values. Rows of
a batch are right-aligned: shorter prompts start with padding, so every row grows at one place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qiusuo.model.config import ModelConfig
from qiusuo.model.groups import Seen

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

    def group(self, tokens: int, mask_BTS: Tensor | None, absorbed: bool) -> CacheGroup:
        """All rows, with so many new tokens each."""
        return CacheGroup(self, self.entries_LBSX.shape[1], tokens, mask_BTS, absorbed)

    def advance(self, tokens: int) -> None:
        """Count the tokens that all layers have appended."""
        self.length += tokens

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these rows only."""
        self.entries_LBSX = self.entries_LBSX[:, rows_B]


@dataclass(frozen=True)
class CacheGroup:
    """The rows of a cache in one pass, as attention wants them (``model.groups.Group``)."""

    cache: LatentCache
    batch: int
    tokens: int
    mask_BTS: Tensor | None
    absorbed: bool

    def extend(self, layer: int, first_BTX: Tensor, second_BTY: Tensor) -> Seen:
        start = self.cache.length
        stop = start + self.tokens
        entries_BSZ = self.cache.entries_LBSX[layer]
        width = self.cache.first_width
        entries_BSZ[:, start:stop, :width] = first_BTX
        entries_BSZ[:, start:stop, width:] = second_BTY
        seen_BSZ = entries_BSZ[:, :stop]
        return Seen(seen_BSZ[..., :width], seen_BSZ[..., width:], seen_BSZ)
