"""Which tokens a piece of an answer came from, though much is held back and much left out.

Between a token and the text a client sees stand half characters, marks, frames of calls and stop
strings. All of them keep the order, so it is enough to know the text that has come in and is not
accounted for: what is given either begins it, or, where something before was left out, ends it.
For that the text has to come in one character at a time (answer_stream.py).
"""

from __future__ import annotations

from collections import deque

from qiusuo.engine.sampler import Drawn


class Origins:
    """``token`` for every token, ``character`` for every character that it completes; then
    ``thought`` and ``content`` for what is given of them. Each token is told once, with the first
    piece of its text; tokens that share a character are told together."""

    def __init__(self) -> None:
        self.waiting: list[Drawn] = []  # tokens that have completed no character yet
        self.groups: list[tuple[Drawn, ...]] = []  # tokens of the same characters, until told
        self.text = ""  # not accounted for
        self.group_of: list[int] = []  # of each of its characters
        self.held: deque[int] = deque()  # groups of the content that a stop string may begin with

    def token(self, drawn: Drawn) -> None:
        self.waiting.append(drawn)

    def character(self, character: str, marks: tuple[str, ...] = ()) -> None:
        """``marks``, longest first: what is no text once it is complete."""
        if self.waiting:
            self.groups.append(tuple(self.waiting))
            self.waiting = []
        self.text += character
        self.group_of.append(len(self.groups) - 1)
        if self.text.endswith(marks):
            length = len(next(mark for mark in marks if self.text.endswith(mark)))
            self.text, self.group_of = self.text[:-length], self.group_of[:-length]

    def skip(self) -> None:
        """All that has come is no text of thought or content."""
        self.text, self.group_of = "", []

    def thought(self, text: str) -> tuple[Drawn, ...]:
        return self._told(self._found(text))

    def hold(self, text: str) -> None:
        """This is content, and goes through the stop strings now."""
        self.held += self._found(text)

    def content(self, characters: int) -> tuple[Drawn, ...]:
        """So much of what was held is given."""
        return self._told([self.held.popleft() for _ in range(characters)])

    def _found(self, text: str) -> list[int]:
        """The groups of these characters; all up to them is accounted for."""
        space = len(self.text) - len(self.text.lstrip())  # mostly it is all that was left out
        start = next((n for n in (0, space) if self.text.startswith(text, n)), None)
        if start is not None:
            places = list(range(start, start + len(text)))
        else:
            places, place = [], len(self.text)
            for character in reversed(text):
                place = self.text.rfind(character, 0, max(place, 0))
                places.append(place)
            places.reverse()
        groups = [self.group_of[place] if place >= 0 else -1 for place in places]
        done = max(places, default=-1) + 1
        self.text, self.group_of = self.text[done:], self.group_of[done:]
        return groups

    def _told(self, groups: list[int]) -> tuple[Drawn, ...]:
        drawn: list[Drawn] = []
        for group in groups:
            if group >= 0:
                drawn += self.groups[group]
                self.groups[group] = ()
        return tuple(drawn)
