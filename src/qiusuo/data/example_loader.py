"""Packing whole examples into rows, for ever, in an order that a few integers can name.

An example is never cut: half an answer has no end, and half a question no answer. So examples are
drawn in a random order into a waiting room; a row takes the one that has waited longest, then
whatever fits best, the longest first, until nothing fits, and the rest is padding. The room is
small, so that it is no burden to a saved state, and large enough for rows to be nearly full.

Each draw picks its source by weight. A finite source is shown in a new order every epoch, an
endless one is counted through. The orders come from named streams as in loader.py, and an example
from its number, so that the whole state is integers, those of the waiting ones included.

A row ends in `lookahead` tokens of padding. The main model predicts the first `sequence_length + 1`
only; what stood behind would be seen by the modules of multi-token prediction and by no one else.

Shapes: B rows, S = sequence_length + 1 + lookahead, E examples of a batch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qiusuo.data.batch import Batch
from qiusuo.data.errors import DataError
from qiusuo.data.examples import Example, ExampleSource, check_example
from qiusuo.data.randomness import check_seed, fractions, permutation

FORMAT = 1
EXAMPLE_ORDER, MIXTURE = range(2)
"""What a random stream is for: the last integer of its name."""
WAITING = 64
DRAWS = 1024  # made at once: naming a stream costs more than drawing from it


class ExampleLoader:
    """An endless iterator of batches from weighted sources, which can be saved at any batch.

    `documents_BS` numbers the examples of a row, -1 in padding; `valid_BS` is true for the tokens
    that count."""

    def __init__(
        self,
        sources: Sequence[tuple[ExampleSource, float]],
        *,
        batch_size: int,
        sequence_length: int,
        lookahead: int = 0,
        seed: int = 0,
        pad_id: int,
    ) -> None:
        """`DataError` for sizes or weights that are not positive, and for an example that is
        longer than `sequence_length + 1` or has nothing that counts: at once for finite sources,
        which are looked through, and when its turn comes for endless ones."""
        if batch_size < 1 or sequence_length < 1 or lookahead < 0:
            raise DataError(
                f"batch_size and sequence_length must be at least 1 and lookahead at least 0, not "
                f"{batch_size}, {sequence_length} and {lookahead}"
            )
        if not sources:
            raise DataError("a loader needs at least one source: a list of (source, weight)")
        for number, (source, weight) in enumerate(sources):
            if not 0 < weight < float("inf"):
                raise DataError(f"the weight of source {number} must be positive, not {weight}")
            _check_lengths(source, number, sequence_length + 1)
        self._batch_size = batch_size
        self._room = sequence_length + 1
        self._span = sequence_length + 1 + lookahead
        self._pad_id = pad_id
        self._draws = _Draws([weight for _, weight in sources], check_seed(seed))
        self._orders = [
            _Order(source.length, (seed, number)) for number, (source, _) in enumerate(sources)
        ]
        self._sources = [source for source, _ in sources]
        self._waiting = _WaitingRoom()
        self._configuration: dict[str, Any] = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "lookahead": lookahead,
            "seed": seed,
            "pad_id": pad_id,
            "sources": [
                {"examples": source.fingerprint, "weight": float(weight)}
                for source, weight in sources
            ],
        }

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = [self._next_row() for _ in range(self._batch_size)]
        return batch_of_examples(rows, span=self._span, pad_id=self._pad_id)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain numbers and text that JSON can hold."""
        return {
            "format": FORMAT,
            "drawn": self._draws.drawn,
            "sources": [{"epoch": o.epoch, "position": o.position} for o in self._orders],
            "waiting": self._waiting.numbers(),
            "configuration": self._configuration,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was saved; `DataError` if it is of another loader."""
        if state.get("format") != FORMAT:
            raise DataError(f"unknown loader state format {state.get('format')!r}: need {FORMAT}")
        saved = state["configuration"]
        for key, value in self._configuration.items():
            if saved.get(key) != value:
                raise DataError(
                    f"this loader state was saved with {key} = {saved.get(key)}, but the loader "
                    f"has {value}: resume with the same data and settings, or start anew"
                )
        self._draws.drawn = int(state["drawn"])
        for order, place in zip(self._orders, state["sources"], strict=True):
            order.move_to(int(place["epoch"]), int(place["position"]))
        self._waiting = _WaitingRoom()
        for number, index in state["waiting"]:
            self._enter(int(number), int(index))

    def _next_row(self) -> list[Example]:
        waiting = self._waiting
        row: list[Example] = []
        room = self._room
        while True:
            while len(waiting) < WAITING:
                number = self._draws.next()
                self._enter(number, self._orders[number].next())
            example = waiting.take(room) if row else waiting.take_oldest()
            if example is None:
                return row
            row.append(example)
            room -= len(example.tokens)

    def _enter(self, number: int, index: int) -> None:
        source = self._sources[number]
        example = source.example(index)
        if source.length is None:  # a finite one was looked through
            _check(example, number, index, self._room)
        self._waiting.enter(number, index, example)


def batch_of_examples(rows: Sequence[Sequence[Example]], *, span: int, pad_id: int) -> Batch:
    """Rows of `span` tokens, each with its examples one behind the other; they must fit."""
    tokens: list[int] = []
    counted: list[bool] = []
    numbers: list[int] = []
    lengths: list[int] = []
    starts: list[int] = []
    for row in rows:
        room = span
        for number, example in enumerate(row):
            starts.append(len(tokens))
            tokens += example.tokens
            counted += example.counted
            numbers.append(number)
            lengths.append(len(example.tokens))
            room -= len(example.tokens)
        tokens += [pad_id] * room
        counted += [False] * room
        numbers.append(-1)
        lengths.append(room)
    valid = np.array(counted, np.bool_)
    valid[starts] = False  # nothing of its own stands before an example's first token
    shape = (len(rows), span)
    documents = np.repeat(np.array(numbers, np.int32), lengths)
    return Batch.from_arrays(
        np.array(tokens, np.int64).reshape(shape), documents.reshape(shape), valid.reshape(shape)
    )


class _Draws:
    """Which source each example comes from: number `drawn` of a stream."""

    def __init__(self, weights: list[float], seed: int) -> None:
        self.drawn = 0
        self._seed = seed
        self._shares = np.cumsum(weights) / np.sum(weights)
        self._block = -1
        self._numbers: list[int] = []

    def next(self) -> int:
        block, place = divmod(self.drawn, DRAWS)
        self.drawn += 1
        if len(self._shares) == 1:
            return 0
        if block != self._block:
            draw = fractions((self._seed, MIXTURE), DRAWS, start=block * DRAWS)
            # Rounding may leave the last share just under 1.
            self._numbers = np.searchsorted(self._shares[:-1], draw, side="right").tolist()
            self._block = block
        return self._numbers[place]


class _Order:
    """The order of one source: its current epoch and the next place in it."""

    def __init__(self, length: int | None, name: tuple[int, int]) -> None:
        self._length = length
        self._name = name
        self.move_to(0, 0)

    def move_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        if self._length is not None:
            order_E = permutation((*self._name, epoch, EXAMPLE_ORDER), self._length)
            self._order: list[int] = order_E.tolist()

    def next(self) -> int:
        """The number of the next example."""
        if self._length is not None and self.position == self._length:
            self.move_to(self.epoch + 1, 0)
        position = self.position
        self.position += 1
        return position if self._length is None else self._order[position]


class _WaitingRoom:
    """Examples by the order of their coming, and by length."""

    def __init__(self) -> None:
        self._arrivals = 0
        self._held: dict[int, tuple[int, int, Example]] = {}  # the oldest first
        self._by_length: list[tuple[int, int]] = []  # (length, -arrival): of equals the oldest last

    def __len__(self) -> int:
        return len(self._held)

    def enter(self, number: int, index: int, example: Example) -> None:
        self._held[self._arrivals] = (number, index, example)
        insort(self._by_length, (len(example.tokens), -self._arrivals))
        self._arrivals += 1

    def take_oldest(self) -> Example:
        arrival = next(iter(self._held))
        example = self._held.pop(arrival)[2]
        del self._by_length[bisect_left(self._by_length, (len(example.tokens), -arrival))]
        return example

    def take(self, room: int) -> Example | None:
        """The longest that fits, of equals the oldest; None where none does."""
        place = bisect_right(self._by_length, (room, 0)) - 1
        if place < 0:
            return None
        _, arrival = self._by_length.pop(place)
        return self._held.pop(-arrival)[2]

    def numbers(self) -> list[list[int]]:
        """Source and index of each, the oldest first."""
        return [[number, index] for number, index, _ in self._held.values()]


def _check_lengths(source: ExampleSource, number: int, room: int) -> None:
    if source.length is None:
        return
    if source.length < 1:
        raise DataError(f"source {number} has no examples: it needs at least one")
    for index in range(source.length):
        _check(source.example(index), number, index, room)


def _check(example: Example, number: int, index: int, room: int) -> None:
    name = example.origin or f"example {index} of source {number}"
    check_example(example, name)
    length = len(example.tokens)
    if length > room:
        raise DataError(
            f"{name} has {length} tokens, and a row has room for {room}: set sequence_length to "
            f"at least {length - 1}, or leave it out"
        )
