"""Grouped-query attention (arXiv:2305.13245): several query heads share a key and a value head.

The cache keeps the keys and values of the few shared heads. Two forms, as in MLA: *expanded* lets
every query head look at its keys and values by itself, for many queries at once; *shared* lets the
heads of a group be rows of one product with the keys they share, for decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qiusuo.kernels.attention import (
    attention,
    attention_by_tiles,
    shared_key_attention,
    tiles_of_mask,
)
from qiusuo.kernels.rotation import rotate_halves
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.groups import Group, cut
from qiusuo.model.layers import Linear, project

# B batch, T new tokens, S tokens that can be seen, D hidden, H query heads, K key-value heads,
# G = H/K heads of a group, E head width, P = E/2.

TILE = 1024  # keys at a time where no gradient is wanted


class GroupedQueryAttention(nn.Module):
    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.heads, self.shared_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_dim
        self.scale = config.softmax_scale
        shared_width, bias = self.shared_heads * self.width, config.query_bias
        self.q_proj = Linear(config.hidden_size, self.heads * self.width, bias=bias)
        self.k_proj = Linear(config.hidden_size, shared_width, bias=bias)
        self.v_proj = Linear(config.hidden_size, shared_width, bias=bias)
        self.o_proj = Linear(self.heads * self.width, config.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, turns_BTP: Tensor, groups: Sequence[Group], layer: int
    ) -> Tensor:
        """As ``MultiHeadLatentAttention``; a group that is "absorbed" gets the form for few
        queries, the shared one."""
        q_BTW, k_BTX, v_BTX = project(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BTHE = rotate_halves(self._heads(q_BTW), turns_BTP)
        k_BTKE = rotate_halves(self._heads(k_BTX), turns_BTP)
        parts = (q_BTHE, k_BTKE.flatten(-2), v_BTX)
        outs = []
        for group, (q_part_BTHE, k_BTX, v_BTX) in cut(groups, *parts):
            seen = group.extend(layer, k_BTX, v_BTX)
            k_BSKE, v_BSKE = self._heads(seen.first_BSX), self._heads(seen.second_BSY)
            attend = self.attend_shared if group.absorbed else self.attend_expanded
            outs.append(attend(q_part_BTHE, k_BSKE, v_BSKE, group.mask_BTS).flatten(0, 1))
        out_NHE = outs[0] if len(outs) == 1 else torch.cat(outs)
        out_BTD: Tensor = self.o_proj(out_NHE.flatten(1)).view_as(x_BTD)
        return out_BTD

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.width))

    def attend_expanded(
        self, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask_BTS: Tensor | None
    ) -> Tensor:
        """Each query head for itself; without a gradient a tile of keys at a time."""
        q_BHTE, k_BKSE, v_BKSE = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
        if torch.is_grad_enabled():
            out_BHTE = attention(q_BHTE, k_BKSE, v_BKSE, self.scale, mask_BTS)
        else:
            queries, keys = q_BTHE.shape[1], k_BSKE.shape[1]
            parts = tiles_of_mask(queries, keys, TILE, mask_BTS, q_BTHE.device)
            tiles = ((k_BKSE[:, :, s], v_BKSE[:, :, s], mask_BTs) for s, mask_BTs in parts)
            out_BHTE = attention_by_tiles(q_BHTE, tiles, self.scale)
        return out_BHTE.transpose(1, 2)

    def attend_shared(
        self, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask_BTS: Tensor | None
    ) -> Tensor:
        return shared_key_attention(q_BTHE, k_BSKE, v_BSKE, self.scale, mask_BTS)
