"""Whole matrices for an optimizer that needs them, while each process holds some rows of all.

Every matrix has an owner. Each process sends its rows of each matrix to the owner, who puts them
together, works on them and sends the results' rows back: two all-to-alls a step, of all matrices at
once. A W-th of the matrices is anyone's own, so no work is done twice (as in the distributed Muon
of arXiv:2502.16982 §2.3). Stacked experts need none of it: whole experts are what is sharded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qiusuo.training.parallel.world import World


class MatrixExchange:
    """``matrices`` [R, C] of which each process has rows. Owners are chosen so that all have about
    as many numbers; the choice depends on nothing but shapes."""

    def __init__(self, world: World, matrices: Sequence[Tensor]) -> None:
        self.world = world
        self.shapes = [(int(m.shape[0]), int(m.shape[1])) for m in matrices]
        self.owners = _owners(self.shapes, world.size)

    @property
    def owned(self) -> list[int]:
        """Which of the matrices this process puts together."""
        return self._of(self.world.rank)

    def gather(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """From this process's rows of each matrix the whole of those it owns."""
        parts = [_joined([rows[i] for i in self._of(rank)], rows[0]) for rank in self._ranks]
        counts = [sum(self._count(i, rank) for i in self.owned) for rank in self._ranks]
        pieces = [
            taken.split([self._count(i, rank) for i in self.owned])
            for rank, taken in enumerate(self.world.exchange(parts, counts))
        ]
        return [
            torch.cat([of_rank[place] for of_rank in pieces]).view(self.shapes[i])
            for place, i in enumerate(self.owned)
        ]

    def scatter(
        self, whole: Sequence[Tensor], like: Sequence[Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        """From the whole of the owned matrices, of that type, this process's rows of each, shaped
        as ``like``."""
        split = [
            matrix.reshape(-1).split([self._count(i, rank) for rank in self._ranks])
            for i, matrix in zip(self.owned, whole, strict=True)
        ]
        kind = like[0].new_empty(0, dtype=dtype)
        parts = [_joined([pieces[rank] for pieces in split], kind) for rank in self._ranks]
        mine = self.world.rank
        counts = [sum(self._count(i, mine) for i in self._of(rank)) for rank in self._ranks]
        found: dict[int, Tensor] = {}
        for rank, taken in enumerate(self.world.exchange(parts, counts)):
            sizes = [self._count(i, mine) for i in self._of(rank)]
            found |= dict(zip(self._of(rank), taken.split(sizes), strict=True))
        return [found[i].view_as(rows) for i, rows in enumerate(like)]

    @property
    def _ranks(self) -> range:
        return range(self.world.size)

    def _of(self, rank: int) -> list[int]:
        return [i for i, owner in enumerate(self.owners) if owner == rank]

    def _count(self, i: int, rank: int) -> int:
        """Numbers of matrix i that a process holds: rows are dealt out as ``Tensor.chunk`` does."""
        rows, columns = self.shapes[i]
        each = -(-rows // self.world.size)
        return max(0, min(each, rows - rank * each)) * columns


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, all of it where it is whole; not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_spread_matrix(parameter: Tensor) -> bool:
    """Whether the parameter is one matrix of which this process has some rows."""
    return isinstance(parameter, DTensor) and parameter.ndim == 2


def _joined(parts: Sequence[Tensor], kind: Tensor) -> Tensor:
    return torch.cat([kind[:0].reshape(-1), *(part.reshape(-1) for part in parts)])


def _owners(shapes: Sequence[tuple[int, int]], size: int) -> list[int]:
    """The largest matrices first, each to whom has least so far."""
    owners, load = [0] * len(shapes), [0] * size
    for i in sorted(range(len(shapes)), key=lambda i: (-shapes[i][0] * shapes[i][1], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += shapes[i][0] * shapes[i][1]
    return owners
