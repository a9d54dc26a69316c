"""Drafters that read along: a module or a model with a cache of its own for the same tokens.

Its entries stand on the engine's pages, so shared beginnings, forks and preemption need nothing
more. After every pass it reads what the pass has settled, and from the last of it it guesses a
token, reads that as if it were settled, guesses the next, and so on. What it read of a guess that
turns out wrong is overwritten before anyone can see it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qiusuo.engine.drafting import Paced, Pass
from qiusuo.engine.pacing import Pace
from qiusuo.engine.paged_cache import PagedCache, PagedGroup
from qiusuo.engine.request import Sequence

# N tokens to read, B sequences, D hidden.

UNREADABLE = ("cancelled", "deadline", "error")  # ends without pages, or without a next token


@dataclass(frozen=True)
class Reading:
    """``count`` places of a sequence from ``length`` on, to be read together; ``row``: where they
    begin in the pass."""

    sequence: Sequence
    length: int
    count: int
    row: int = 0

    @property
    def pages(self) -> list[int]:
        return self.sequence.pages

    @property
    def places(self) -> range:
        return range(self.length, self.length + self.count)


class CachedDrafter(Paced):
    """``ahead``: places behind what is settled that the first guess takes, 0 or 1. ``context``:
    tokens of a sequence that can be read. ``few``: up to how many tokens are read in the form for
    few queries."""

    ahead = 0

    def __init__(self, cache: PagedCache, most: int, context: int, few: int) -> None:
        super().__init__(Pace(most))
        self.rests = True
        self.cache, self.context, self.few = cache, context, few
        # How many tokens of each sequence have been read: where some were missed, no more can be.
        self.read: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def _settled(self, done: Pass, readings: list[Reading]) -> Tensor:
        """Read what a pass has settled: output states [N, D], reading by reading."""
        raise NotImplementedError

    def _onward(self, states_BD: Tensor, guessed_B: Tensor, readings: list[Reading]) -> Tensor:
        """Read a guess for each sequence, from the states that made it: output states [B, D]."""
        raise NotImplementedError

    def _logits(self, states_BD: Tensor) -> Tensor:
        raise NotImplementedError

    def guess(self, done: Pass, sequences: list[Sequence], length: int) -> None:
        for sequence in sequences:
            sequence.drafts = []
        guessing = {one for one in sequences if self._has_place(one, one.length + self.ahead - 1)}
        readings = self._readings(done, guessing if length else set())
        if not readings:
            return
        states_ND = self._settled(done, readings)
        lasts = accumulate(reading.count for reading in readings)
        wanted = [
            (reading.sequence, last - 1)
            for reading, last in zip(readings, lasts, strict=True)
            if reading.sequence in guessing
        ]
        if not length or not wanted:
            return
        rows_B = torch.tensor([row for _, row in wanted], device=states_ND.device)
        self._chain([sequence for sequence, _ in wanted], states_ND[rows_B], length)

    def _readings(self, done: Pass, guessing: set[Sequence]) -> list[Reading]:
        readings = []
        for place, work in enumerate(done.plan):
            sequence, before = work.sequence, done.lengths[place]
            # Finished ones too: others may find their pages.
            if sequence.finish_reason in UNREADABLE:
                continue
            # What was found in the cache has mostly been read by whoever left it there (if not, or
            # if another token followed there, guesses are worse and answers the same). It may be
            # less than was read before a preemption; where it is more, some was missed.
            if before > self.read.get(sequence, sequence.cached_tokens):
                continue
            kept = done.kept(place)
            more = self.ahead if sequence in guessing else 0
            if before + kept + more > self.context:
                continue
            readings.append(Reading(sequence, before, kept + more, done.starts[place]))
            self.read[sequence] = before + kept
        # Equal counts of tokens side by side make one group.
        return sorted(readings, key=lambda reading: reading.count)

    def _where(
        self, readings: list[Reading], device: torch.device
    ) -> tuple[Tensor, list[PagedGroup]]:
        """Positions [1, N] and groups for readings in the order of their counts."""
        by_count: dict[int, list[Reading]] = defaultdict(list)
        for reading in readings:
            by_count[reading.count].append(reading)
        groups = [
            self.cache.group(together, count, count <= self.few)
            for count, together in by_count.items()
        ]
        positions = [place for reading in readings for place in reading.places]
        return torch.tensor([positions], device=device), groups

    def _chain(self, sequences: list[Sequence], states_BD: Tensor, length: int) -> None:
        """Guess from the states of each sequence's last place."""
        for step in range(length):
            guessed_B = self._logits(states_BD).argmax(-1)
            for sequence, token in zip(sequences, guessed_B.tolist(), strict=True):
                sequence.drafts.append(token)
            if step + 1 == length:
                return
            # A further guess needs a place in the cache, behind what is settled.
            ahead = self.ahead + step
            here = [
                place
                for place, sequence in enumerate(sequences)
                if self._has_place(sequence, sequence.length + ahead)
            ]
            if not here:
                return
            sequences = [sequences[place] for place in here]
            here_B = torch.tensor(here, device=states_BD.device)
            readings = [Reading(one, one.length + ahead, 1) for one in sequences]
            states_BD = self._onward(states_BD[here_B], guessed_B[here_B], readings)

    def _has_place(self, sequence: Sequence, position: int) -> bool:
        return position < min(len(sequence.pages) * self.cache.page_tokens, self.context)
