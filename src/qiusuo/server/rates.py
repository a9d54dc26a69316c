"""Limits of a key: requests and tokens in any sixty seconds, and requests at once.

A sliding window, no buckets: whatever minute one looks at holds no more than the limit. A request's
tokens are counted where it entered, first as the most it may take and, when it leaves, as what it
did take. All is in memory: a server that starts anew starts with empty windows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from qiusuo.data.errors import DataError
from qiusuo.server.keys import Key

WINDOW = 60.0  # seconds
SOON = 1.0  # seconds: when a place may be free is not known


class RateExceeded(DataError):  # noqa: N818
    """A limit is reached. ``limit``: which, "rpm", "tpm" or "concurrency". ``retry_after``: seconds
    until there is room at the latest; None where there never will be."""

    def __init__(self, message: str, limit: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.limit, self.retry_after = limit, retry_after


@dataclass
class _Entry:
    key: str
    at: float
    tokens: int


@dataclass
class _Lately:
    """A key's entries of the window, the oldest first, and its requests under way."""

    entries: deque[_Entry] = field(default_factory=deque)
    running: int = 0

    def slide(self, now: float) -> None:
        while self.entries and self.entries[0].at <= now - WINDOW:
            self.entries.popleft()


class Rates:
    """The limits of all keys. Use from any thread. ``clock``: seconds that never run back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: dict[str, _Lately] = {}
        self._requests: dict[str, _Entry] = {}

    def enter(self, key: Key, request: str, tokens: int) -> None:
        """Count a request that may take so many tokens; ``leave`` must follow. RateExceeded where
        it is above a limit, and then it does not count."""
        with self._lock:
            if request in self._requests:
                raise ValueError(f"request {request!r} is under way already")
            now = self._clock()
            lately = self._keys.get(key.id, _Lately())
            lately.slide(now)
            self._refuse(key, lately, tokens, now)
            entry = _Entry(key.id, now, tokens)
            lately.entries.append(entry)
            lately.running += 1
            self._keys[key.id] = lately
            self._requests[request] = entry

    def leave(self, request: str, tokens: int) -> None:
        """The request is over and took so many tokens. Again, or unknown: nothing."""
        with self._lock:
            entry = self._requests.pop(request, None)
            if entry is None:
                return
            entry.tokens = tokens
            lately = self._keys[entry.key]
            lately.running -= 1
            lately.slide(self._clock())
            if not lately.running and not lately.entries:
                del self._keys[entry.key]

    def _refuse(self, key: Key, lately: _Lately, tokens: int, now: float) -> None:
        if key.concurrency is not None and lately.running >= key.concurrency:
            raise RateExceeded(
                f"{key.prefix} may have {key.concurrency} requests at once", "concurrency", SOON
            )
        if key.rpm is not None and len(lately.entries) >= key.rpm:
            frees = lately.entries[len(lately.entries) - key.rpm]
            raise RateExceeded(
                f"{key.prefix} may ask {key.rpm} times a minute", "rpm", frees.at + WINDOW - now
            )
        if key.tpm is None:
            return
        if tokens > key.tpm:
            raise RateExceeded(
                f"{key.prefix} may take {key.tpm} tokens a minute, and this one request up to "
                f"{tokens}: ask for fewer",
                "tpm",
                None,
            )
        over = sum(entry.tokens for entry in lately.entries) + tokens - key.tpm
        if over > 0:
            frees = _freeing(lately.entries, over)
            raise RateExceeded(
                f"{key.prefix} may take {key.tpm} tokens a minute", "tpm", frees.at + WINDOW - now
            )


def _freeing(entries: deque[_Entry], tokens: int) -> _Entry:
    """The entry that must slide out before so many tokens are free."""
    for entry in entries:
        tokens -= entry.tokens
        if tokens <= 0:
            return entry
    raise AssertionError("a request within the limit fits into an empty window")
