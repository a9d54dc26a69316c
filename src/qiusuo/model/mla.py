"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 §2.1).

A token leaves behind one small *latent* (``kv_lora_rank`` numbers) and one rotary key shared by
all heads. The keys and values of every head are linear images of the latent. Two forms compute
the same attention:

- **expanded**: make every head's keys and values, then attend as usual. Least arithmetic where
  many queries look at the same keys: training and prefill.
- **absorbed**: move a head's key matrix onto its query and its value matrix behind the softmax, and
  attend to the latents themselves. Nothing is expanded, so decoding reads 576 numbers per token
  and layer in V3 where keys and values would be 40,960.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qiusuo.kernels.attention import (
    attention,
    attention_by_tiles,
    shared_key_attention,
    tiles_of_mask,
)
from qiusuo.kernels.latent_attention import latent_attention, walks_pages
from qiusuo.kernels.low_bit import LowBit, dequantize, dequantize_bf16
from qiusuo.kernels.per_head import per_head
from qiusuo.kernels.rotation import rotate_pairs
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.groups import Group, Seen, cut
from qiusuo.model.layers import Linear, RMSNorm, project
from qiusuo.model.low_bit import LowBitLinear

# B batch, T new tokens, S tokens that can be seen, D hidden, H heads,
# N nope width, R rope width, C latent width (kv_lora_rank), V value width, P = R/2.

TILE = 512  # keys expanded at a time where no gradient is wanted
LATENT_NORM_EPS = 1e-6  # released code fixes it for these two norms, whatever the config says


class MultiHeadLatentAttention(nn.Module):
    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        self.scale = config.softmax_scale
        query_width = self.heads * config.qk_head_dim
        self.low_rank_query = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.cache_width, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(self.heads * self.value, config.hidden_size, bias=False)
        self.absorbed: tuple[Tensor | LowBit, ...] | None = None

    def forward(
        self, x_BTD: Tensor, turns_BTP: Tensor, groups: Sequence[Group], layer: int
    ) -> Tensor:
        """``turns``: RoPE of the new tokens' positions. ``layer``: whose cache grows."""
        to_query = self.q_a_proj if self.low_rank_query else self.q_proj
        query_BTX, cached_BTZ = project(x_BTD, to_query, self.kv_a_proj_with_mqa)
        parts = (*self.queries(query_BTX, turns_BTP), *self.latents(cached_BTZ, turns_BTP))
        outs = []
        for group, (q_nope_BTHN, q_rope_BTHR, latent_BTC, k_rope_BTR) in cut(groups, *parts):
            seen = group.extend(layer, latent_BTC, k_rope_BTR)
            attend = self.attend_absorbed if group.absorbed else self.attend_expanded
            outs.append(attend(q_nope_BTHN, q_rope_BTHR, seen, group.mask_BTS).flatten(0, 1))
        out_NHV = outs[0] if len(outs) == 1 else torch.cat(outs)
        out_BTD: Tensor = self.o_proj(out_NHV.flatten(1)).view_as(x_BTD)
        return out_BTD

    def queries(self, query_BTX: Tensor, turns_BTP: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's query, from it or from its low-rank form."""
        if self.low_rank_query:
            query_BTX = self.q_b_proj(self.q_a_layernorm(query_BTX))
        q_BTHE = query_BTX.unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope_BTHN, q_rope_BTHR = q_BTHE.split((self.nope, self.rope), dim=-1)
        return q_nope_BTHN, rotate_pairs(q_rope_BTHR, turns_BTP)

    def latents(self, cached_BTZ: Tensor, turns_BTP: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache keeps of each token: normed latent [B,T,C], turned rope key [B,T,R]."""
        latent_BTC, k_rope_BTR = cached_BTZ.split((self.latent, self.rope), dim=-1)
        k_rope_BTR = rotate_pairs(k_rope_BTR[:, :, None], turns_BTP)[:, :, 0]
        return self.kv_a_layernorm(latent_BTC), k_rope_BTR

    def attend_expanded(
        self,
        q_nope_BTHN: Tensor,
        q_rope_BTHR: Tensor,
        seen: Seen,
        mask_BTS: Tensor | None,
    ) -> Tensor:
        q_BHTE = torch.cat((q_nope_BTHN, q_rope_BTHR), -1).transpose(1, 2)
        if torch.is_grad_enabled() or seen.first_BSX.shape[1] <= TILE:
            k_BHSE, v_BHSV = self._expand(seen.first_BSX, seen.second_BSY)
            out_BHTV = attention(q_BHTE, k_BHSE, v_BHSV, self.scale, mask_BTS)
        else:
            tiles = self._tiles(seen, q_BHTE.shape[-2], mask_BTS)
            out_BHTV = attention_by_tiles(q_BHTE, tiles, self.scale)
        return out_BHTV.transpose(1, 2)

    def _expand(self, latent_BSC: Tensor, k_rope_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's keys [B, H, S, N+R] and values [B, H, S, V]."""
        kv_BSHX = self.kv_b_proj(latent_BSC).unflatten(-1, (self.heads, -1))
        k_nope_BSHN, v_BSHV = kv_BSHX.split((self.nope, self.value), dim=-1)
        k_rope_BSHR = k_rope_BSR[:, :, None].expand(-1, -1, self.heads, -1)
        k_BHSE = torch.cat((k_nope_BSHN, k_rope_BSHR), -1).transpose(1, 2)
        return k_BHSE, v_BSHV.transpose(1, 2)

    def _tiles(
        self, seen: Seen, queries: int, mask_BTS: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Keys and values a tile at a time: expanded, all of a long context would not fit."""
        latent_BSC, k_rope_BSR = seen.first_BSX, seen.second_BSY
        keys, device = latent_BSC.shape[1], latent_BSC.device
        for tile, mask_BTs in tiles_of_mask(queries, keys, TILE, mask_BTS, device):
            yield (*self._expand(latent_BSC[:, tile], k_rope_BSR[:, tile]), mask_BTs)

    def attend_absorbed(
        self,
        q_nope_BTHN: Tensor,
        q_rope_BTHR: Tensor,
        seen: Seen,
        mask_BTS: Tensor | None,
    ) -> Tensor:
        """All heads look at the same keys [latent; rope] and the same values [latent]. The values
        are taken from the keys as they stand, rope part too: copying them would cost more."""
        to_key_HCN, to_value_HVC = self.absorbed or self._halves()
        q_latent_BTHC = per_head(q_nope_BTHN, to_key_HCN)
        q_BTHE = torch.cat((q_latent_BTHC, q_rope_BTHR), -1)
        pages = seen.pages
        if pages is not None and walks_pages(q_BTHE, pages.entries_psW, self.latent):
            q_NHE = q_BTHE.flatten(0, 1)
            out_NHC = latent_attention(q_NHE, *pages, self.latent, self.scale)
            return per_head(out_NHC.view_as(q_latent_BTHC), to_value_HVC)
        k_BSE = seen.joined_BSZ
        if k_BSE is None:
            k_BSE = torch.cat((seen.first_BSX, seen.second_BSY), -1)
        k_BS1E = k_BSE[:, :, None]
        out_BTHE = shared_key_attention(q_BTHE, k_BS1E, k_BS1E, self.scale, mask_BTS)
        return per_head(out_BTHE[..., : self.latent], to_value_HVC)

    def absorb(self) -> None:
        """Keep every head's two matrices laid out for the absorbed form. Where ``kv_b_proj`` is in
        low bits, values keep their codes; keys, whose rows are others then, are numbers again: to
        round them once more would cost quality, and a start its first tenths of a second. To be
        called again when the weights have changed."""
        if not isinstance(self.kv_b_proj, LowBitLinear):
            to_key_HCN, to_value_HVC = (half.detach().contiguous() for half in self._halves())
            self.absorbed = to_key_HCN, to_value_HVC
            return
        packed = self.kv_b_proj.low_bit
        kv_b_HXC = dequantize_bf16(packed).unflatten(0, (self.heads, -1))
        to_key_HCN = kv_b_HXC[:, : self.nope].transpose(1, 2).contiguous()
        codes, scales = (
            part.unflatten(0, (self.heads, -1))[:, self.nope :].contiguous()
            for part in (packed.codes, packed.scales)
        )
        self.absorbed = to_key_HCN, LowBit(codes, scales, packed.columns)

    def _halves(self) -> tuple[Tensor, Tensor]:
        """What makes a key's part of the latent [H, C, N], and a value [H, V, C]."""
        weight = self.kv_b_proj
        kv_b = dequantize(weight.low_bit) if isinstance(weight, LowBitLinear) else weight.weight
        to_key_HNC, to_value_HVC = kv_b.unflatten(0, (self.heads, -1)).split(
            (self.nope, self.value), dim=1
        )
        return to_key_HNC.transpose(1, 2), to_value_HVC
