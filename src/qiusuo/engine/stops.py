"""Stop strings, found wherever a text is cut into pieces.

The strings' beginnings form a tree (Aho and Corasick, 1975): its node is the longest end of the
text so far that may yet become a stop string, which is exactly what has to be held back. Every
character is looked at once, however many strings there are and however long they are.

The first string to be complete ends the text; of those complete at the same character, the
longest, so that no part of it is given. vLLM and llama.cpp do the same one token at a time, but
where a token completes two, take the first of the list and the first to begin; here the answer
does not depend on where tokens end, and nothing is generated only to see which string wins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Gives a text on until one of ``stops`` is in it; that string and what follows is dropped.

    ``watching``: while it is off, a string that becomes complete is let pass: an answer may have to
    be longer. ``stopped`` is the string that was found. ValueError for an empty stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(stops):
            raise ValueError(f"stops must be a list of strings that are not empty, not {stops!r}")
        self.stopped: str | None = None
        self.watching = True
        self.node = 0
        self.next: list[dict[str, int]] = [{}]
        self.path = [""]  # a stop string through each node; its beginning spells the node
        self.depth = [0]
        self.found: list[str | None] = [None]  # the longest stop string that ends here
        for stop in stops:
            self._add(stop)
        self.shorter = self._link()  # the node of the longest proper end of each node's text

    def push(self, text: str) -> tuple[str, str | None]:
        """(what is certain not to be of a stop string, the stop string if it is complete)."""
        if self.stopped is not None:
            return "", None
        before = self.node
        for place, character in enumerate(text, 1):
            self.node = self._step(self.node, character)
            self.stopped = self.found[self.node] if self.watching else None
            if self.stopped is not None:
                return self._given(before, text, place, len(self.stopped)), self.stopped
        return self._given(before, text, len(text), self.depth[self.node]), None

    def finish(self) -> str:
        """What was held back."""
        held = "" if self.stopped is not None else self.path[self.node][: self.depth[self.node]]
        self.node = 0
        return held

    def _given(self, before: int, text: str, place: int, kept: int) -> str:
        """What was held at node ``before``, then ``place`` characters, without the last ``kept``.

        Nothing is put together that is not given: a long string held for long costs nothing."""
        held = self.depth[before]
        count = held + place - kept
        return self.path[before][: min(count, held)] + text[: max(0, count - held)]

    def _step(self, node: int, character: str) -> int:
        while node and character not in self.next[node]:
            node = self.shorter[node]
        return self.next[node].get(character, 0)

    def _add(self, stop: str) -> None:
        node = 0
        for depth, character in enumerate(stop, 1):
            if character not in self.next[node]:
                self.next[node][character] = len(self.next)
                self.next.append({})
                self.path.append(stop)
                self.depth.append(depth)
                self.found.append(None)
            node = self.next[node][character]
        self.found[node] = stop

    def _link(self) -> list[int]:
        self.shorter = [0] * len(self.next)
        waiting = deque(self.next[0].values())
        while waiting:
            node = waiting.popleft()
            if self.found[node] is None:
                self.found[node] = self.found[self.shorter[node]]
            for character, child in self.next[node].items():
                self.shorter[child] = self._step(self.shorter[node], character)
                waiting.append(child)
        return self.shorter
