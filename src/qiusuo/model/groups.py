"""Which tokens of a pass attend together, and to what.

Everything in a transformer but attention looks at one token at a time, so a pass may hold tokens of
many sequences: chunks of prompts beside single tokens that answers have just got. Attention sees
them in *groups*: sequences with equally many new tokens, side by side in the pass. A group also
says where its sequences' earlier tokens are kept. Training and tests have one group of everything
and keep nothing (``Whole``); the engine's groups stand on a paged cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

# B sequences of a group, T new tokens of each, S tokens that can be seen, N tokens of the pass,
# X and Y the widths in ``ModelConfig.cache_parts``, Z = X + Y, p pages of s rows of W elements.


class Pages(NamedTuple):
    """Where the rows stand that each query of a group looks at, for kernels that walk them there.

    ``entries``: a layer's rows, page by page, as they are stored (kernels/cached_rows.py);
    ``table``: the pages of each query's sequence, in order; ``lengths``: how many rows of them it
    sees. Queries go by sequence, then by place."""

    entries_psW: Tensor
    table_Np: Tensor
    lengths_N: Tensor


class Seen(Protocol):
    """What a group's queries look at in one layer: latents and rope keys in MLA, keys and values
    elsewhere. ``joined_BSZ`` are both in one tensor, ``pages`` the rows in the cache's pages, each
    where they are kept so. Rows that are spread over pages are brought together when asked for."""

    @property
    def first_BSX(self) -> Tensor: ...
    @property
    def second_BSY(self) -> Tensor: ...
    @property
    def joined_BSZ(self) -> Tensor | None: ...
    @property
    def pages(self) -> Pages | None: ...


class Given(NamedTuple):
    """``Seen`` of rows that nobody keeps."""

    first_BSX: Tensor
    second_BSY: Tensor
    joined_BSZ: Tensor | None = None
    pages: Pages | None = None


class Group(Protocol):
    """``mask``: true where a query may look, None for causal with the last query on the last key.
    ``absorbed``: attend in the form for few queries."""

    @property
    def batch(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def mask_BTS(self) -> Tensor | None: ...
    @property
    def absorbed(self) -> bool: ...

    def extend(self, layer: int, first_BTX: Tensor, second_BTY: Tensor) -> Seen:
        """Keep the new tokens' entries in a layer's cache; all of the sequences' so far."""
        ...


@dataclass(frozen=True)
class Whole:
    """All tokens of a pass in one group, which sees itself and nothing before."""

    batch: int
    tokens: int
    mask_BTS: Tensor | None = None
    absorbed: bool = False

    def extend(self, layer: int, first_BTX: Tensor, second_BTY: Tensor) -> Seen:
        return Given(first_BTX, second_BTY)


def cut(groups: Sequence[Group], *tensors: Tensor) -> Iterator[tuple[Group, list[Tensor]]]:
    """Each group with its share [B, T, ...] of tensors [1, N, ...], as views. Tensors that have
    the shape of a single group already stay as they are."""
    if len(groups) == 1 and tensors[0].shape[0] == groups[0].batch:
        yield groups[0], list(tensors)
        return
    start = 0
    for group in groups:
        stop = start + group.batch * group.tokens
        shape = (group.batch, group.tokens)
        yield group, [x.flatten(0, 1)[start:stop].unflatten(0, shape) for x in tensors]
        start = stop
