"""The residual stream: add what a part of the network gives, and norm the sum for the next part.

By themselves a sum and a norm read and write the whole stream twice, and their gradients more often
still: the norm's, the sum of that with the one that goes past it, a rounded copy for the part.
Here it is one pass each way, where something learns; for the few rows of an answer's next token the
call would cost more than it saves, and the two give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.native import KINDS, Native, at, native_for
from qiusuo.kernels.norm import as_rows, native_gradients, native_norm, normed_dtype, rms_norm

# D width of the stream.


def add_and_norm_reference(
    x_D: Tensor, added_D: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + added, and its ``rms_norm``; nothing to add leaves x."""
    sum_D = x_D if added_D is None else x_D + added_D
    return sum_D, rms_norm(sum_D, weight_D, eps)


def add_and_norm(
    x_D: Tensor, added_D: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As ``add_and_norm_reference``, to the bit; ``added`` of x's shape, else ValueError. Gradients
    that meet in the sum are rounded once, there; each has the type of what it belongs to."""
    if added_D is not None and added_D.shape != x_D.shape:
        raise ValueError(
            f"{tuple(added_D.shape)} is added to {tuple(x_D.shape)}: give both one shape"
        )
    if torch.is_grad_enabled():
        with torch.no_grad():
            library = native_for(x_D)
        others = [weight_D.dtype, normed_dtype(x_D), *([] if added_D is None else [added_D.dtype])]
        if library is not None and all(dtype in KINDS for dtype in others):
            found: tuple[Tensor, Tensor] = _AddAndNorm.apply(x_D, added_D, weight_D, eps)
            return found
    return add_and_norm_reference(x_D, added_D, weight_D, eps)


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_D: Tensor, added_D: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        library = native_for(x_D)
        assert library is not None
        scale = x_D.new_empty(*x_D.shape[:-1], 1, dtype=torch.float32)
        sum_D, normed_D = _forward(library, x_D, added_D, weight_D, eps, scale)
        ctx.save_for_backward(sum_D, weight_D, scale)
        ctx.dtypes = x_D.dtype, None if added_D is None else added_D.dtype
        ctx.set_materialize_grads(False)
        return sum_D, normed_D

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_sum_D: Tensor | None, grad_normed_D: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_normed_D is None:
            grad_D, rounded_D, grad_weight_D = grad_sum_D, None, None
        else:
            sum_D, weight_D, scale = ctx.saved_tensors
            library = native_for(sum_D)
            assert library is not None
            grad_D, rounded_D, grad_weight_D = native_gradients(
                library, grad_normed_D, sum_D, weight_D, scale, grad_sum_D,
                also_rounded=sum_D.dtype is torch.float32 and torch.bfloat16 in ctx.dtypes,
            )  # fmt: skip
        own = [_in_type(dtype, grad_D, rounded_D) for dtype in ctx.dtypes]
        return *own, grad_weight_D, None


def _forward(
    library: Native,
    x_D: Tensor,
    added_D: Tensor | None,
    weight_D: Tensor,
    eps: float,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """``scale``: room for each row's 1/rms."""
    if added_D is None:
        return x_D, native_norm(library, x_D, weight_D, eps, normed_dtype(x_D), scale)
    sum_dtype = torch.promote_types(x_D.dtype, added_D.dtype)
    sum_D = torch.empty(x_D.shape, dtype=sum_dtype)
    normed_D = torch.empty(x_D.shape, dtype=normed_dtype(sum_D))
    x_RD, added_RD, weight_D = as_rows(x_D), as_rows(added_D), weight_D.contiguous()
    library.run(
        "qiusuo_add_rms_norm", at(x_RD), KINDS[x_D.dtype], x_RD.stride(0), at(added_RD),
        KINDS[added_D.dtype], added_RD.stride(0), at(weight_D), KINDS[weight_D.dtype], at(sum_D),
        at(normed_D), KINDS[normed_D.dtype], at(scale), len(x_RD), x_D.shape[-1], eps,
    )  # fmt: skip
    return sum_D, normed_D


def _in_type(
    dtype: torch.dtype | None, grad_D: Tensor | None, rounded_D: Tensor | None
) -> Tensor | None:
    """The gradient in the type of what it belongs to, None where that is nothing."""
    if dtype is None or grad_D is None:
        return None
    if rounded_D is not None and dtype is torch.bfloat16:
        return rounded_D
    return grad_D.to(dtype)
