"""Grouped-query attention (arXiv:2305.13245): several query heads share a key and a value head.

The cache keeps the keys and values of the few shared heads. Two forms, as in MLA: *expanded* gives
every query head a copy of its keys and values, for many queries at once; *shared* lets the heads
of a group be rows of one product with the keys they share, for decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qiusuo.kernels.attention import attention, shared_key_attention
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.groups import Group, cut
from qiusuo.model.layers import Linear
from qiusuo.model.rope import rotate_halves

# B batch, T new tokens, S tokens that can be seen, D hidden, H query heads, K key-value heads,
# G = H/K heads of a group, E head width, P = E/2.


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
        q_BTHE = rotate_halves(self._heads(self.q_proj(x_BTD)), turns_BTP)
        k_BTKE = rotate_halves(self._heads(self.k_proj(x_BTD)), turns_BTP)
        parts = (q_BTHE, k_BTKE.flatten(-2), self.v_proj(x_BTD))
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
        group = self.heads // self.shared_heads
        k_BHSE, v_BHSE = (
            x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k_BSKE, v_BSKE)
        )
        q_BHTE = q_BTHE.transpose(1, 2)
        return attention(q_BHTE, k_BHSE, v_BHSE, self.scale, mask_BTS).transpose(1, 2)

    def attend_shared(
        self, q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask_BTS: Tensor | None
    ) -> Tensor:
        """Every shared head is a row of its own, with the group's heads as its queries."""
        batch, shared = k_BSKE.shape[0], self.shared_heads
        q_RTGE = q_BTHE.unflatten(2, (shared, -1)).transpose(1, 2).flatten(0, 1)
        k_RSE, v_RSE = (x.transpose(1, 2).flatten(0, 1) for x in (k_BSKE, v_BSKE))
        if mask_BTS is not None:
            mask_BTS = mask_BTS.repeat_interleave(shared, dim=0)
        out_RTGE = shared_key_attention(q_RTGE, k_RSE, v_RSE, self.scale, mask_BTS)
        return out_RTGE.unflatten(0, (batch, shared)).transpose(1, 2).flatten(2, 3)
