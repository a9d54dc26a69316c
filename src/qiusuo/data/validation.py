"""Validation windows: every token of a split predicted exactly once, in order.

Windows lie `sequence_length` apart, so that each token but the very first is the next-token target
of one row (and, with lookahead k, of one row at each depth). The last row is padded.

Shapes: B rows, S = sequence_length + 1 + lookahead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qiusuo.data.batch import Batch
from qiusuo.data.errors import DataError
from qiusuo.data.shards import Shards


def validation_batches(
    shards: Shards,
    *,
    batch_size: int,
    sequence_length: int,
    lookahead: int = 0,
    limit_tokens: int | None = None,
) -> Iterator[Batch]:
    """Batches over a split, or over its first `limit_tokens` predictions; the last may be smaller.

    Targets of the next token are `tokens_BS[:, 1:sequence_length + 1]`, to be counted where
    `valid_BS` at the same places is true.
    """
    if batch_size < 1 or sequence_length < 1 or lookahead < 0:
        raise DataError(
            f"batch_size and sequence_length must be at least 1 and lookahead at least 0, not "
            f"{batch_size}, {sequence_length} and {lookahead}"
        )
    if limit_tokens is not None and limit_tokens < 1:
        raise DataError(f"limit_tokens must be at least 1 or None, not {limit_tokens}")
    targets = shards.tokens - 1
    if limit_tokens is not None:
        targets = min(targets, limit_tokens)
    if targets < 1:
        raise DataError(f"{shards.folder} has {shards.tokens} tokens: there is nothing to predict")
    return _batches(shards, batch_size, sequence_length, 1 + lookahead, targets)


def _batches(
    shards: Shards, batch_size: int, stride: int, overlap: int, targets: int
) -> Iterator[Batch]:
    start_W = np.arange(0, targets, stride)
    for first in range(0, len(start_W), batch_size):
        place_BS = start_W[first : first + batch_size, None] + np.arange(stride + overlap)
        valid_BS = place_BS <= targets
        place_BS = np.minimum(place_BS, targets)
        document_BS = np.searchsorted(shards.offsets_D, place_BS, side="right") - 1
        yield Batch.from_arrays(
            np.where(valid_BS, shards.gather(place_BS), 0),
            np.where(valid_BS, document_BS, -1),
            valid_BS,
        )
