"""Packing documents into rows, for ever, in an order that a few integers can name.

For each source and epoch the documents are put in a random order and joined; the joined stream is
cut, from a random offset on, into windows that lie `sequence_length` apart and reach
`1 + lookahead` tokens into the next; the windows are taken in a random order. What is before the
offset, and the tail that fills no window, wait for another epoch. With several sources each row
draws its own by weight.

Every order comes from a stream named by (seed, source, epoch), and the draw of row r is number r
of another, so that the whole state is the row counter and an (epoch, position) for each source.

Shapes: B rows, S = sequence_length + 1 + lookahead, D documents, W windows, N rows of one source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qiusuo.data.batch import Batch
from qiusuo.data.errors import DataError
from qiusuo.data.randomness import check_seed, fractions, permutation
from qiusuo.data.shards import Shards

FORMAT = 1
DOCUMENT_ORDER, OFFSET, WINDOW_ORDER, MIXTURE = range(4)
"""What a random stream is for: the last integer of its name."""


class Loader:
    """An endless iterator of batches from weighted sources, which can be saved at any batch."""

    def __init__(
        self,
        sources: Sequence[tuple[Shards, float]],
        *,
        batch_size: int,
        sequence_length: int,
        lookahead: int = 0,
        seed: int = 0,
    ) -> None:
        """`DataError` for sizes or weights that are not positive, for sources of different
        vocabularies, and for one with too few tokens for a window."""
        if batch_size < 1 or sequence_length < 1 or lookahead < 0:
            raise DataError(
                f"batch_size and sequence_length must be at least 1 and lookahead at least 0, not "
                f"{batch_size}, {sequence_length} and {lookahead}"
            )
        _check_sources(sources, sequence_length + 1 + lookahead)
        self._batch_size = batch_size
        weight = np.array([weight for _, weight in sources], dtype=np.float64)
        self._shares = np.cumsum(weight / weight.sum())
        self._seed = check_seed(seed)
        self._rows = 0
        self._sources = [
            _Source(shards, (seed, number), sequence_length, 1 + lookahead)
            for number, (shards, _) in enumerate(sources)
        ]
        self._configuration: dict[str, Any] = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "lookahead": lookahead,
            "seed": seed,
            "sources": [
                {"tokens": shards.fingerprint, "weight": float(weight)}
                for shards, weight in sources
            ],
        }

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        source_B = self._draw_sources()
        parts = []
        for number, source in enumerate(self._sources):
            rows_N = np.flatnonzero(source_B == number)
            if len(rows_N):
                parts.append((rows_N, *source.take(len(rows_N))))
        self._rows += self._batch_size
        if len(parts) == 1:
            return Batch.from_arrays(*parts[0][1:])
        span = parts[0][1].shape[1]
        tokens_BS = np.empty((self._batch_size, span), np.int64)
        documents_BS = np.empty((self._batch_size, span), np.int32)
        for rows_N, tokens_NS, documents_NS in parts:
            tokens_BS[rows_N] = tokens_NS
            documents_BS[rows_N] = documents_NS
        return Batch.from_arrays(tokens_BS, documents_BS)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain numbers and text that JSON can hold."""
        return {
            "format": FORMAT,
            "rows": self._rows,
            "sources": [{"epoch": s.epoch, "position": s.position} for s in self._sources],
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
        self._rows = int(state["rows"])
        for source, place in zip(self._sources, state["sources"], strict=True):
            source.move_to(int(place["epoch"]), int(place["position"]))

    def _draw_sources(self) -> np.ndarray:
        if len(self._sources) == 1:
            return np.zeros(self._batch_size, dtype=np.int64)
        draw_B = fractions((self._seed, MIXTURE), self._batch_size, start=self._rows)
        # Rounding may leave the last share just under 1.
        return np.searchsorted(self._shares[:-1], draw_B, side="right")


class _Source:
    """One tokenised corpus: its current epoch and the next window to take."""

    def __init__(self, shards: Shards, name: tuple[int, int], stride: int, overlap: int) -> None:
        self._shards = shards
        self._name = name
        self._stride = stride
        self._span = stride + overlap
        self._span_S = np.arange(self._span)
        self.move_to(0, 0)

    def move_to(self, epoch: int, position: int) -> None:
        """Lay out an epoch and stand before one of its windows."""
        shards, name = self._shards, (*self._name, epoch)
        order_D = permutation((*name, DOCUMENT_ORDER), shards.documents)
        lengths_D = np.diff(shards.offsets_D)[order_D]
        self._ends_D = np.cumsum(lengths_D)
        # What to add to a place in the joined stream to get the place in the shards.
        self._shift_D = shards.offsets_D[order_D] - (self._ends_D - lengths_D)
        room = shards.tokens - self._span
        [chance] = fractions((*name, OFFSET), 1)
        offset = int(chance * min(self._stride, room + 1))
        windows = (room - offset) // self._stride + 1
        order_W = permutation((*name, WINDOW_ORDER), windows)
        self._starts_W = offset + order_W * self._stride
        if not 0 <= position <= windows:
            raise DataError(
                f"position {position} of epoch {epoch} is outside the {windows} windows of "
                f"{shards.folder}"
            )
        self.epoch, self.position = epoch, position

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next windows: tokens [count, S] and document numbers [count, S]."""
        parts = []
        while count:
            if self.position == len(self._starts_W):
                self.move_to(self.epoch + 1, 0)
            start_N = self._starts_W[self.position : self.position + count]
            parts.append(self._windows(start_N))
            self.position += len(start_N)
            count -= len(start_N)
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _windows(self, start_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(self._ends_D) == 1:
            rows = [self._shards.slice(start, start + self._span) for start in start_N.tolist()]
            return np.stack(rows), np.zeros((len(rows), self._span), np.int32)
        place_NS = start_N[:, None] + self._span_S
        document_NS = np.searchsorted(self._ends_D, place_NS, side="right")
        return self._shards.gather(place_NS + self._shift_D[document_NS]), document_NS


def _check_sources(sources: Sequence[tuple[Shards, float]], span: int) -> None:
    if not sources:
        raise DataError("a loader needs at least one source: a list of (shards, weight)")
    for shards, weight in sources:
        if not 0 < weight < float("inf"):
            raise DataError(f"the weight of {shards.folder} must be positive, not {weight}")
        if shards.tokens < span:
            raise DataError(
                f"{shards.folder} has {shards.tokens} tokens, fewer than one window of {span}: "
                f"use a shorter sequence_length or more text"
            )
        if shards.meta.tokenizer != sources[0][0].meta.tokenizer:
            raise DataError(
                f"vocabulary mismatch: {shards.folder} and {sources[0][0].folder} were written "
                f"with different tokenizers"
            )
