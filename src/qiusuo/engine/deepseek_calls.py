"""Calls of tools as DeepSeek's models write them, read while they come.

V3, R1 and the distils write calls between ``<｜tool▁calls▁begin｜>`` and its end, each between
``<｜tool▁call▁begin｜>`` and its end as ``function<｜tool▁sep｜>NAME``, a line end and a fence of
JSON; V3.1 as ``NAME<｜tool▁sep｜>ARGUMENTS``. The two are told apart by what is written: models mix
them up. Models also leave out the outer pair of marks, the first of the inner pair, or those at the
end; and distils, to which the marks are plain text, spell them with spaces or underscores. None of
that loses a call, and a mark is never part of a text.
"""

from __future__ import annotations

import re
from enum import Enum, auto

from qiusuo.data.tool_format import CALL_BEGIN, CALL_END, CALLS_BEGIN, SEPARATOR
from qiusuo.data.vocabularies import TOOL_TOKENS
from qiusuo.engine.answer_events import Event, EventWriter, MarkScanner, is_object

SPELLINGS = {mark.replace("▁", gap): mark for mark in TOOL_TOKENS for gap in ("▁", "_", " ")}
MARKS = tuple(SPELLINGS)

TYPE = "function"
FENCE, LANGUAGE = "```", "json"
ONE_WORD = re.compile(r"[\w.:/-]{0,128}")
NAME_END = re.compile(r"[\s{`]")
WITHOUT_SEPARATOR = re.compile(rf"(?:{TYPE}\s+)?([^\s{{`]+)\s*([{{`].*)?", re.DOTALL)


class Place(Enum):
    CONTENT = auto()
    BETWEEN = auto()  # where a call may begin without its mark
    HEADER = auto()  # after a call's mark, before the separator
    NAME = auto()  # after `function` and the separator
    OPENING = auto()  # before the first character of the arguments
    ARGUMENTS = auto()


class DeepSeekCalls:
    """Pushed texts come back as events; ``finish`` gives what was held back."""

    def __init__(self) -> None:
        self.writer = EventWriter()
        self.scanner = MarkScanner(SPELLINGS)
        self.place = Place.CONTENT
        self.held = ""  # text of this place that is not given yet
        self.header = ""
        self.skip: list[str] = []

    @property
    def marks(self) -> tuple[str, ...]:
        """What is now a mark and no text."""
        return MARKS

    def push(self, text: str) -> list[Event]:
        for piece, mark in self.scanner.push(text):
            if mark is None:
                self._text(piece)
            elif mark == SEPARATOR:
                self._separator()
            else:
                self._end(cut=False)
                self.place = {
                    CALLS_BEGIN: Place.BETWEEN,
                    CALL_BEGIN: Place.HEADER,
                    CALL_END: Place.BETWEEN,
                }.get(mark, Place.CONTENT)
        return self.writer.take()

    def finish(self, cut: bool) -> list[Event]:
        """``cut``: the answer was ended from outside (its length), not by the model."""
        half_mark = self.scanner.finish()
        if not cut or self.place is Place.CONTENT:
            self._text(half_mark)
        self._end(cut)
        self.place = Place.CONTENT
        return self.writer.take()

    def _text(self, text: str) -> None:
        if self.place is Place.CONTENT:
            self.writer.content(text)
            return
        self.held += text
        if self.place is Place.BETWEEN and not ONE_WORD.fullmatch(self.held.strip()):
            self._to_content()  # names no function
        elif self.place is Place.NAME:
            self.held = self.held.lstrip()
            if match := NAME_END.search(self.held):
                self._name(match.start())
        elif self.place is Place.OPENING:
            self._opening()
        elif self.place is Place.ARGUMENTS:
            self._arguments()

    def _separator(self) -> None:
        if self.place in (Place.OPENING, Place.ARGUMENTS, Place.NAME):
            return  # a second one separates nothing
        self.header, self.held = self.held.strip(), ""
        if self.header in (TYPE, "") or self.place is Place.CONTENT:
            self.place = Place.NAME
        else:
            self._begin(self.header)

    def _name(self, length: int) -> None:
        """After the separator: a name, or the arguments of a call that was named before it."""
        name, self.held = self.held[:length], self.held[length:]
        if name or self.header:
            self._begin(name or self.header)
        else:
            self._to_content()

    def _begin(self, name: str) -> None:
        self.writer.begin(name)
        self.place, self.skip = Place.OPENING, [FENCE, LANGUAGE]
        self._opening()

    def _opening(self) -> None:
        """Skip white space, the fence and its language, up to the arguments' first character."""
        self.held = self.held.lstrip()
        while self.skip and self.held:
            if self.held.startswith(self.skip[0]):
                self.held = self.held.removeprefix(self.skip[0]).lstrip()
            elif self.skip[0].startswith(self.held):
                return
            del self.skip[0]
        if self.held:
            self.place = Place.ARGUMENTS
            self._arguments()

    def _arguments(self) -> None:
        """Give all but what may turn out to be the closing fence."""
        sure = len(_without_fence(self.held))
        self.writer.argue(self.held[:sure])
        self.held = self.held[sure:]

    def _end(self, cut: bool) -> None:
        """A mark or the answer's end closes whatever is open."""
        if self.place is Place.BETWEEN and not self.held.isspace():
            self._to_content()
        elif self.place is Place.HEADER and not cut:
            self._end_header()
        elif self.place is Place.NAME and not cut:
            self._name(len(self.held.rstrip()))
        if self.place is Place.ARGUMENTS and cut and not is_object(self.writer.so_far):
            self.writer.argue(self.held)  # no closing fence then, but part of a string
        if self.place in (Place.OPENING, Place.ARGUMENTS):
            self.writer.end(cut)
        self.held = ""

    def _end_header(self) -> None:
        """A call without a separator: a name and an object, else words."""
        match = WITHOUT_SEPARATOR.fullmatch(self.held.strip())
        if match:
            self.held = match[2] or ""
            self._begin(match[1])
        else:
            self._to_content()

    def _to_content(self) -> None:
        self.writer.content(self.held)
        self.place, self.held = Place.CONTENT, ""


def _without_fence(text: str) -> str:
    """The text without a closing fence, whole or begun, and the white space around it."""
    text = text.rstrip()
    ticks = min(len(FENCE), len(text) - len(text.rstrip("`")))
    return text[: len(text) - ticks].rstrip() if ticks else text
