"""Token ids to text while they come: never half a character, and thoughts told from answers."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import THINK_BEGIN, THINK_END

REPLACEMENT = "\ufffd"  # what an unfinished character decodes to
LONGEST_CHARACTER = 4  # tokens, where each is a byte


class TextStream:
    """Pieces of text that join to what decoding all ids at once gives.

    Only the ids since the last whole piece are decoded, with those of the piece before them: some
    decoders write a word differently at the start of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.before: list[int] = []
        self.pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, "" while a character is unfinished."""
        if token >= self.tokenizer.vocab_size:  # a row of padding in the embedding: no text
            return ""
        self.pending.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT) and len(self.pending) < LONGEST_CHARACTER:
            return ""
        self.before, self.pending = self.pending, []
        return text

    def finish(self) -> str:
        """What is left, half a character too, as the replacement character."""
        text = self._text() if self.pending else ""
        self.before, self.pending = [], []
        return text

    def _text(self) -> str:
        head = self.tokenizer.decode(self.before)
        return self.tokenizer.decode(self.before + self.pending)[len(head) :]


class Part(StrEnum):
    THOUGHT = "thought"
    ANSWER = "answer"


class ThoughtSplitter:
    """Tells an answer's thought (`<think>...</think>`) from the answer, however the text is cut.

    ``open``: whether the prompt opened the thought already, as R1's template does. A thought can
    only stand at the very beginning; a later `<think>` is text like any other. The white space
    between the marks and the words belongs to neither."""

    def __init__(self, open: bool) -> None:
        self.part = Part.THOUGHT if open else Part.ANSWER
        self.held = ""  # may become a mark, or is white space that may turn out to frame one
        self.begun = False  # whether words of this part have been given
        self.may_open = not open

    def push(self, text: str) -> Iterator[tuple[Part, str]]:
        self.held += text
        if self.may_open:
            start = self.held.lstrip()
            if THINK_BEGIN.startswith(start[: len(THINK_BEGIN)]) and len(start) < len(THINK_BEGIN):
                return
            self.may_open = False
            if start.startswith(THINK_BEGIN):
                self.part, self.held = Part.THOUGHT, start.removeprefix(THINK_BEGIN)
        if self.part is Part.THOUGHT:
            thought, mark, rest = self.held.partition(THINK_END)
            if mark:
                yield from self._give(thought.rstrip())
                self.part, self.held, self.begun = Part.ANSWER, rest, False
            else:
                kept = _tail_to_hold(self.held)
                ready, self.held = self.held[: len(self.held) - kept], self.held[-kept:]
                self.held = self.held if kept else ""
                yield from self._give(ready)
                return
        ready, self.held = self.held, ""
        yield from self._give(ready)

    def finish(self) -> Iterator[tuple[Part, str]]:
        """What was held back: a thought that never closed stays a thought."""
        ready, self.held = self.held, ""
        yield from self._give(ready.rstrip() if self.part is Part.THOUGHT else ready)

    def _give(self, text: str) -> Iterator[tuple[Part, str]]:
        if not self.begun:
            text = text.lstrip()
        if text:
            self.begun = True
            yield self.part, text


def _tail_to_hold(text: str) -> int:
    """How many characters at the end may belong to `</think>` or to the white space before it."""
    words = text
    for length in range(min(len(THINK_END) - 1, len(text)), 0, -1):
        if text.endswith(THINK_END[:length]):
            words = text[:-length]
            break
    return len(text) - len(words.rstrip())
