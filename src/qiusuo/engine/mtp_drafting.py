"""Drafts of the model's own multi-token prediction module (DeepSeek-V3, arXiv:2412.19437 §2.2).

The module joins the hidden state that predicted a token with that token's embedding, and predicts
the one after. It has a layer of the cache of its own, on the same pages: after every pass it reads
what the pass has settled (the states of all tokens that were right, each with its next token), and
from the last of them it guesses. For a second guess it reads its own output as if it were the main
model's, and so on; that is a step beyond its training, and pacing.py sees whether it pays.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qiusuo.engine.drafting import Paced, Pass
from qiusuo.engine.pacing import Pace
from qiusuo.engine.paged_cache import PagedCache
from qiusuo.engine.request import Sequence
from qiusuo.model.transformer import Transformer

# N tokens of a pass, B sequences, D hidden.

UNREADABLE = ("cancelled", "deadline", "error")  # ends without pages, or without a next token


@dataclass(frozen=True)
class _Reading:
    """Rows of a pass whose next tokens are known, for the module to read; ``length`` of the
    sequence's tokens it has read before."""

    sequence: Sequence
    length: int
    rows: range

    @property
    def pages(self) -> list[int]:
        return self.sequence.pages


class MTPDrafter(Paced):
    """``most``: tokens to guess at most. The first module serves; deeper ones need states two
    tokens back."""

    def __init__(self, model: Transformer, cache: PagedCache, most: int = 3) -> None:
        if not model.model.mtp_blocks:
            raise ValueError("this model has no MTP module to draft with")
        super().__init__(Pace(most))
        self.model, self.cache = model, cache
        # How many tokens of a sequence the module has read: one that missed some cannot go on.
        self.read: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def guess(self, done: Pass, sequences: list[Sequence], length: int) -> None:
        for sequence in sequences:
            sequence.drafts = []
        readings = self._readings(done)
        if not readings:
            return
        states_ND, next_N, rows = self._gathered(done, readings)
        hidden_ND = self._module(states_ND, next_N, readings)
        wanted = [
            (reading, row)
            for reading, row in zip(readings, rows, strict=True)
            if reading.sequence in sequences
        ]
        if not length or not wanted:
            return
        self._chain(
            [reading.sequence for reading, _ in wanted],
            hidden_ND[torch.tensor([row for _, row in wanted], device=hidden_ND.device)],
            length,
        )

    def _readings(self, done: Pass) -> list[_Reading]:
        readings = []
        for place, work in enumerate(done.plan):
            sequence, before = work.sequence, done.lengths[place]
            start, kept = done.starts[place], done.kept(place)
            # Finished ones too: others may find their pages.
            if sequence.finish_reason in UNREADABLE:
                continue
            # What was found in the cache has been read by whoever left it there. It may be less
            # than was read before a preemption; where it is more, some was missed.
            if before > self.read.get(sequence, sequence.cached_tokens):
                continue
            readings.append(_Reading(sequence, before, range(start, start + kept)))
            self.read[sequence] = before + kept
        # Equal counts of tokens side by side make one group.
        return sorted(readings, key=lambda reading: len(reading.rows))

    def _gathered(self, done: Pass, readings: list[_Reading]) -> tuple[Tensor, Tensor, list[int]]:
        """States and next tokens of all readings, and where each reading's last row stands."""
        rows: list[int] = []
        following: list[int] = []
        lasts = []
        for reading in readings:
            rows += reading.rows
            first = reading.length + 1
            following += reading.sequence.tokens[first : first + len(reading.rows)]
            lasts.append(len(rows) - 1)
        device = done.hidden_ND.device
        states_ND = done.hidden_ND[torch.tensor(rows, device=device)]
        return states_ND, torch.tensor(following, device=device), lasts

    def _module(self, states_ND: Tensor, next_N: Tensor, readings: list[_Reading]) -> Tensor:
        """The module's output states [N, D] for readings that stand in groups of equal counts."""
        by_count: dict[int, list[_Reading]] = defaultdict(list)
        for reading in readings:
            by_count[len(reading.rows)].append(reading)
        groups = [
            self.cache.group(together, count, count == 1) for count, together in by_count.items()
        ]
        positions = [
            reading.length + place for reading in readings for place in range(len(reading.rows))
        ]
        positions_1N = torch.tensor([positions], device=states_ND.device)
        context = self.model.context(next_N[None], positions_1N, groups=groups)
        return self.model.predict_ahead(states_ND[None], next_N[None], 0, context).x_BTD[0]

    def _chain(self, sequences: list[Sequence], states_BD: Tensor, length: int) -> None:
        """Guess from states that stand for each sequence's last token but one."""
        for step in range(length):
            guessed_B = self.model.logits(states_BD).argmax(-1)
            for sequence, token in zip(sequences, guessed_B.tolist(), strict=True):
                sequence.drafts.append(token)
            if step + 1 == length:
                return
            # A further guess needs a place in the module's cache, behind what is settled.
            here = [
                place
                for place, sequence in enumerate(sequences)
                if self._has_place(sequence, sequence.length + step)
            ]
            if not here:
                return
            sequences = [sequences[place] for place in here]
            here_B = torch.tensor(here, device=states_BD.device)
            readings = [_Reading(s, s.length + step, range(1)) for s in sequences]
            states_BD = self._module(states_BD[here_B], guessed_B[here_B], readings)

    def _has_place(self, sequence: Sequence, position: int) -> bool:
        limit = self.model.config.max_position_embeddings
        return position < min(len(sequence.pages) * self.cache.page_tokens, limit - 1)
