"""Guessing the next tokens cheaply, so that one pass of the model can confirm several.

A drafter looks at every pass and leaves its guesses at the sequences (``Sequence.drafts``). Three
ways to guess: the model's own multi-token prediction module, a small model of the same vocabulary,
or what followed the same words earlier in the text. How many tokens to guess is pacing.py's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qiusuo.engine.pacing import Pace
from qiusuo.engine.request import Sequence
from qiusuo.engine.scheduler import Work
from qiusuo.model.moe import Routing

# N tokens of a pass, D hidden, L MoE layers, K experts a token.

REST = 256  # passes without a guess where guessing does not pay


@dataclass
class Pass:
    """A pass that was made: the work in the order of its tokens, how much of each sequence the
    cache held before, the row of its first token, what came out, and how long it took."""

    plan: list[Work]
    lengths: list[int]
    starts: list[int]
    hidden_ND: Tensor
    routings: dict[int, Routing]
    seconds: float = 0.0

    def last_row(self, place: int) -> int:
        """The row of the last known token of a piece of work: drafts follow."""
        return self.starts[place] + self.plan[place].count - 1

    def width(self, place: int) -> int:
        """Rows from there on that want logits."""
        return 1 + len(self.plan[place].drafts)

    def kept(self, place: int) -> int:
        """Rows of a piece of work that were right: all known tokens, and the drafts accepted."""
        return self.plan[place].sequence.length - self.lengths[place]

    def experts(self, start: int, stop: int) -> Tensor:
        """The choices [tokens, L, K] of the routers for these rows."""
        chosen = [self.routings[layer].indices_MK[start:stop] for layer in sorted(self.routings)]
        return torch.stack(chosen, dim=1).to(torch.int16)


class Drafter(Protocol):
    def observe(self, done: Pass) -> None:
        """Look at a pass after its tokens were drawn, and leave drafts for the next."""
        ...


class NoDrafter:
    def observe(self, done: Pass) -> None:
        return


def drafting(done: Pass) -> list[Sequence]:
    """The sequences of a pass that may go on with drafts."""
    return [
        work.sequence
        for work in done.plan
        if work.sequence.finish_reason is None
        and work.sequence.pending == 1
        and not work.sequence.forced
        and not work.sequence.siblings  # a fork must not share pages that drafts are written to
    ]


def possible(sequence: Sequence) -> int:
    """How many of a sequence's drafts can come true: no further than the answer may go, and than
    its constraint lets them."""
    room = max(0, sequence.room - sequence.answered - 1)
    if sequence.matcher is None or not sequence.drafts:
        return room
    return min(room, sequence.matcher.fitting(sequence.drafts))


@dataclass
class Paced:
    """What drafters have in common: the pace, and learning it from passes of answers alone.
    ``rests``: whether keeping up with the passes costs enough to stop where it does not pay."""

    pace: Pace
    rests: bool = field(default=False, init=False)
    wanted: int = field(default=0, init=False)  # tokens of the last guess
    asked: int = field(default=0, init=False)  # sequences it was for
    guessing: float = field(default=0.0, init=False)  # seconds that it took
    resting: int = field(default=0, init=False)  # passes that it still looks away

    def observe(self, done: Pass) -> None:
        began = time.perf_counter()
        if self.resting:
            self._rest(done)
            return
        self._learn(done)
        sequences = drafting(done)
        self.asked = len(sequences)
        self.wanted = self.pace.length(self.asked) if sequences else 0
        self.guess(done, sequences, self.wanted)
        for sequence in sequences:
            sequence.drafts = sequence.drafts[: possible(sequence)]
        self.guessing = time.perf_counter() - began
        if self.rests and sequences and self.pace.idle(self.asked):
            self.resting = REST

    def _rest(self, done: Pass) -> None:
        """Where guessing does not pay, keeping up with the passes would cost for nothing. After a
        rest it is tried again, with sequences that begin from then on."""
        self.resting -= 1
        self.asked = 0
        for sequence in drafting(done):
            sequence.drafts = []
        if not self.resting:
            self.pace.wake()

    def guess(self, done: Pass, sequences: list[Sequence], length: int) -> None:
        raise NotImplementedError

    def _learn(self, done: Pass) -> None:
        """By the length that was wanted: that there is often less to guess is part of its worth."""
        if self.asked and all(work.count == 1 for work in done.plan):
            tokens = sum(max(1, done.kept(p)) for p in range(len(done.plan))) / len(done.plan)
            self.pace.learn(self.asked, self.wanted, tokens, done.seconds, self.guessing)


class NgramDrafter(Paced):
    """Prompt lookup: where the last few tokens have stood before, what followed them there is the
    guess. Costs next to nothing; pays where an answer repeats its prompt (code, quotations,
    extraction)."""

    def __init__(self, most: int = 4, longest: int = 3) -> None:
        super().__init__(Pace(most))
        self.longest = longest
        self.indexes: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def guess(self, done: Pass, sequences: list[Sequence], length: int) -> None:
        for sequence in sequences:
            sequence.drafts = self._follow(sequence, length) if length else []

    def _follow(self, sequence: Sequence, most: int) -> list[int]:
        index = self.indexes.setdefault(sequence, NgramIndex(self.longest))
        place = index.find(sequence.tokens)
        return [] if place is None else sequence.tokens[place : place + most]


class NgramIndex:
    """Where every run of up to ``longest`` tokens of one text last ended. The text only grows, and
    each of its tokens is looked at once."""

    def __init__(self, longest: int) -> None:
        self.ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self.read = 0

    def find(self, tokens: list[int]) -> int | None:
        """The place after the latest earlier occurrence of the longest run at the text's end."""
        for end in range(self.read + 1, len(tokens)):
            for size, ends in enumerate(self.ends[:end], 1):
                ends[tuple(tokens[end - size : end])] = end
        self.read = len(tokens) - 1
        for size in range(len(self.ends), 0, -1):
            place = self.ends[size - 1].get(tuple(tokens[-size:]))
            if place is not None:
                return place
        return None
