"""Softmax attention with queries and keys wider than values, as MLA makes them.

Where there is AMX, bfloat16 goes to a kernel of our own (``tile_attention``). What follows here is
for everything else, and its reference. PyTorch's fused CPU kernel falls off its fast path when the
widths differ, and its bf16 backward is slow. Up to a few hundred tokens, plain matrix products per
block of queries are faster: they run at the machine's bf16 rate, and a block never looks past its
own last token. Longer sequences go through the fused kernel with the values padded to the keys'
width; there memory stays linear as long as no explicit mask is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qiusuo.kernels.tile_attention import takes, tile_attention, tile_attention_by_tiles

# B batch, H heads, K key heads, G = H/K, T queries, S keys, E query/key width, V value width,
# N = B*H, X = T*G, p pieces, h either 1 or H.

_NOTHING = -1e30  # the logarithm of next to nothing
QUERY_BLOCK = 128
LONGEST_PLAIN = 1024
PIECE = 1024  # keys of a long context that are one piece of work


def attention_reference(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSV: Tensor, scale: float, mask_BTS: Tensor | None = None
) -> Tensor:
    """The equation in float32. Keys of K heads serve H/K query heads each, in a row. ``mask``: true
    where a query may look; None means causal, with the last query on the last key."""
    k_BHSE, v_BHSV = _for_every_head(q_BHTE, k_BKSE, v_BKSV)
    scores_BHTS = q_BHTE.float() @ k_BHSE.float().transpose(-1, -2) * scale
    if mask_BTS is None:
        mask_BTS = causal_mask(q_BHTE.shape[-2], k_BHSE.shape[-2], q_BHTE.device)[None]
    scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], float("-inf"))
    return (scores_BHTS.softmax(-1) @ v_BHSV.float()).to(v_BHSV.dtype)


def attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSV: Tensor, scale: float, mask_BTS: Tensor | None = None
) -> Tensor:
    """As ``attention_reference`` [B, H, T, V], by the fastest way for this processor and length."""
    if takes(scale, q_BHTE, k_BKSE, v_BKSV):
        return tile_attention(q_BHTE, k_BKSE, v_BKSV, scale, mask_BTS)
    k_BHSE, v_BHSV = _for_every_head(q_BHTE, k_BKSE, v_BKSV)
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
    true where a query may look, None for everywhere. Only one tile is ever in memory. Keys of K
    heads serve H/K query heads each, in a row, and are not copied for them.

    Each tile gives its own softmax's result and the logarithm of its sum; two tiles are joined by
    weighing their results with these sums (online softmax; FlashAttention, arXiv:2205.14135 §3.1).
    Without gradients. A query may see nothing of a tile; of all tiles nothing: zeros."""
    if takes(scale, q_BHTE):
        return tile_attention_by_tiles(q_BHTE, tiles, scale)
    return _join_tiles(q_BHTE, tiles, scale)


def _join_tiles(
    q_BHTE: Tensor, tiles: Iterable[tuple[Tensor, Tensor, Tensor | None]], scale: float
) -> Tensor:
    joined: tuple[Tensor, Tensor] | None = None
    for k_BKsE, v_BKsV, mask_BTs in tiles:
        mask_BhTs = None if mask_BTs is None else mask_BTs[:, None]
        out_BHTV, sum_BHT = _tile(q_BHTE, k_BKsE, v_BKsV, scale, mask_BhTs)
        if joined is not None:
            before_BHTV, before_BHT = joined[0].float(), joined[1]
            both_BHT = torch.logaddexp(before_BHT, sum_BHT)
            before_BHTV *= (before_BHT - both_BHT).exp()[..., None]
            out_BHTV = before_BHTV.add_(out_BHTV * (sum_BHT - both_BHT).exp()[..., None])
            sum_BHT = both_BHT
        joined = out_BHTV, sum_BHT
    assert joined is not None
    return joined[0].to(q_BHTE.dtype)


def tiles_of_mask(
    queries: int, keys: int, size: int, mask_BTS: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, Tensor | None]]:
    """The keys of every tile and its part of the mask [B, T, s]; None for all to be seen. Without
    a mask: causal, with the last query on the last key."""
    for start in range(0, keys, size):
        tile = slice(start, min(start + size, keys))
        if mask_BTS is not None:
            yield tile, mask_BTS[..., tile]
        elif tile.stop <= keys - queries + 1:  # before every query
            yield tile, None
        else:
            ones_Ts = torch.ones(queries, tile.stop - start, dtype=torch.bool, device=device)
            yield tile, ones_Ts.tril(keys - queries - start)[None]


def shared_key_attention(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKV: Tensor, scale: float, mask_BTS: Tensor | None = None
) -> Tensor:
    """Attention [B, T, H, V] of heads that share keys and values in groups of H/K, as those of
    absorbed MLA do (K = 1: all of them) and of grouped-query attention. For few queries and many
    keys; without gradients.

    Queries and heads of a group are rows of one product, so no key is copied or read once per
    head. The keys go by blocks, so the scores are never in memory at once. Where there are no
    other sequences to keep all cores busy, pieces of the keys are worked on side by side and
    joined at the end (Flash-Decoding). The cut depends on T and S alone."""
    queries, keys, shared = q_BTHE.shape[1], k_BSKE.shape[1], k_BSKE.shape[2]
    q_BKXE = q_BTHE.unflatten(2, (shared, -1)).transpose(1, 2).flatten(2, 3)
    pieces = (keys - queries) // PIECE  # every query sees all of them, and one key or more is left
    if len(q_BTHE) > 1 or mask_BTS is not None or pieces < 2:
        tiles = _tiles_of_rows(q_BTHE, k_BSKE, v_BSKV, mask_BTS)
        # A row for each head: too few heads to keep the cores busy with AMX's spans of queries.
        out_BKXV = _join_tiles(q_BKXE, tiles, scale)
    else:
        out_BKXV = _in_pieces(q_BKXE, k_BSKE, v_BSKV, scale, pieces, queries)
    return out_BKXV.unflatten(2, (queries, -1)).transpose(1, 2).flatten(2, 3)


def _tiles_of_rows(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKV: Tensor, mask_BTS: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """For ``attention_by_tiles`` of rows [T*G]. A mask is as wide as the scores unless there is one
    query, whose heads all see the same: then all keys are one tile, which is faster."""
    (queries, heads), (keys, shared) = q_BTHE.shape[1:3], k_BSKE.shape[1:3]
    size, group = (keys, 1) if queries == 1 else (PIECE, heads // shared)
    for tile, mask_BTs in tiles_of_mask(queries, keys, size, mask_BTS, q_BTHE.device):
        mask_BXs = None if mask_BTs is None else mask_BTs.repeat_interleave(group, dim=1)
        yield k_BSKE[:, tile].transpose(1, 2), v_BSKV[:, tile].transpose(1, 2), mask_BXs


def _in_pieces(
    q_1KXE: Tensor, k_1SKE: Tensor, v_1SKV: Tensor, scale: float, pieces: int, queries: int
) -> Tensor:
    """The result [1, K, X, V] from so many pieces side by side, and one with the rest."""
    cut, group = pieces * PIECE, q_1KXE.shape[2] // queries
    k_pKsE, v_pKsV = (
        x[0, :cut].unflatten(0, (pieces, PIECE)).transpose(1, 2) for x in (k_1SKE, v_1SKV)
    )
    out_pKXV, sum_pKX = _tile(q_1KXE.expand(pieces, -1, -1, -1), k_pKsE, v_pKsV, scale, None)
    k_1KsE, v_1KsV = (x[:, cut:].transpose(1, 2) for x in (k_1SKE, v_1SKV))
    mask_11Xs = None
    if queries > 1:
        mask_Ts = causal_mask(queries, k_1KsE.shape[2], q_1KXE.device)
        mask_11Xs = mask_Ts.repeat_interleave(group, dim=0)[None, None]
    out_1KXV, sum_1KX = _tile(q_1KXE, k_1KsE, v_1KsV, scale, mask_11Xs)
    weights_pKX = torch.cat((sum_pKX, sum_1KX)).softmax(0)
    out_pKXV = torch.cat((out_pKXV, out_1KXV)) * weights_pKX[..., None]
    return out_pKXV.sum(0, keepdim=True).to(q_1KXE.dtype)


def _tile(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSV: Tensor, scale: float, mask_BhTS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(result [B, H, T, V], log of the softmax's sum [B, H, T]), at least the latter in float32.
    Each of K key heads serves H/K heads in a row; ``mask``: may be 1 where it is the same."""
    width, value_width = q_BHTE.shape[-1], v_BKSV.shape[-1]
    if q_BHTE.device.type != "cpu" or value_width > width:
        return _tile_in_one_piece(q_BHTE, k_BKSE, v_BKSV, scale, mask_BhTS)
    if value_width < width:
        v_BKSV = F.pad(v_BKSV, (0, width - value_width))
    added_BhTS = None
    if mask_BhTS is not None:
        zeros_BhTS = torch.zeros_like(mask_BhTS, dtype=q_BHTE.dtype)
        added_BhTS = zeros_BhTS.masked_fill_(~mask_BhTS, -math.inf)
    # The kernel behind scaled_dot_product_attention, asked for its sums too; widths must be equal.
    out_BHTE, sum_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHTE, k_BKSE, v_BKSV, attn_mask=added_BhTS, scale=scale
    )
    if mask_BhTS is not None:  # a query that sees nothing gets result and sum of zero
        sum_BHT = sum_BHT.masked_fill(~mask_BhTS.any(-1), _NOTHING)
    return out_BHTE[..., :value_width], sum_BHT


def _tile_in_one_piece(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSV: Tensor, scale: float, mask_BhTS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``_tile`` by its equations, for other devices and for values wider than keys."""
    k_BHSE, v_BHSV = _for_every_head(q_BHTE, k_BKSE, v_BKSV)
    scores_BHTS = (q_BHTE @ k_BHSE.transpose(-1, -2)).float() * scale
    if mask_BhTS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_BhTS, -math.inf)
    sum_BHT = scores_BHTS.logsumexp(-1).clamp_min(_NOTHING)
    weights_BHTS = (scores_BHTS - sum_BHT[..., None]).exp().to(v_BHSV.dtype)
    return weights_BHTS @ v_BHSV, sum_BHT


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """[T, S], true where a query may look; the last query stands on the last key."""
    ones_TS = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones_TS.tril(keys - queries)


def _for_every_head(q_BHTE: Tensor, *tensors_BKSX: Tensor) -> tuple[Tensor, ...]:
    group = q_BHTE.shape[1] // tensors_BKSX[0].shape[1]
    return tuple(x if group == 1 else x.repeat_interleave(group, dim=1) for x in tensors_BKSX)


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
