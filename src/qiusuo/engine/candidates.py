"""What may be drawn from a row of logits, and the place in it that a number falls on.

No row is sorted whole unless its nucleus needs it: a partition finds the largest few, and what
survives is drawn from in the order of ids.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qiusuo.engine.plain_draws import BLOCK, TINY
from qiusuo.engine.sampling import Sampling

# W vocabulary, K tokens that survive the filters.

FIRST_LOOK = 1024  # tokens looked at first for a nucleus

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]


def filtered(sampling: Sampling) -> bool:
    return sampling.top_k is not None or sampling.top_p < 1 or sampling.min_p > 0


def candidates(logits_W: Floats, sampling: Sampling) -> tuple[Ids, Floats]:
    """What may be drawn at a temperature above 0: ids [K], ascending, and their weights [K],
    which are probabilities but for a common factor.

    Temperature, top-k, top-p and min-p in transformers' order and to its rules: tokens that tie
    with the k-th stay; the nucleus is the fewest tokens whose mass reaches ``top_p`` (here, of
    equals, the lower ids)."""
    largest = logits_W.max()
    ids_K, values_K = _unmasked(logits_W)
    if sampling.top_k is not None and sampling.top_k < len(values_K):
        kept = np.flatnonzero(values_K >= largest_of(values_K, sampling.top_k).min())
        ids_K, values_K = _narrowed(ids_K, kept), values_K[kept]
    weights_K = weights_of(values_K, largest, sampling.temperature)  # that of the likeliest is 1
    if sampling.top_p < 1:
        kept = _nucleus(values_K, weights_K, sampling)
        ids_K, weights_K = _narrowed(ids_K, kept), weights_K[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(weights_K >= sampling.min_p)
        ids_K, weights_K = _narrowed(ids_K, kept), weights_K[kept]
    return np.arange(len(logits_W)) if ids_K is None else ids_K, weights_K


def _unmasked(logits_W: Floats) -> tuple[Ids | None, Floats]:
    """Ids (None: all) and logits, without the masked ones where those are most: partitions are
    slow on very many equals."""
    allowed_W = logits_W > -np.inf
    if 2 * np.count_nonzero(allowed_W) > len(logits_W):
        return None, logits_W
    ids_K = np.flatnonzero(allowed_W)
    return ids_K, logits_W[ids_K]


def _narrowed(ids_K: Ids | None, kept: Ids) -> Ids:
    return kept if ids_K is None else ids_K[kept]


def mass_of(weights_K: Floats) -> float:
    return float(weights_K.sum(dtype=np.float64))


def place_of(weights_K: Floats, target: float) -> int:
    """The first place at which the running sum is above ``target``.

    First the block that holds it, then the place in there: the running sum of a whole vocabulary
    costs more than all the rest of a draw."""
    whole = len(weights_K) // BLOCK * BLOCK
    blocks = weights_K[:whole].reshape(-1, BLOCK).sum(1, dtype=np.float64)
    sums = np.append(blocks, mass_of(weights_K[whole:])).cumsum()
    block = _first_above(sums, target)
    before = float(sums[block - 1]) if block else 0.0
    inside = weights_K[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    return block * BLOCK + _first_above(inside, target - before)


def _first_above(sums: Floats, target: float) -> int:
    """Where rising sums pass ``target``; rounding never leads to a place of no weight."""
    below_all = math.nextafter(float(sums[-1]), 0.0)
    return int(np.searchsorted(sums, min(max(target, 0.0), below_all), side="right"))


def weights_of(values_K: Floats, largest: np.floating, temperature: float) -> Floats:
    with np.errstate(over="ignore"):  # to -inf: a weight of 0
        gaps_K = values_K - largest
        if temperature != 1:
            gaps_K /= min(max(temperature, TINY), 1 / TINY)
    return np.exp(gaps_K, out=gaps_K)


def largest_of(values_K: Floats, count: int) -> Floats:
    """The ``count`` largest, in no order."""
    return np.partition(values_K, len(values_K) - count)[len(values_K) - count :]


def _nucleus(values_K: Floats, weights_K: Floats, sampling: Sampling) -> Ids:
    """Places of the fewest tokens whose mass reaches ``top_p`` of all."""
    wanted = sampling.top_p * mass_of(weights_K)
    largest = values_K.max()
    looked_at = min(FIRST_LOOK, len(values_K))
    while True:
        sorted_K = np.sort(largest_of(values_K, looked_at))[::-1]
        sorted_weights_K = weights_of(sorted_K, largest, sampling.temperature)
        if looked_at == len(values_K) or mass_of(sorted_weights_K) >= wanted:
            break
        looked_at = min(8 * looked_at, len(values_K))
    size = place_of(sorted_weights_K, math.nextafter(wanted, 0.0)) + 1  # at which it is reached
    least = sorted_K[size - 1]
    kept = np.flatnonzero(values_K >= least)
    if len(kept) > size:  # of the equals at the edge only the first
        equals = np.flatnonzero(values_K[kept] == least)
        kept = np.delete(kept, equals[size - len(kept) :])
    return kept
