"""Which processes train together, and the few things they must agree on.

One training may live in many processes. Each is given its rows of every batch and its shards of
every weight; what concerns the run as a whole (the log, the report, samples, the terminal) is the
first one's. This file is the narrow place where the rest of training meets that fact: ``ALONE``,
the world of one process, does nothing at all, so code that asks it reads as if there were no
others.

The processes are started by ``torchrun`` or by ``qiusuo train --nproc`` (launch.py), which tell
each its number through the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qiusuo.training.parallel.traffic import Traffic

T = TypeVar("T")

# While the first process draws samples the others wait. One that died is noticed by its closed
# connections, or else by the launcher, so that a long time does no harm.
PATIENCE = timedelta(hours=12)


class World:
    """One process alone."""

    rank = 0
    size = 1
    mesh: DeviceMesh | None = None
    expert_parallel = False  # tokens go to their experts, see experts.py

    def __init__(self) -> None:
        self.traffic = Traffic(1)

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all: it writes the run folder and the terminal."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This process's rows of a batch."""
        own = rows // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each; ``numbers`` may be used up."""
        return numbers

    def total_norm(self, norm: Tensor) -> Tensor:
        """The norm of what all processes hold from that of each one's part."""
        return norm if self.size == 1 else self.sum(norm.double().square()).sqrt().float()

    def most(self, number: int) -> int:
        """The largest of what the processes say."""
        return number

    def first(self, value: T) -> T:
        """What the first process says; of the others the value is not looked at."""
        return value

    def exchange(self, parts: list[Tensor], counts: list[int]) -> list[Tensor]:
        """Give part i, a flat tensor, to process i; get from each of them as many as counted."""
        return parts

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through, then the others: they find what it made."""
        yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Nobody leaves before all have come to the end; an error of one is an error of all."""
        yield


ALONE = World()


class ElsewhereError(RuntimeError):
    """Another process could not go on; it says why itself."""


class Several(World):
    """This process among others, over ``torch.distributed``. ``control`` carries the small things
    that processes agree on, always over gloo."""

    def __init__(self, device: str, expert_parallel: bool) -> None:
        self.expert_parallel = expert_parallel
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.traffic = Traffic(self.size)
        self.mesh = dist.init_device_mesh(torch.device(device).type, (self.size,))
        self.control = dist.new_group(backend="gloo", timeout=PATIENCE)

    def sum(self, numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers)
        self.traffic.reduced(numbers)
        return numbers

    def most(self, number: int) -> int:
        told = torch.tensor(number)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.control)
        self.traffic.reduced(told)
        return int(told)

    def first(self, value: T) -> T:
        told: list[Any] = [value]
        dist.broadcast_object_list(told, src=0, group=self.control)
        found: T = told[0]
        return found

    def exchange(self, parts: list[Tensor], counts: list[int]) -> list[Tensor]:
        given = torch.cat(parts)
        taken = given.new_empty(sum(counts))
        sizes = [len(part) for part in parts]
        dist.all_to_all_single(taken, given, output_split_sizes=counts, input_split_sizes=sizes)
        self.traffic.sent(given.nbytes - parts[self.rank].nbytes)
        return list(taken.split(counts))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        if not self.leads:
            self._meet(None)
        with self.together():
            try:
                yield
            finally:
                if self.leads:
                    self._meet(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            told = self._meet(str(error) or type(error).__name__)
            if told[0] is None or self.leads:
                error.met_by_all = True  # type: ignore[attr-defined]
                raise
            self._check(told)  # the first says it for all
        self._check(self._meet(None))

    def _check(self, told: list[str | None]) -> None:
        for rank, complaint in enumerate(told):
            if complaint is not None:
                raise ElsewhereError(f"process {rank} of {self.size}: {complaint}")

    def _meet(self, complaint: str | None) -> list[str | None]:
        told: list[str | None] = [None] * self.size
        dist.all_gather_object(told, complaint, group=self.control)
        return told


def met_by_all(error: BaseException) -> bool:
    """Whether the other processes know of it and leave too; else they must be made to."""
    return isinstance(error, ElsewhereError) or getattr(error, "met_by_all", False)


def tells_of_a_death(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone: gloo says so in words, with its
    own file and line before them."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def processes() -> int:
    """How many processes the environment says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """How often these processes were started anew after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def join_world(device: str, expert_parallel: bool = False) -> Iterator[tuple[World, str]]:
    """Meet the processes that the launcher started with this one, if any: the world, and the
    device that is this process's own."""
    if processes() == 1:
        yield ALONE, device
        return
    if torch.device(device).type == "cpu":
        dist.init_process_group("gloo", timeout=PATIENCE)
    else:
        device = f"{torch.device(device).type}:{os.environ['LOCAL_RANK']}"
        torch.accelerator.set_device_index(torch.device(device).index)
        dist.init_process_group(timeout=PATIENCE)
    try:
        yield Several(device, expert_parallel), device
    finally:
        dist.destroy_process_group()
