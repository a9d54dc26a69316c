"""Pages of cache: who holds which, and which of them hold a beginning that others may share.

The cache is cut into pages of equally many tokens, numbered from 0. A page that is full can be
*published* under a key that stands for everything up to its end: the page's tokens, and through
the key of the page before all tokens before, and the namespace. A later request that begins in the
same way takes the same pages. Published pages that no one holds any longer stay as they are until
their place is needed; the one unused for longest goes first. With a page stands what the routers
chose for its tokens, where that was asked for: who asks again takes no page without.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from torch import Tensor

# s tokens of a page, L MoE layers, K experts a token.


class OutOfPagesError(RuntimeError):
    """Every page is held by someone."""


def first_key(namespace: str) -> bytes:
    """What stands before the first page: requests share nothing across namespaces."""
    return hashlib.sha256(b"qiusuo prefix\0" + namespace.encode()).digest()


def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page, from that of the page before it."""
    return hashlib.sha256(key + array("q", tokens).tobytes()).digest()


class PagePool:
    """``count`` pages. The sum of references, free and kept pages is invariant; see ``check``."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.references = [0] * count
        self.free = list(range(count))  # a heap: the lowest first keeps a sequence's pages together
        self.key_of: dict[int, bytes] = {}
        self.page_of: dict[bytes, int] = {}
        self.kept: OrderedDict[int, None] = OrderedDict()  # published and unheld, oldest first
        self.experts_of: dict[int, Tensor] = {}  # of published pages: [s, L, K], where remembered

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self.free) + len(self.kept)

    def take(self, count: int) -> list[int]:
        """Hold new pages. OutOfPagesError, and none is held, if there are not that many."""
        if count > self.available:
            raise OutOfPagesError(f"{count} pages wanted, {self.available} of {self.count} free")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self.free:
            page = heapq.heappop(self.free)
        else:
            page, _ = self.kept.popitem(last=False)
            del self.page_of[self.key_of.pop(page)]
            self.experts_of.pop(page, None)
        self.references[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """Hold the page that was published under this key."""
        page = self.page_of.get(key)
        if page is not None:
            self.hold([page])
        return page

    def holds(self, key: bytes) -> bool:
        """Whether someone holds the page that was published under this key."""
        page = self.page_of.get(key)
        return page is not None and self.references[page] > 0

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each."""
        for page in pages:
            self.references[page] += 1
            self.kept.pop(page, None)

    def release(self, pages: Iterable[int]) -> None:
        """One holder less. The end of a text is forgotten before its beginning."""
        for page in reversed(list(pages)):
            assert self.references[page] > 0, f"page {page} is released and not held"
            self.references[page] -= 1
            if self.references[page] == 0:
                if page in self.key_of:
                    self.kept[page] = None
                else:
                    heapq.heappush(self.free, page)

    def shared(self, page: int) -> bool:
        return self.references[page] > 1

    def publish(self, page: int, key: bytes) -> None:
        """Let others find this full page. The first of two equal pages is the one found."""
        if key not in self.page_of and page not in self.key_of:
            self.page_of[key] = page
            self.key_of[page] = key

    def remember(self, key: bytes, experts_sLK: Tensor) -> None:
        """What the routers chose for the tokens of the page that is found under this key."""
        page = self.page_of.get(key)
        if page is not None:
            self.experts_of.setdefault(page, experts_sLK)

    def remembers(self, key: bytes) -> bool:
        return self.page_of.get(key) in self.experts_of

    def forget(self) -> None:
        """Nothing published may be found any more: the weights have changed."""
        for page in self.kept:
            heapq.heappush(self.free, page)
        self.kept.clear()
        self.key_of.clear()
        self.page_of.clear()
        self.experts_of.clear()

    def check(self) -> None:
        """Assert what holds between any two calls."""
        held = {page for page, count in enumerate(self.references) if count}
        assert len(set(self.free)) == len(self.free)
        assert not held & set(self.free)
        assert not held & set(self.kept)
        assert not set(self.free) & set(self.kept)
        assert len(held) + self.available == self.count
        assert set(self.kept) | set(self.experts_of) <= set(self.key_of)
        assert {page: key for key, page in self.page_of.items()} == self.key_of
