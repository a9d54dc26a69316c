"""Calls of tools as Hermes and Qwen write them, read while they come.

A JSON object with "name" and "arguments" between ``<tool_call>`` and ``</tool_call>``. The
arguments are given as the model's own JSON text, as soon as the name is known. Marks are told from
the same letters inside a JSON string: there the closing mark counts only before a line end or at
the answer's end, where the model must have forgotten to close the string. An object that is
complete ends its call without the closing mark, and what is no such object is content.
"""

from __future__ import annotations

import json

from qiusuo.data.tool_format import CLOSE, OPEN
from qiusuo.engine.answer_events import Event, EventWriter, MarkScanner, is_object

SPELLINGS = {gap + mark: mark for mark in (OPEN, CLOSE) for gap in ("", "\n")}
"""The line end before a mark is its frame's, as the templates write it."""
MARKS = tuple(sorted(SPELLINGS, key=len, reverse=True))

FENCE = "```json"  # what some models put before the object
ARGUMENT_KEYS = ("arguments", "parameters")


class HermesCalls:
    """Pushed texts come back as events; ``finish`` gives what was held back."""

    def __init__(self) -> None:
        self.writer = EventWriter()
        self.scanner = MarkScanner(SPELLINGS)
        self.body: _Body | None = None  # of the call that is open
        self.after_body = ""  # what may stand between an object and its closing mark

    @property
    def marks(self) -> tuple[str, ...]:
        """What is now a mark and no text."""
        if self.body is None:
            return MARKS
        return () if self.body.quoted else (OPEN, CLOSE)

    def push(self, text: str) -> list[Event]:
        self._read(text, final=False)
        return self.writer.take()

    def finish(self, cut: bool) -> list[Event]:
        """``cut``: the answer was ended from outside (its length), not by the model."""
        self._read("", final=True)
        half_mark = self.scanner.finish()
        if not (cut and self.writer.after_call):
            self._content(half_mark)
        if self.body is not None:
            self._close(cut)
        return self.writer.take()

    def _read(self, text: str, final: bool) -> None:
        while True:
            if self.body is None:
                text = self._read_content(text)
            if self.body is None:
                return
            rest = self.body.read(text, final)
            if rest is None:
                return
            self._close(cut=False)
            text = rest

    def _read_content(self, text: str) -> str:
        """Give content up to a call; the text after its mark."""
        for piece, mark in self.scanner.push(text):
            if mark is None:
                self._content(piece)
                continue
            self.after_body = ""
            if mark == OPEN:
                self.body = _Body(self.writer)
                return self.scanner.finish()
        return ""

    def _content(self, text: str) -> None:
        if self.after_body:
            text = text.lstrip(self.after_body)
            self.after_body = "" if text else self.after_body
        self.writer.content(text)

    def _close(self, cut: bool) -> None:
        if self.body is not None:
            self.body.close(cut)
            self.after_body = self.body.residue
        self.body = None


class _Body:
    """One call's JSON, character by character: which key it is at, and where its value ends."""

    def __init__(self, writer: EventWriter) -> None:
        self.writer = writer
        self.raw: list[str] = []  # all that was read, until the call has a name
        self.held = ""  # may become a mark
        self.depth = 0
        self.quoted = self.escaped = False
        self.key: str | None = None  # of the object itself, while its value is read
        self.value: list[str] = []  # what was read of that value, or of the key before it
        self.name: str | None = None
        self.arguments: str | None = None  # those that came before the name
        self.argued = False  # whether arguments have come
        self.streaming = False  # whether a part of these arguments was given
        self.complete = self.fenced = False

    def read(self, text: str, final: bool) -> str | None:
        """None if the call goes on, else the text behind it. ``final``: no more will come."""
        text, self.held = self.held + text, ""
        for place, character in enumerate(text):
            if character == "<":
                mark = self._mark(text[place : place + len(CLOSE) + 1], final)
                if mark is None:
                    self.held = text[place:]
                    break
                if mark:
                    return text[place:].removeprefix(CLOSE)
            if not self._read_character(character):
                return text[place + 1 :]
        self._give()
        return None

    def close(self, cut: bool) -> None:
        """End the call, or give it as content if it has no name."""
        if not self.complete:
            self._end_value()
        if self.name is not None:
            self.writer.end(cut)
        elif not cut:
            self.writer.content("".join(self.raw))

    @property
    def residue(self) -> str:
        """Signs that may follow the object: a brace too many, and the end of a fence."""
        if not self.complete:
            return ""
        return "}` \r\n" if self.fenced else "}"

    def _mark(self, text: str, final: bool) -> str | None:
        """The mark that this begins with, "" for none, None if more text decides."""
        if self.quoted:
            after = text.removeprefix(CLOSE)
            if after != text and (after[:1] in ("\n", "\r") or (final and not after)):
                return CLOSE
            return None if CLOSE.startswith(text) and not final else ""
        for mark in (OPEN, CLOSE):
            if text.startswith(mark):
                return mark
            if mark.startswith(text):
                return None
        return ""

    def _read_character(self, character: str) -> bool:
        """False where the object ends, or cannot be one."""
        if self.name is None:
            self.raw.append(character)
        if self.depth == 0:
            self.depth = int(character == "{")
            self.fenced = self.fenced or character == "`"
            if self.depth or character.isspace():
                return True
            return FENCE.startswith("".join(self.raw).strip())
        if self.quoted:
            self.quoted = self.escaped or character != '"'
            self.escaped = not self.escaped and character == "\\"
        elif self.depth == 1 and (character in ":,}" or character.isspace()):
            self._read_between(character)
            return not self.complete
        elif character == '"':
            self.quoted = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]" and self.depth > 1:
            self.depth -= 1
        self.value.append(character)
        return True

    def _read_between(self, character: str) -> None:
        """What stands between the object's own keys and values."""
        if character == ":" and self.key is None:
            self.key, self.value = _string(self.value) or "", []
            if self.key in ARGUMENT_KEYS:
                self.key = "" if self.argued else ARGUMENT_KEYS[0]
                self.argued = True
        elif character in ",}":
            self._end_value()
            self.complete = character == "}"

    def _end_value(self) -> None:
        if self.key == "name" and self.name is None:
            self.name = _string(self.value) or None
            if self.name is not None:
                self.writer.begin(self.name)
                self.writer.argue(self.arguments or "")
        elif self.key == ARGUMENT_KEYS[0]:
            text = "".join(self.value)
            inner = None if self.streaming else _string(self.value)
            if inner is not None and is_object(inner):  # JSON inside a string of JSON
                text = inner
            if self.name is None:
                self.arguments = text
            else:
                self.writer.argue(text)
        self.key, self.value = None, []

    def _give(self) -> None:
        """The arguments so far, unless they are a string that may hold the true ones."""
        known = self.name is not None and self.key == ARGUMENT_KEYS[0] and self.value
        if known and (self.streaming or self.value[0] != '"'):
            self.writer.argue("".join(self.value))
            self.value, self.streaming = [], True


def _string(characters: list[str]) -> str | None:
    """The string that this JSON spells, None for anything else."""
    try:
        value = json.loads("".join(characters))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None
