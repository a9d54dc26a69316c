"""Turning pairs of numbers by angles: what rotary position embedding does to queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import KINDS, Native, at, native_for

# B batch, T tokens, H heads, R rope width, P = R/2 pairs.


def rotate_pairs_reference(x_BTHR: Tensor, turns_BTP: Tensor) -> Tensor:
    """Adjacent elements of ``x`` [B, T, H, R] turned by complex numbers; in float32, returned in
    x's type. ``turns`` may have one row for all B."""
    pairs = torch.view_as_complex(x_BTHR.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * turns_BTP.unsqueeze(-2)).flatten(-2)
    return turned.to(x_BTHR.dtype)


def rotate_halves_reference(x_BTHR: Tensor, turns_BTP: Tensor) -> Tensor:
    """As ``rotate_pairs_reference``, for pairs of elements p and p + R/2."""
    first, second = x_BTHR.float().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turns_BTP.unsqueeze(-2)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x_BTHR.dtype)


def rotate_pairs(x_BTHR: Tensor, turns_BTP: Tensor) -> Tensor:
    """As ``rotate_pairs_reference``; natively in one pass, where x stands in what a projection
    made. Backward, pairs are turned the other way."""
    return _rotate(x_BTHR, turns_BTP, halves=False)


def rotate_halves(x_BTHR: Tensor, turns_BTP: Tensor) -> Tensor:
    """As ``rotate_halves_reference``, in the same ways as ``rotate_pairs``."""
    return _rotate(x_BTHR, turns_BTP, halves=True)


def _rotate(x_BTHR: Tensor, turns_BTP: Tensor, halves: bool) -> Tensor:
    with torch.no_grad():
        library = native_for(x_BTHR)
    plain = turns_BTP.dtype is torch.complex64 and turns_BTP.is_contiguous()
    if library is None or not plain or turns_BTP.shape[:2] not in _shapes(x_BTHR):
        reference = rotate_halves_reference if halves else rotate_pairs_reference
        return reference(x_BTHR, turns_BTP)
    if torch.is_grad_enabled() and x_BTHR.requires_grad:
        out_BTHR: Tensor = _Rotation.apply(x_BTHR, turns_BTP, halves)
        return out_BTHR
    return _turned(library, x_BTHR, turns_BTP, halves, back=False)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHR: Tensor, turns_BTP: Tensor, halves: bool) -> Tensor:
        library = native_for(x_BTHR)
        assert library is not None
        ctx.library, ctx.turns_BTP, ctx.halves = library, turns_BTP, halves
        return _turned(library, x_BTHR, turns_BTP, halves, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_BTHR = _turned(ctx.library, grads[0], ctx.turns_BTP, ctx.halves, back=True)
        return grad_BTHR, None, None


def _shapes(x_BTHR: Tensor) -> tuple[tuple[int, int], ...]:
    """Of turns that go with x: for every row, or one for all."""
    rows, tokens = x_BTHR.shape[:2]
    return (rows, tokens), (1, tokens)


def _turned(library: Native, x_BTHR: Tensor, turns_BTP: Tensor, halves: bool, back: bool) -> Tensor:
    B, T, H, R = x_BTHR.shape
    even = B == 1 or x_BTHR.stride(0) == T * x_BTHR.stride(1)  # rows at one distance
    if x_BTHR.stride(-1) != 1 or not even:
        x_BTHR = x_BTHR.contiguous()
    out_BTHR = x_BTHR.new_empty(B, T, H, R)
    library.run(
        "qiusuo_rotate", at(x_BTHR), KINDS[x_BTHR.dtype], at(turns_BTP), turns_BTP.shape[0] * T,
        halves, back, at(out_BTHR), B * T, H, R, x_BTHR.stride(1), x_BTHR.stride(2),
    )  # fmt: skip
    return out_BTHR
