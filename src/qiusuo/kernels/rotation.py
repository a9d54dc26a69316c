"""Turning pairs of numbers by angles: what rotary position embedding does to queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from qiusuo.kernels.native import native_for

# B batch, T tokens, H heads, R rope width, P = R/2 pairs.


def rotate_pairs_reference(x_BTHR: Tensor, turns_BTP: Tensor) -> Tensor:
    """Adjacent elements of ``x`` [B, T, H, R] turned by complex numbers; in float32, returned in
    x's type."""
    pairs = torch.view_as_complex(x_BTHR.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * turns_BTP.unsqueeze(-2)).flatten(-2)
    return turned.to(x_BTHR.dtype)


def rotate_pairs(x_BTHR: Tensor, turns_BTP: Tensor) -> Tensor:
    """As ``rotate_pairs_reference``; natively for one row of tokens, as the engine has them."""
    library = native_for(x_BTHR)
    plain = x_BTHR.shape[0] == len(turns_BTP) == 1 and turns_BTP.dtype is torch.complex64
    plain = plain and x_BTHR.stride(-1) == 1 and turns_BTP.is_contiguous()
    if library is None or not plain:
        return rotate_pairs_reference(x_BTHR, turns_BTP)
    return library.rotate_pairs(x_BTHR, turns_BTP)
