"""What fine-tuning learns from: a text of which only some tokens are to be predicted.

Of a conversation that is what the assistant says; the question, the tools' results and the marks
that a template puts there are read and never asked for. A source makes examples by number, so that
a loader needs to remember numbers only. It is endless (a generator of tasks: the example is a
function of its number) or finite (a file: each is shown once an epoch, in an order of its own).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qiusuo.data.errors import DataError

# Shapes: E examples, N tokens of all of them.


@dataclass(frozen=True, slots=True)
class Example:
    """One text. `counted[i]` says whether token i is to be predicted; the first never is, since
    nothing stands before it. `origin` is where it comes from, for errors: "talk.jsonl line 3"."""

    tokens: list[int]
    counted: list[bool]
    origin: str = ""


class ExampleSource(Protocol):
    """Examples by number."""

    @property
    def length(self) -> int | None:
        """How many there are; None: one for every number from 0 on."""

    @property
    def fingerprint(self) -> str:
        """Equal where every example is: a run is not resumed with others."""

    def example(self, index: int) -> Example:
        """The same for the same number, always."""


class StoredExamples:
    """A finite source in memory, at five bytes a token: what was read from a file, or verified
    answers of a model."""

    def __init__(self, examples: Iterable[Example]) -> None:
        """`DataError` for an example that has nothing to learn from, and for none at all."""
        tokens, counted = bytearray(), bytearray()
        offsets = [0]
        self._origins: list[str] = []
        for number, example in enumerate(examples):
            check_example(example, example.origin or f"example {number}")
            tokens += np.array(example.tokens, np.int32).tobytes()
            counted += bytes(example.counted)
            offsets.append(offsets[-1] + len(example.tokens))
            self._origins.append(example.origin)
        if not self._origins:
            raise DataError("there are no examples: a source needs at least one")
        self._tokens_N = np.frombuffer(tokens, np.int32)
        self._counted_N = np.frombuffer(counted, np.bool_)
        self._offsets = offsets
        self.length = len(self._origins)
        self.longest = int(np.diff(offsets).max())
        digest = hashlib.sha256(np.array(offsets, np.int64).tobytes())
        digest.update(tokens)
        digest.update(counted)
        self.fingerprint = digest.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self._offsets[-1]

    @property
    def counted(self) -> int:
        """Of these, the ones to be predicted."""
        return int(np.count_nonzero(self._counted_N))

    def example(self, index: int) -> Example:
        place = slice(self._offsets[index], self._offsets[index + 1])
        return Example(
            self._tokens_N[place].tolist(), self._counted_N[place].tolist(), self._origins[index]
        )


def check_example(example: Example, name: str) -> None:
    """`DataError` unless something in it can be learnt."""
    if len(example.tokens) != len(example.counted):
        raise DataError(
            f"{name} has {len(example.tokens)} tokens and {len(example.counted)} marks of what "
            "counts: there must be one for each token"
        )
    if True not in example.counted[1:]:
        raise DataError(
            f"{name} has no token to be predicted ({len(example.tokens)} in all, of which the "
            "first never is): leave it out"
        )
