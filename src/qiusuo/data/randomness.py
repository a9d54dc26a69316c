"""Random numbers that stay the same: across runs, machines and versions of NumPy.

NumPy promises the raw stream of a bit generator for ever, but not what its distributions and
shuffles make of it, so these are made here. Every use has its own stream, named by integers.
"""

from __future__ import annotations

import numpy as np

from qiusuo.data.errors import DataError


def check_seed(seed: int) -> int:
    """The seed itself; `DataError` if it is negative, which no stream can be named by."""
    if seed < 0:
        raise DataError(f"seed must not be negative, not {seed}")
    return seed


def fractions(name: tuple[int, ...], count: int, *, start: int = 0) -> np.ndarray:
    """Numbers `start` to `start + count` of a stream, float64 in [0, 1), without making those
    before."""
    key = np.random.SeedSequence(name).generate_state(2, np.uint64)
    # Philox makes four words for each value of its counter; the first is used.
    raw = np.random.Philox(key=key, counter=[start, 0, 0, 0]).random_raw(4 * count)[::4]
    return (raw >> np.uint64(11)) * 2.0**-53


def permutation(name: tuple[int, ...], count: int) -> np.ndarray:
    """A random order of range(count), int64."""
    raw = np.random.Philox(np.random.SeedSequence(name)).random_raw(count)
    return np.argsort(raw, kind="stable")
