"""Run a block again in the backward pass instead of keeping what it computed (arXiv:1604.06174).

Of each block only its input is kept: memory grows with tokens × layers × hidden size, and what is
within a block is there for one block at a time. It costs one more forward pass. The second pass is
the first one's repetition: the experts are those chosen then, since another choice would be the
gradient of another network, and the products have the precision they had then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qiusuo.model.layers import Linear
from qiusuo.model.moe import Experts, Routing

if TYPE_CHECKING:
    from qiusuo.model.transformer import Block, Context

Out = TypeVar("Out")  # of a block: tensors
Run = Callable[..., tuple[Out, Routing | None]]
Formats = Sequence[tuple[Linear | Experts, Any]]  # modules, and how each computes in FP8


def recomputed(
    run: Run[Out], block: Block, inputs: tuple[Tensor | None, ...], context: Context
) -> tuple[Out, Routing | None]:
    """``run(*inputs, context)``, a pass of the block, keeping ``inputs`` alone. Nothing in a block
    is random, so no generator is set back; autocast is as it was, by PyTorch."""
    formats = [(one, one.fp8) for one in block.modules() if isinstance(one, Linear | Experts)]
    first: list[Tensor | None] = []  # the experts of the first pass, once there was one

    def once(*inputs: Tensor | None) -> tuple[Out, Routing | None]:
        if first:
            replayed = {} if first[0] is None else {block.layer: first[0]}
            with _set(formats):
                return run(*inputs, context._replace(replayed=replayed))
        out, routing = run(*inputs, context)
        first.append(None if routing is None else routing.indices_MK)
        return out, routing

    found: tuple[Out, Routing | None] = checkpoint(
        once, *inputs, use_reentrant=False, preserve_rng_state=False
    )
    return found


@contextmanager
def _set(formats: Formats) -> Iterator[None]:
    former = [(module, module.fp8) for module, _ in formats]
    _assign(formats)
    try:
        yield
    finally:
        _assign(former)


def _assign(formats: Formats) -> None:
    for module, fp8 in formats:
        module.fp8 = fp8
