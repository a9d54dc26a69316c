"""Bytes that a step sends through collectives: counted as they go, and foretold from shapes.

Counted is what one process must send at least, which is what the usual ring algorithms send, for
W processes and a buffer of N bytes (N being the whole, gathered or to be reduced):

    all-gather, reduce-scatter    (W - 1) / W · N
    all-reduce                    2 (W - 1) / W · N
    all-to-all                    what is addressed to others

All collectives of a step go through ``World`` or through the two classes below, which the sharded
model is told to use. ``step_bytes`` foretells their sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from qiusuo.model.transformer import Transformer


def step_bytes(
    model: Transformer,
    passes: int,
    matrices: Iterable[Tensor],
    itemsize: int,
    told: int,
    visits: int,
    size: int,
) -> int:
    """What ``size`` processes send in one training step, all together. A pass, of one micro-batch,
    gathers each block's weights twice, forward and backward, and the rest once, and scatters the
    gradients of all. Each of Muon's ``matrices`` goes to its owner in its own type, and its update
    comes back in numbers of ``itemsize`` bytes. ``told``: bytes of numbers that are added up.
    ``visits``: bytes of the rows that go to experts and back in the step, all taken together; where
    there are some the experts' weights stay, and an even load is what is reckoned with."""

    def spread(module: nn.Module) -> int:
        """Bytes of its parameters, each padded to as many rows for every process."""
        return sum(
            -(-len(p) // size) * size * (p.numel() // max(1, len(p))) * p.element_size()
            for name, p in module.named_parameters()
            if not (visits and ".experts." in name)
        )

    blocks = sum(spread(block) for block in model.model.layers)
    rest = spread(model) - blocks
    exchanged = sum(m.numel() * (m.element_size() + itemsize) for m in matrices)
    sent = passes * (3 * blocks + 2 * rest) + 2 * told + exchanged / size
    return round((size - 1) * (sent + visits / size))


class Traffic:
    """``bytes`` that this process has sent since ``take`` was last called."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = 0.0

    def take(self) -> int:
        found, self.bytes = round(self.bytes), 0.0
        return found

    def gathered(self, whole: Tensor) -> None:
        self.bytes += whole.nbytes * (self.size - 1) / self.size

    reduce_scattered = gathered

    def reduced(self, whole: Tensor) -> None:
        self.bytes += 2 * whole.nbytes * (self.size - 1) / self.size

    def sent(self, count: int) -> None:
        self.bytes += count


class _Allocating:
    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class CountedAllGather(_Allocating, AllGather):
    """How the sharded model's weights are put together."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> dist.Work | None:
        self.traffic.gathered(output_tensor)
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class CountedReduceScatter(_Allocating, ReduceScatter):
    """How its gradients are added up and shared out."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.traffic.reduce_scattered(input_tensor)
        return dist.reduce_scatter_single(
            output=output_tensor, input=input_tensor, group=group, op=op, async_op=async_op
        )
