"""Token ids to text while they come: never half a character, and thoughts told from answers."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import THINK_BEGIN, THINK_END

REPLACEMENT = "\ufffd"  # what an unfinished character decodes to


class TextStream:
    """Pieces of text that join to what decoding all ids at once gives.

    Only the ids since the last whole character are decoded, with those that came before them: some
    decoders write a word differently at the start of a text. Replacement characters at the end
    wait for the next token, which may complete the last of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.before: list[int] = []
        self.pending: list[int] = []
        self.given = 0  # characters of the pending text that were given already

    def push(self, token: int) -> str:
        """The text that this token completes, "" while a character is unfinished."""
        if token >= self.tokenizer.vocab_size:  # a row of padding in the embedding: no text
            return ""
        self.pending.append(token)
        text = self._text()
        whole = text.rstrip(REPLACEMENT)
        piece, self.given = whole[self.given :], len(whole)
        if whole == text:
            self.before, self.pending, self.given = self.pending, [], 0
        return piece

    def finish(self) -> str:
        """What is left: half a character too, as the replacement character."""
        text = self._text()[self.given :]
        self.before, self.pending, self.given = [], [], 0
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
    only stand at the very beginning; a later `<think>` is text like any other. White space around
    a thought and before the answer belongs to neither."""

    def __init__(self, open: bool) -> None:
        self.part = Part.THOUGHT if open else Part.ANSWER
        self.held = ""  # may become a mark, or is white space that may turn out to frame one
        self.begun = False  # whether words of this part have been given
        self.may_open = not open

    def push(self, text: str) -> Iterator[tuple[Part, str]]:
        self.held += text
        if self.may_open:
            start = self.held.lstrip()
            if len(start) < len(THINK_BEGIN) and THINK_BEGIN.startswith(start):
                return
            self.may_open = False
            if start.startswith(THINK_BEGIN):
                self.part, self.held = Part.THOUGHT, start.removeprefix(THINK_BEGIN)
        if self.part is Part.THOUGHT:
            thought, mark, rest = self.held.partition(THINK_END)
            if mark:
                yield from self._give(thought.rstrip())
                self.part, self.held, self.begun = Part.ANSWER, rest, False
        sure = self.held if self.part is Part.ANSWER else _surely_thought(self.held)
        self.held = self.held[len(sure) :]
        yield from self._give(sure)

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


def _surely_thought(text: str) -> str:
    """The text without what may be the beginning of `</think>`, or white space before it."""
    for length in range(len(THINK_END) - 1, 0, -1):
        if text.endswith(THINK_END[:length]):
            text = text[:-length]
            break
    return text.rstrip()
