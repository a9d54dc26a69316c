"""The rows of a mixture: (token, expert) pairs sorted by expert, and brought home again.

Sorted once, every expert's rows are one segment, which one matrix product takes. A token's K
results are added in the order of its choices, in float32: the same bits every time.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qiusuo.kernels.native import KINDS, at, native, native_for

# M tokens, K experts per token, P = M*K pairs, R rows (the pairs sorted, some of them padding),
# E experts, D width of a row.


class Layout(NamedTuple):
    """Where the pairs stand once sorted. ``place_P``: the row of each pair; ``pair_R``: the pair of
    each row, −1 in padding; ``starts``: each expert's first row, and the end [E+1]."""

    place_P: Tensor
    pair_R: Tensor
    starts: Tensor

    def segments(self) -> list[tuple[int, int, int]]:
        """Every expert that has rows: its number, first row, last row + 1."""
        pairs = enumerate(pairwise(self.starts.tolist()))
        return [(e, start, stop) for e, (start, stop) in pairs if stop > start]


def sort_by_expert(indices_MK: Tensor, experts: int, filled: bool = True) -> Layout:
    """``filled``: round segments up to a few sizes; the rows between are zeros of weight zero, so
    they add nothing. IndexError for an expert that is none of them."""
    pairs = indices_MK.numel()
    library = None
    if indices_MK.device.type == "cpu" and not torch.compiler.is_compiling():
        library = native()
    if library is None or indices_MK.dtype is not torch.int64:
        return sort_by_expert_reference(indices_MK, experts, filled)
    place_P = indices_MK.new_empty(pairs)
    pair_R = indices_MK.new_empty(pairs + (pairs // 8 + experts if filled else 0))
    starts = indices_MK.new_empty(experts + 1)
    indices_MK = indices_MK.contiguous()
    if not library.library.qiusuo_sort_pairs(
        at(indices_MK), pairs, experts, filled, at(place_P), at(pair_R), at(starts)
    ):
        raise IndexError(f"experts are numbered from 0 to {experts - 1}, another was chosen")
    return Layout(place_P, pair_R[: int(starts[-1])], starts)


def sort_by_expert_reference(indices_MK: Tensor, experts: int, filled: bool = True) -> Layout:
    """The same, by PyTorch's own sort."""
    expert_P = indices_MK.flatten()
    order_P = torch.argsort(expert_P, stable=True)
    rows, shifts, shift = [0], [], 0
    for count in torch.bincount(expert_P, minlength=experts).tolist():
        room = _round_up(count) if filled else count
        shifts.append(shift)
        rows.append(rows[-1] + room)
        shift += room - count
    place_sorted_P = torch.arange(order_P.numel(), device=order_P.device)
    place_sorted_P += torch.tensor(shifts, device=order_P.device)[expert_P[order_P]]
    place_P = torch.empty_like(order_P)
    place_P[order_P] = place_sorted_P
    pair_R = order_P.new_full((rows[-1],), -1)
    pair_R[place_sorted_P] = order_P
    return Layout(place_P, pair_R, torch.tensor(rows))


def _round_up(count: int) -> int:
    """The next of eight sizes per doubling. PyTorch's bf16 products compile code for every new
    shape (about 1 ms each); an expert's token count is new at every step, these sizes are not."""
    if count <= 16:
        return count
    grain = 1 << (count.bit_length() - 4)
    return -(-count // grain) * grain


def gather_rows(x_MD: Tensor, pair_R: Tensor, choices: int, dtype: torch.dtype) -> Tensor:
    """Every pair's token [R, D] in this type; padding is zeros. Without gradients."""
    library = native_for(x_MD)
    if library is None or dtype not in KINDS:
        x_RD = x_MD.index_select(0, pair_R.clamp_min(0) // choices).to(dtype)
        return x_RD.masked_fill_((pair_R < 0)[:, None], 0)
    x_MD = x_MD.contiguous()
    x_RD = x_MD.new_empty(len(pair_R), x_MD.shape[1], dtype=dtype)
    library.run(
        "qiusuo_gather", at(x_MD), KINDS[x_MD.dtype], at(pair_R), choices, at(x_RD), KINDS[dtype],
        *x_RD.shape,
    )  # fmt: skip
    return x_RD


def sum_choices(y_RD: Tensor, place_P: Tensor, choices: int) -> Tensor:
    """Bring sorted rows home and add each token's K of them, always in the same order. Without
    gradients."""
    library = native_for(y_RD)
    if library is None:
        y_PD = y_RD.index_select(0, place_P)
        return y_PD if choices == 1 else y_PD.unflatten(0, (-1, choices)).sum(1)
    out_MD = y_RD.new_empty(len(place_P) // choices, y_RD.shape[1])
    library.run(
        "qiusuo_sum_choices", at(y_RD), KINDS[y_RD.dtype], at(place_P), choices, at(out_MD),
        *out_MD.shape,
    )  # fmt: skip
    return out_MD
