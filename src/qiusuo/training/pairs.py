"""Pairs of answers in the order that ``dpo`` learns them: every pair once an epoch, shuffled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from qiusuo.data.errors import DataError
from qiusuo.data.preferences import Pair, Preferences
from qiusuo.data.randomness import permutation


class Pairs:
    """The pairs of several files, one file behind the other, by number."""

    def __init__(self, parts: Sequence[Preferences]) -> None:
        self.parts = parts
        self.length = sum(part.length for part in parts)
        self.longest = max(part.longest for part in parts)
        together = " ".join(part.fingerprint for part in parts)
        self.fingerprint = hashlib.sha256(together.encode()).hexdigest()

    def pair(self, index: int) -> Pair:
        for part in self.parts:
            if index < part.length:
                return part.pair(index)
            index -= part.length
        raise IndexError(index)


class PairOrder:
    """Which pairs come next, for ever; two integers are all of its state."""

    def __init__(self, pairs: Pairs, seed: int) -> None:
        self.pairs, self.seed = pairs, seed
        self._move_to(0, 0)

    def take(self, count: int) -> list[int]:
        """The numbers of the next ``count`` pairs."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        if self.position == self.pairs.length:
            self._move_to(self.epoch + 1, 0)
        self.position += 1
        return self._order[self.position - 1]

    def _move_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        order_P = permutation((self.seed, epoch), self.pairs.length)
        self._order: list[int] = order_P.tolist()

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "pairs": self.pairs.fingerprint,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """DataError where other pairs were being learnt."""
        if (state["pairs"], state["seed"]) != (self.pairs.fingerprint, self.seed):
            raise DataError(
                "the pairs are others than when this run was interrupted: put the files back as "
                "they were, or start anew"
            )
        self._move_to(state["epoch"], state["position"])
