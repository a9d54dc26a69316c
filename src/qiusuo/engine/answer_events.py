"""What an answer is made of while it comes: thought, content, calls of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from qiusuo.engine.sampler import Drawn


class Kind(StrEnum):
    THOUGHT = "thought"
    CONTENT = "content"
    CALL_BEGIN = "call_begin"
    ARGUMENTS = "arguments"
    CALL_END = "call_end"


class Flaw(StrEnum):
    """What is wrong with a call's arguments; they are given as they came all the same."""

    UNFINISHED = "unfinished"  # the answer was cut off inside them
    INVALID = "invalid"  # no JSON object


@dataclass(frozen=True)
class Event:
    """``text`` is a piece of a thought, of the content or of a call's arguments (JSON); ``index``
    counts the calls of an answer; ``name`` comes with CALL_BEGIN, ``flaw`` with CALL_END.

    ``drawn``, of thought and content where log-probabilities were asked for: the tokens of which
    a piece of text comes first in here. Those that give no text (marks, frames of calls, white
    space around a thought, a stop string) are of no event."""

    kind: Kind
    text: str = ""
    index: int | None = None
    name: str | None = None
    flaw: Flaw | None = None
    drawn: tuple[Drawn, ...] = ()


class EventWriter:
    """The events that a parser of calls makes, in order; ``take`` hands them over.

    White space right after a call is its frame's, unless more words follow words."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.calls = 0
        self.arguments: list[str] = []
        self.spoken = False  # whether any content was given
        self.space: str | None = None  # white space since the last call, None if words came since

    @property
    def after_call(self) -> bool:
        """Whether there were no words since the last call."""
        return self.space is not None

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def content(self, text: str) -> None:
        if self.space is not None:
            self.space += text
            if not self.space.strip():
                return
            text = self.space if self.spoken else self.space.lstrip()
            self.space = None
        if text:
            self.spoken = True
            self.events.append(Event(Kind.CONTENT, text))

    def begin(self, name: str) -> None:
        self.arguments, self.space = [], ""
        self.events.append(Event(Kind.CALL_BEGIN, index=self.calls, name=name))

    def argue(self, text: str) -> None:
        """Give a piece of the arguments."""
        if text:
            self.arguments.append(text)
            self.events.append(Event(Kind.ARGUMENTS, text, self.calls))

    @property
    def so_far(self) -> str:
        """The arguments of the call that was begun last."""
        return "".join(self.arguments)

    def end(self, cut: bool) -> None:
        """``cut``: the answer ended here, and not because the model was done."""
        if not self.arguments and not cut:
            self.argue("{}")  # how a call without arguments is written
        flaw = None
        if not is_object(self.so_far):
            flaw = Flaw.UNFINISHED if cut else Flaw.INVALID
        self.events.append(Event(Kind.CALL_END, index=self.calls, flaw=flaw))
        self.calls += 1


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class MarkScanner:
    """Finds marks in a text that comes in pieces, and holds back what may become one.

    ``marks``: every spelling, and the mark it stands for."""

    def __init__(self, marks: Mapping[str, str]) -> None:
        self.marks = marks
        self.pattern = re.compile("(" + "|".join(map(re.escape, marks)) + ")")
        self.beginnings = {mark[:n] for mark in marks for n in range(1, len(mark))}
        self.longest = max(map(len, marks)) - 1
        self.held = ""

    def push(self, text: str) -> Iterator[tuple[str, str | None]]:
        """(text, None) and ("", mark), in order. Stop iterating and ``held`` is what is left."""
        self.held += text
        while match := self.pattern.search(self.held):
            before, self.held = self.held[: match.start()], self.held[match.end() :]
            if before:
                yield before, None
            yield "", self.marks[match[0]]
        sure = len(self.held) - self._may_become()
        before, self.held = self.held[:sure], self.held[sure:]
        if before:
            yield before, None

    def finish(self) -> str:
        held, self.held = self.held, ""
        return held

    def _may_become(self) -> int:
        """How many of the last characters may be the beginning of a mark."""
        for length in range(min(self.longest, len(self.held)), 0, -1):
            if self.held[-length:] in self.beginnings:
                return length
        return 0


def merged(events: Iterable[Event]) -> list[Event]:
    """Neighbouring pieces of one text as one."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        pieces = (Kind.THOUGHT, Kind.CONTENT, Kind.ARGUMENTS)
        if last and event.kind in pieces and (last.kind, last.index) == (event.kind, event.index):
            text, drawn = last.text + event.text, last.drawn + event.drawn
            result[-1] = Event(event.kind, text, event.index, drawn=drawn)
        else:
            result.append(event)
    return result
