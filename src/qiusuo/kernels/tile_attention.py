"""Softmax attention of many queries in bfloat16 on AMX, with gradients (native/amx_training_*.cpp).

Scores exist for a block of queries and keys at a time (FlashAttention, arXiv:2205.14135), in
float32 from product to softmax; beside the result one number per query is kept, from which the
backward pass finds the weights again. Memory is linear in the sequence. Queries and keys may be
wider than values, key heads fewer than query heads. Tensors are read and written where they
stand: results and gradients lie in memory as [B, T, H, X], as the projections around an attention
have them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import native
from qiusuo.kernels.signatures import View

# B batch, H query heads, K key heads, T queries, S keys, E query/key width, V value width.


def takes(scale: float, *tensors: Tensor) -> bool:
    """Whether the processor is one with AMX, and these tensors of the type and in the place that
    the kernel wants. A compiler cannot look into it: what it traces goes PyTorch's way."""
    if any(x.device.type != "cpu" or x.dtype != torch.bfloat16 for x in tensors):
        return False
    if scale <= 0 or torch.compiler.is_compiling():
        return False
    library = native()
    return library is not None and library.has_tiles


def tile_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSV: Tensor, scale: float, mask_BTS: Tensor | None = None
) -> Tensor:
    """``attention.attention`` [B, H, T, V]; only where ``takes``. A query that sees nothing gets
    zeros. A result does not depend on the number of threads, nor on what stands beside it."""
    q_BHTE, k_BKSE, v_BKSV, mask_BTS = _ready(q_BHTE, k_BKSE, v_BKSV, mask_BTS)
    out_BHTV: Tensor = _TileAttention.apply(q_BHTE, k_BKSE, v_BKSV, scale, mask_BTS)
    return out_BHTV


def tile_attention_by_tiles(
    q_BHTE: Tensor, tiles: Iterable[tuple[Tensor, Tensor, Tensor | None]], scale: float
) -> Tensor:
    """``attention.attention_by_tiles``; only where ``takes``, and without gradients."""
    batch, heads, queries, _ = q_BHTE.shape
    out_BHTV: Tensor | None = None
    sums_BHT = q_BHTE.new_full((batch, heads, queries), -math.inf, dtype=torch.float32)
    for k_BKsE, v_BKsV, mask_BTs in tiles:
        # No mask means that all is seen; to the kernel it would be causal.
        parts = _ready(
            q_BHTE, k_BKsE, v_BKsV, _everywhere(k_BKsE) if mask_BTs is None else mask_BTs
        )
        if out_BHTV is None:
            out_BTHV = q_BHTE.new_zeros(
                batch, queries, heads, v_BKsV.shape[-1], dtype=torch.float32
            )
            out_BHTV = out_BTHV.transpose(1, 2)
        _Call(*parts[:3], scale, parts[3]).forward(out_BHTV, sums_BHT, carried=True)
    assert out_BHTV is not None
    return out_BHTV.to(q_BHTE.dtype)


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHTE: Tensor,
        k_BKSE: Tensor,
        v_BKSV: Tensor,
        scale: float,
        mask_BTS: Tensor | None,
    ) -> Tensor:
        batch, heads, queries, _ = q_BHTE.shape
        out_BHTV = _like_projection(q_BHTE, v_BKSV.shape[-1])
        sums_BHT = q_BHTE.new_empty(batch, heads, queries, dtype=torch.float32)
        _Call(q_BHTE, k_BKSE, v_BKSV, scale, mask_BTS).forward(out_BHTV, sums_BHT)
        ctx.save_for_backward(q_BHTE, k_BKSE, v_BKSV, mask_BTS, out_BHTV, sums_BHT)
        ctx.scale = scale
        return out_BHTV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTE, k_BKSE, v_BKSV, mask_BTS, out_BHTV, sums_BHT = ctx.saved_tensors
        call = _Call(q_BHTE, k_BKSE, v_BKSV, ctx.scale, mask_BTS)
        made = tuple(_like_projection(x, x.shape[-1]) for x in (q_BHTE, k_BKSE, v_BKSV))
        call.backward(out_BHTV, sums_BHT, _rows(grads[0].to(out_BHTV.dtype)), *made)
        return *made, None, None


class _Call:
    """What both directions are told. All tensors bfloat16, gapless in their last dimension."""

    def __init__(
        self,
        q_BHTE: Tensor,
        k_BKSE: Tensor,
        v_BKSV: Tensor,
        scale: float,
        mask_BTS: Tensor | None,
    ) -> None:
        (B, H, T, E), (K, S), V = q_BHTE.shape, k_BKSE.shape[1:3], v_BKSV.shape[-1]
        library = native()
        assert library is not None
        self.library = library.library
        library.begin()
        mask_BHTS = None if mask_BTS is None else mask_BTS[:, None]
        self.inputs = [_view(q_BHTE), _view(k_BKSE), _view(v_BKSV), _view(mask_BHTS)]
        self.sizes = (B, H, K, T, S, E, V, scale)

    def forward(self, out_BHTV: Tensor, sums_BHT: Tensor, carried: bool = False) -> None:
        self.library.qiusuo_attend(
            *self.inputs, _view(out_BHTV), sums_BHT.data_ptr(), carried, *self.sizes
        )

    def backward(self, out_BHTV: Tensor, sums_BHT: Tensor, *grads: Tensor) -> None:
        """``grads``: of the result, then room for those of q, k and v."""
        self.library.qiusuo_attend_backward(
            *self.inputs, _view(out_BHTV), sums_BHT.data_ptr(), *map(_view, grads), *self.sizes
        )


def _ready(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSV: Tensor, mask_BTS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same, as the kernel reads them. ValueError for what does not fit together: it would read
    beyond their ends."""
    (B, H, T, E), (K, S), V = q_BHTE.shape, k_BKSE.shape[1:3], v_BKSV.shape[-1]
    if k_BKSE.shape != (B, K, S, E) or v_BKSV.shape != (B, K, S, V) or H % K:
        raise ValueError(
            f"queries {tuple(q_BHTE.shape)}, keys {tuple(k_BKSE.shape)} and values "
            f"{tuple(v_BKSV.shape)} do not fit: [B, H, T, E], [B, K, S, E], [B, K, S, V], K into H"
        )
    if any(x.dtype != torch.bfloat16 or x.device.type != "cpu" for x in (q_BHTE, k_BKSE, v_BKSV)):
        raise ValueError("queries, keys and values must be bfloat16 on the CPU, all three")
    if mask_BTS is not None:
        if mask_BTS.dtype != torch.bool:
            raise ValueError(
                f"the mask must be bool, true where a query may look: {mask_BTS.dtype}"
            )
        mask_BTS = _rows(mask_BTS.expand(B, T, S))
    return _rows(q_BHTE), _rows(k_BKSE), _rows(v_BKSV), mask_BTS


def _everywhere(k_BKsE: Tensor) -> Tensor:
    return torch.ones(1, 1, k_BKsE.shape[2], dtype=torch.bool)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _like_projection(x_BHTX: Tensor, width: int) -> Tensor:
    """Room for a result [B, H, T, width] that lies in memory as [B, T, H, width]."""
    batch, heads, rows, _ = x_BHTX.shape
    return x_BHTX.new_empty(batch, rows, heads, width).transpose(1, 2)


def _view(x_BHTX: Tensor | None) -> View | None:
    if x_BHTX is None:
        return None
    batch, head, row, _ = x_BHTX.stride()
    return View(x_BHTX.data_ptr(), batch, head, row)
