"""How many tokens to guess ahead: what has paid so far, by the clock.

Checking a guess costs time even when it is wrong: more rows for the head, and in a mixture of
experts more experts to read. So for every length of draft the answers' tokens and the seconds are
counted as the engine runs, and the length with the most tokens a second is used; none at all where
guessing does not pay. Lengths are tried in turn at first, and again from time to time. Draft length
changes no answer, so a clock may decide it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIALS = 4  # passes of each length before any is preferred
AGAIN = 100  # passes after which another length is tried anew
MEMORY = 0.8  # weight of the past in the running means


@dataclass
class _Record:
    """Running means for one length of draft: answer tokens of a sequence and pass, seconds of a
    pass, and seconds spent on guessing."""

    passes: int = 0
    tokens: float = 1.0
    seconds: float = 0.0
    guessing: float = 0.0

    def learn(self, tokens: float, seconds: float, guessing: float) -> None:
        past = MEMORY if self.passes else 0.0
        self.passes += 1
        self.tokens += (1 - past) * (tokens - self.tokens)
        self.seconds += (1 - past) * (seconds - self.seconds)
        self.guessing += (1 - past) * (guessing - self.guessing)

    def rate(self, length: int) -> float:
        """Tokens a second. Without drafts there would be no guessing either."""
        return self.tokens / max(self.seconds + (self.guessing if length else 0.0), 1e-9)


@dataclass
class Pace:
    """``most``: the longest draft. Batches of about equal size share their experience."""

    most: int
    records: dict[int, list[_Record]] = field(default_factory=dict)  # by size of batch
    passes: int = 0

    def length(self, sequences: int) -> int:
        """How many tokens to guess for each of so many sequences."""
        records = self._records(sequences)
        self.passes += 1
        fewest = min(range(len(records)), key=lambda length: records[length].passes)
        if records[fewest].passes < TRIALS or self.passes % AGAIN == 0:
            return fewest
        return self.best(sequences)

    def best(self, sequences: int) -> int:
        records = self._records(sequences)
        return max(range(len(records)), key=lambda length: records[length].rate(length))

    def idle(self, sequences: int) -> bool:
        """Whether every length has been tried, none pays, and passes without drafts show it."""
        records = self._records(sequences)
        tried = records[0].passes >= 4 * TRIALS and all(one.passes >= TRIALS for one in records)
        return tried and self.best(sequences) == 0

    def wake(self) -> None:
        """Try another length in the next pass."""
        self.passes = -1

    def learn(
        self, sequences: int, length: int, tokens: float, seconds: float, guessing: float
    ) -> None:
        """A pass of ``sequences`` with drafts of ``length`` gave each ``tokens`` on average."""
        self._records(sequences)[length].learn(tokens, seconds, guessing)

    def _records(self, sequences: int) -> list[_Record]:
        size = sequences.bit_length()
        return self.records.setdefault(size, [_Record() for _ in range(self.most + 1)])
