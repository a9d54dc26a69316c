"""The storage behind the pages, and the groups of a pass that stand on it.

MLA needs one row per token and layer, [latent; rope key], never expanded keys and values; the dense
models keep the keys and values of their shared heads. Layers count the MTP modules' too.

A row stands in the model's type, or mostly in int8 (kernels/cached_rows.py says how). It is rounded
when it is written, before anyone looks at it, and by itself: a token sees the same row of its own
and of all before whether they came in one pass, in many, out of the cache or from disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from qiusuo.kernels.cached_rows import Int8Rows, PlainRows, Rows, row_bytes
from qiusuo.model.config import ModelConfig
from qiusuo.model.groups import Pages, Seen

# L layers, p pages, s tokens of a page, Z numbers of a token and layer, W elements they take,
# B sequences, T new tokens of each, S tokens that can be seen.

PAGE_TOKENS = 32
CACHES = ("int8",)  # what entries may be rounded to


def check_cache(cache: str | None) -> None:
    """ValueError unless entries can be kept so."""
    if cache is not None and cache not in CACHES:
        raise ValueError(
            f"cache {cache!r} is not {' or '.join(CACHES)}; leave it out for the model's own type"
        )


def rows_of(config: ModelConfig, dtype: torch.dtype, cache: str | None = None) -> Rows:
    """How a model that computes in ``dtype`` keeps a token's entries: None as they are, "int8"."""
    check_cache(cache)
    if cache is None:
        return PlainRows(config.cache_width, dtype)
    return Int8Rows(config.cache_width - config.cache_exact, config.cache_exact, dtype)


class Kept(Protocol):
    """A sequence as the cache sees it: its pages, and how many of its tokens they hold."""

    @property
    def pages(self) -> list[int]: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True)
class Place:
    """Where in its pages a sequence stands (``Kept``)."""

    pages: list[int]
    length: int


class PagedCache:
    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
        page_tokens: int = PAGE_TOKENS,
        cache: str | None = None,
    ) -> None:
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.page_tokens, self.first_width = page_tokens, config.cache_parts[0]
        self.rows = rows_of(config, dtype, cache)
        shape = (layers, pages, page_tokens, self.rows.width)
        self.entries_LpsW = torch.empty(shape, dtype=self.rows.stored, device=device)
        self.beside: list[PagedCache] = []  # other models' entries for the tokens of the same pages

    @staticmethod
    def page_bytes(
        config: ModelConfig,
        dtype: torch.dtype,
        page_tokens: int = PAGE_TOKENS,
        cache: str | None = None,
    ) -> int:
        """Bytes of one page over all layers."""
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        return layers * page_tokens * row_bytes(rows_of(config, dtype, cache))

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def parts(self, page: int) -> list[Tensor]:
        """All that a page holds: its entries [L, s, W] here, and in the caches beside."""
        return [cache.entries_LpsW[:, page] for cache in (self, *self.beside)]

    def copy_page(self, source: int, target: int) -> None:
        for to, of in zip(self.parts(target), self.parts(source), strict=True):
            to.copy_(of)

    def clear_pages(self, pages: Iterable[int]) -> None:
        """What no one may look at is multiplied by 0 all the same, and 0 times NaN is NaN."""
        for page in pages:
            for part in self.parts(page):
                part.zero_()

    def group(
        self, sequences: Sequence[Kept], tokens: int, absorbed: bool, gather: bool = False
    ) -> PagedGroup:
        """Sequences with ``tokens`` new ones each, for which there is room in their pages."""
        return PagedGroup(self, sequences, tokens, absorbed, gather)

    def one_by_one(self, sequences: Sequence[Kept], tokens: int) -> list[PagedGroup]:
        """The same, as a group for every token: its attention has the same shapes whatever else
        is in the pass."""
        return [
            self.group([Place(sequence.pages, sequence.length + i)], 1, True, gather=True)
            for sequence in sequences
            for i in range(tokens)
        ]


@dataclass
class PagedGroup:
    """A ``model.groups.Group`` on pages. Where everything stands is found once and holds for all
    layers. A lone sequence whose pages lie side by side is looked at where it is; others are
    gathered, and all if ``gather``. Sequences of one length need no mask."""

    cache: PagedCache
    sequences: Sequence[Kept]
    tokens: int
    absorbed: bool
    gather: bool = False
    mask_BTS: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        size, device = self.cache.page_tokens, self.cache.entries_LpsW.device
        lengths = [sequence.length for sequence in self.sequences]
        self.seen = max(lengths) + self.tokens
        needed = self.cache.pages_for(self.seen)
        tables = [sequence.pages[:needed] for sequence in self.sequences]
        padded = [table + [table[0]] * (needed - len(table)) for table in tables]
        self.pages_Bp = torch.tensor(padded, device=device)
        self.place_BT = torch.tensor(lengths, device=device)[:, None] + torch.arange(
            self.tokens, device=device
        )
        page_BT = self.pages_Bp.gather(1, self.place_BT // size)
        self.slots_N = (page_BT * size + self.place_BT % size).flatten()
        self.first_page: int | None = None
        if self.batch == 1:
            first = tables[0][0]
            if not self.gather and tables[0] == list(range(first, first + needed)):
                self.first_page = first
        elif min(lengths) < max(lengths):
            place_S = torch.arange(self.seen, device=device)
            self.mask_BTS = place_S <= self.place_BT[..., None]

    @property
    def batch(self) -> int:
        return len(self.sequences)

    def extend(self, layer: int, first_BTX: Tensor, second_BTY: Tensor) -> Seen:
        entries_psW = self.cache.entries_LpsW[layer]
        new_NZ = torch.cat((first_BTX, second_BTY), dim=-1).flatten(0, 1)
        self.cache.rows.keep(new_NZ, entries_psW.flatten(0, 1), self.slots_N)
        return PagedSeen(self, entries_psW)

    @cached_property
    def queries(self) -> tuple[Tensor, Tensor]:
        """Page table [N, p] and lengths [N] of every new token."""
        table_Np = self.pages_Bp.repeat_interleave(self.tokens, dim=0)
        return table_Np, self.place_BT.flatten() + 1


@dataclass
class PagedSeen:
    """A ``model.groups.Seen`` of one layer."""

    group: PagedGroup
    entries_psW: Tensor

    @property
    def pages(self) -> Pages:
        return Pages(self.entries_psW, *self.group.queries)

    @cached_property
    def joined_BSZ(self) -> Tensor:
        group, rows = self.group, self.group.cache.rows
        if group.first_page is not None:
            entries_SW = self.entries_psW[group.first_page :].flatten(0, 1)[: group.seen]
            return rows.read(entries_SW)[None]
        seen_psZ = rows.read(self.entries_psW.index_select(0, group.pages_Bp.flatten()))
        return seen_psZ.view(group.batch, -1, seen_psZ.shape[-1])[:, : group.seen]

    @property
    def first_BSX(self) -> Tensor:
        return self.joined_BSZ[..., : self.group.cache.first_width]

    @property
    def second_BSY(self) -> Tensor:
        return self.joined_BSZ[..., self.group.cache.first_width :]
