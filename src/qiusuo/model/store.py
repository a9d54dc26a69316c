"""What attention asks of a cache, whatever its form."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

# B batch, T new tokens, X and Y the widths in ``ModelConfig.cache_parts``.


class KeyValueStore(Protocol):
    """One layer's share of a cache: takes the new tokens' two parts, gives back those of all
    tokens. The parts are latents and rope keys in MLA, keys and values elsewhere."""

    def append(self, first_BTX: Tensor, second_BTY: Tensor) -> tuple[Tensor, Tensor]: ...
