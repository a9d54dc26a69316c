"""The small parts every block is made of: RMSNorm, projections and the SwiGLU network."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from qiusuo.kernels.fp8 import Scales, fp8_linear
from qiusuo.kernels.linear import linear
from qiusuo.kernels.norm import rms_norm
from qiusuo.kernels.residual import add_and_norm
from qiusuo.kernels.swiglu import swiglu
from qiusuo.kernels.tile_linear import gain_by_tiles, tile_linears
from qiusuo.kernels.tile_mlp import fit_tiles, tile_mlp, tiles_learn

# B batch, T tokens, D hidden, F intermediate.


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


class ResidualNorm(RMSNorm):
    """The norm of a residual stream, which does the sum before it too: (sum, normed) of the stream
    and what the part before adds to it (None: nothing yet)."""

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, added_BTD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return add_and_norm(x_BTD, added_BTD, self.weight, self.eps)


class Linear(nn.Linear):
    """``rows``: compute in products of always so many rows; see ``Transformer.fix_rows``.
    ``fp8``: compute in FP8 with such scales; see ``in_fp8``."""

    rows: int | None = None
    fp8: Scales | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.fp8 is not None:
            return fp8_linear(input, self.weight, self.bias, self.fp8)
        weights = _weights_for_tiles(input, self)
        if gain_by_tiles(*weights):
            return tile_linears(input, *weights)[0]
        return linear(input, self.weight, self.bias, self.rows)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each layer makes of x, in one call where that is faster."""
    weights = _weights_for_tiles(x, *layers)
    if gain_by_tiles(*weights):
        return tile_linears(x, *weights)
    return tuple(layer(x) for layer in layers)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate x) · up x), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        weights = _weights_for_tiles(x_BTD, self.gate_proj, self.up_proj, self.down_proj)
        if weights:
            return tile_mlp(x_BTD, *weights)
        out_BTD: Tensor = self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
        return out_BTD


def _weights_for_tiles(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The layers' weights, where kernels on tiles may take them; else none."""
    if not tiles_learn(x):
        return ()
    weights = tuple(layer.weight for layer in layers if _is_only_its_weight(layer))
    return weights if len(weights) == len(layers) and fit_tiles(*weights) else ()


def _is_only_its_weight(layer: nn.Module) -> TypeGuard[Linear]:
    """Whether calling the layer means no more than a product with its weight."""
    if type(layer) is not Linear or layer.fp8 is not None or layer.rows is not None:
        return False
    return layer.bias is None and not layer._forward_hooks and not layer._forward_pre_hooks
