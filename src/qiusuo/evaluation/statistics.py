"""Numbers with 95% intervals: what may be said about a model after so many problems.

A share of right answers, one a problem, gets Wilson's interval, which is sound near 0 and 1, where
p ± 1.96·sqrt(p(1-p)/n) is not. pass@k has several samples a problem, and those of one problem
are alike: problems are what is drawn anew, so the interval is a bootstrap over problems. The
estimator of pass@k is that of Chen et al. 2021 (arXiv:2107.03374, eq. 1), without bias:

    pass@k = 1 - C(n - c, k) / C(n, k)      n samples of a problem, c of them right
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb, sqrt

import numpy as np

Z = 1.959963984540054  # of a normal distribution, 95% lie within so many deviations
RESAMPLES = 2000
SLICE = 1 << 22  # numbers in memory at once while resampling


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; None where the data cannot tell one."""

    value: float
    low: float | None
    high: float | None

    def record(self) -> dict[str, float | None]:
        return asdict(self)


def wilson(right: int, n: int) -> Estimate:
    """The share ``right / n`` of independent trials, with Wilson's score interval (1927)."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"right must be in 0..n and n at least 1, not {right} of {n}")
    share = right / n
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    # At the ends the exact limits are 0 and 1; rounding must not put the share outside.
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == n else min(1.0, middle + half)
    return Estimate(share, low, high)


def pass_at(k: int, right: int, n: int) -> float:
    """The chance that of k samples at least one is right, from n of which ``right`` are."""
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"need 1 <= k <= n and 0 <= right <= n, not {k=}, {right=}, {n=}")
    return 1 - comb(n - right, k) / comb(n, k)


def mean_share(values: Sequence[float], seed: int) -> Estimate:
    """The mean of one share a problem, resampled by problem.

    Where all are 0, or all are 1, a bootstrap sees no spread and would claim certainty: there the
    interval is Wilson's."""
    if all(value == 0 for value in values) or all(value == 1 for value in values):
        return wilson(int(sum(values)), len(values))
    return ratio(values, [1.0] * len(values), seed)


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int) -> Estimate:
    """sum(numerators) / sum(denominators), pairs resampled together; the percentile interval. No
    interval from a single pair."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    if not len(top) or len(top) != len(bottom) or bottom.min() <= 0:
        raise ValueError("need as many numerators as denominators, and these above 0")
    value = float(top.sum() / bottom.sum())
    if len(top) == 1:
        return Estimate(value, None, None)
    chance = np.random.default_rng(seed)
    rows = max(1, SLICE // len(top))
    drawn = []
    for start in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - start), len(top))
        picked = chance.integers(len(top), size=shape)
        drawn.append(top[picked].sum(1) / bottom[picked].sum(1))
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    return Estimate(value, float(low), float(high))
