"""Softmax attention with queries and keys wider than values, as MLA makes them.

PyTorch's fused CPU kernel falls off its fast path when the widths differ, and its bf16 backward
is slow. Up to a few hundred tokens, plain matrix products per block of queries are faster: they
run at the machine's bf16 rate, and a block never looks past its own last token. Longer sequences
go through the fused kernel with the values padded to the keys' width; there memory stays linear as
long as no explicit mask is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

# B batch, H heads, N = B*H, X = T*H, T queries, S keys, E query/key width, V value width.

_NOTHING = -1e30  # the logarithm of next to nothing
QUERY_BLOCK = 128
LONGEST_PLAIN = 1024


def attention_reference(
    q_BHTE: Tensor, k_BHSE: Tensor, v_BHSV: Tensor, scale: float, mask_BTS: Tensor | None = None
) -> Tensor:
    """The equation in float32. ``mask``: true where a query may look; None means causal, with the
    last query on the last key."""
    scores_BHTS = q_BHTE.float() @ k_BHSE.float().transpose(-1, -2) * scale
    if mask_BTS is None:
        mask_BTS = causal_mask(q_BHTE.shape[-2], k_BHSE.shape[-2], q_BHTE.device)[None]
    scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], float("-inf"))
    return (scores_BHTS.softmax(-1) @ v_BHSV.float()).to(v_BHSV.dtype)


def attention(
    q_BHTE: Tensor, k_BHSE: Tensor, v_BHSV: Tensor, scale: float, mask_BTS: Tensor | None = None
) -> Tensor:
    """As ``attention_reference`` [B, H, T, V], by the faster way for this device and length."""
    queries, keys = q_BHTE.shape[-2], k_BHSE.shape[-2]
    if q_BHTE.device.type != "cpu" or keys > LONGEST_PLAIN:
        return _fused(q_BHTE, k_BHSE, v_BHSV, scale, mask_BTS)
    blocks = []
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        seen = keys - queries + stop if mask_BTS is None else keys
        blocks.append(
            _plain(
                q_BHTE[:, :, start:stop],
                k_BHSE[:, :, :seen],
                v_BHSV[:, :, :seen],
                scale,
                None if mask_BTS is None else mask_BTS[:, start:stop],
            )
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2)


def attention_by_tiles(
    q_BHTE: Tensor, tiles: Iterable[tuple[Tensor, Tensor, Tensor | None]], scale: float
) -> Tensor:
    """Attention [B, H, T, V] over keys and values that come a tile at a time, each as (k, v, mask):
    true where a query may look, None for everywhere. Only one tile is ever in memory.

    Each tile gives its own softmax's result and the logarithm of its sum; two tiles are joined by
    weighing their results with these sums (online softmax; FlashAttention, arXiv:2205.14135 §3.1).
    Without gradients. A query may see nothing of a tile; of all tiles nothing: zeros."""
    joined: tuple[Tensor, Tensor] | None = None
    for k_BHsE, v_BHsV, mask_BTs in tiles:
        out_BHTV, sum_BHT1 = _tile(q_BHTE, k_BHsE, v_BHsV, scale, mask_BTs)
        if joined is not None:
            before_BHTV, before_BHT1 = joined
            both_BHT1 = torch.logaddexp(before_BHT1, sum_BHT1)
            before_BHTV *= (before_BHT1 - both_BHT1).exp()
            out_BHTV = before_BHTV.add_(out_BHTV * (sum_BHT1 - both_BHT1).exp())
            sum_BHT1 = both_BHT1
        joined = out_BHTV, sum_BHT1
    assert joined is not None
    return joined[0].to(q_BHTE.dtype)


def _tile(
    q_BHTE: Tensor, k_BHSE: Tensor, v_BHSV: Tensor, scale: float, mask_BTS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(result [B, H, T, V], log of the softmax's sum [B, H, T, 1]) in float32."""
    if q_BHTE.device.type != "cpu" or v_BHSV.shape[-1] > q_BHTE.shape[-1]:
        scores_BHTS = (q_BHTE @ k_BHSE.transpose(-1, -2)).float() * scale
        if mask_BTS is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], -math.inf)
        sum_BHT1 = scores_BHTS.logsumexp(-1, keepdim=True).clamp_min(_NOTHING)
        weights_BHTS = (scores_BHTS - sum_BHT1).exp().to(v_BHSV.dtype)
        return (weights_BHTS @ v_BHSV).float(), sum_BHT1
    width = v_BHSV.shape[-1]
    added_BTS = None
    if mask_BTS is not None:
        zeros_BTS = torch.zeros_like(mask_BTS, dtype=q_BHTE.dtype)
        added_BTS = zeros_BTS.masked_fill_(~mask_BTS, -math.inf)[:, None]
    # The kernel behind scaled_dot_product_attention, asked for its sums too; widths must be equal.
    out_BHTE, sum_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHTE,
        k_BHSE,
        F.pad(v_BHSV, (0, q_BHTE.shape[-1] - width)),
        attn_mask=added_BTS,
        scale=scale,
    )
    sum_BHT1 = sum_BHT[..., None]
    if mask_BTS is not None:  # a query that sees nothing gets result and sum of zero
        sum_BHT1 = sum_BHT1.masked_fill(~mask_BTS.any(-1)[:, None, :, None], _NOTHING)
    return out_BHTE[..., :width].float(), sum_BHT1


def shared_key_attention(
    q_BTHE: Tensor, k_BSE: Tensor, v_BSV: Tensor, scale: float, mask_BTS: Tensor | None = None
) -> Tensor:
    """Attention [B, T, H, V] of many heads that share their keys and values, as absorbed MLA's do.

    The heads are rows of one product with the keys, so nothing is copied once per head."""
    queries, heads = q_BTHE.shape[1:3]
    if mask_BTS is None:
        mask_BTS = causal_mask(queries, k_BSE.shape[1], q_BTHE.device)[None]
    scores_BXS = torch.bmm(q_BTHE.flatten(1, 2) * scale, k_BSE.transpose(1, 2))
    scores_BTHS = scores_BXS.unflatten(1, (queries, heads))
    scores_BTHS = scores_BTHS.masked_fill(~mask_BTS[:, :, None], -math.inf)
    out_BXV = torch.bmm(scores_BTHS.softmax(-1).flatten(1, 2), v_BSV)
    return out_BXV.unflatten(1, (queries, heads))


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[T, S], true where a query may look; the last query stands on the last key."""
    ones_TS = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones_TS.tril(keys - queries)


def _plain(
    q_BHTE: Tensor, k_BHSE: Tensor, v_BHSV: Tensor, scale: float, mask_BTS: Tensor | None
) -> Tensor:
    batch, heads, queries, _ = q_BHTE.shape
    keys = k_BHSE.shape[-2]
    if mask_BTS is None:
        mask_BTS = causal_mask(queries, keys, q_BHTE.device)[None]
    # The product starts from 0 or −inf: one pass over the scores, where adding would be another.
    start_BTS = torch.zeros_like(mask_BTS, dtype=q_BHTE.dtype).masked_fill_(~mask_BTS, -math.inf)
    start_NTS = start_BTS[:, None].expand(batch, heads, queries, keys).reshape(-1, queries, keys)
    q_NTE, k_NSE, v_NSV = (
        x.reshape(batch * heads, *x.shape[-2:]) for x in (q_BHTE, k_BHSE, v_BHSV)
    )
    scores_NTS = torch.baddbmm(start_NTS, q_NTE, k_NSE.transpose(-1, -2), alpha=scale)
    out_NTV = torch.bmm(scores_NTS.softmax(-1), v_NSV)
    return out_NTV.unflatten(0, (batch, heads))


def _fused(
    q_BHTE: Tensor, k_BHSE: Tensor, v_BHSV: Tensor, scale: float, mask_BTS: Tensor | None
) -> Tensor:
    width, value_width = q_BHTE.shape[-1], v_BHSV.shape[-1]
    if value_width < width:
        v_BHSV = F.pad(v_BHSV, (0, width - value_width))
    elif value_width > width:
        q_BHTE = F.pad(q_BHTE, (0, value_width - width))
        k_BHSE = F.pad(k_BHSE, (0, value_width - width))
    whole = mask_BTS is None and q_BHTE.shape[-2] == k_BHSE.shape[-2]
    if mask_BTS is None and not whole:
        mask_BTS = causal_mask(q_BHTE.shape[-2], k_BHSE.shape[-2], q_BHTE.device)[None]
    out_BHTE = F.scaled_dot_product_attention(
        q_BHTE,
        k_BHSE,
        v_BHSV,
        attn_mask=None if mask_BTS is None else mask_BTS[:, None],
        is_causal=whole,
        scale=scale,
    )
    return out_BHTE[..., :value_width]
