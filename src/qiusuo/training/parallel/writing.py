"""The finished model written out of the parts that several processes hold.

A checkpoint's writer asks for a few rows of one tensor after the other (checkpoint/stored.py). The
first process writes; whatever rows it asks for are brought together from the processes that have
them, and are forgotten when they are written. So nobody ever has the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qiusuo.checkpoint.load import Held
from qiusuo.checkpoint.stored import KINDS, MemoryTensor, StoredTensor
from qiusuo.checkpoint.tensors import Part, disk_layout, meta_state
from qiusuo.model.transformer import Transformer
from qiusuo.training.parallel.sharding import held_of
from qiusuo.training.parallel.world import World


@contextmanager
def brought_together(model: Transformer, world: World) -> Iterator[dict[str, StoredTensor]]:
    """A checkpoint's tensors (MTP's copies left out) for the first process of several, which may
    read them within; the others give it what it asks for until it has left, and get none."""
    state = dict(model.state_dict())
    parts = _Parts({name: held_of(tensor) for name, tensor in state.items()}, world)
    if not world.leads:
        asked: Any = None
        while (asked := world.first(asked)) is not None:
            parts.bring(*asked)
        yield {}
        return
    try:
        tensors: dict[str, StoredTensor] = {}
        plain = meta_state(model.config)
        for name, part in disk_layout(model.config, plain):
            held = state[part.name]
            if isinstance(held, DTensor):
                shape = tuple(part.of(plain).shape)
                tensors[name] = SpreadTensor(name, shape, held.dtype, part, parts)
            else:  # a router's bias, the same on all
                tensors[name] = MemoryTensor(name, held)
        yield tensors
    finally:
        world.first(None)


@dataclass(frozen=True)
class SpreadTensor:
    """A tensor of which several processes have rows; reading some is all processes' work."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Part
    parts: _Parts

    @property
    def kind(self) -> str:
        return KINDS[self.dtype]

    @property
    def stored_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def place(self) -> str:
        return self.name

    def rows(self, start: int, stop: int) -> Tensor:
        asked = self.part, start, stop
        self.parts.world.first(asked)
        return self.parts.bring(*asked).view(stop - start, *self.shape[1:]).cpu()


@dataclass(frozen=True)
class _Parts:
    """What this process holds of every tensor in memory."""

    held: dict[str, Held]
    world: World

    @torch.no_grad()
    def bring(self, part: Part, start: int, stop: int) -> Tensor:
        """Rows of a tensor of the checkpoint, flat, for the first process; to be called by all."""
        own, first = self.held[part.name].of(part)
        given = own[max(0, start - first) : max(0, stop - first)].flatten()
        none = given.new_empty(0)
        count = torch.zeros(self.world.size, dtype=torch.int64, device=given.device)
        count[0] = len(given)
        counts = self.world.exchange(list(count.split(1)), [1] * self.world.size)
        to_first = [given, *[none] * (self.world.size - 1)]
        return torch.cat(self.world.exchange(to_first, [int(n) for n in counts]))
