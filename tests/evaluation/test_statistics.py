"""Estimates and intervals against other ways to the same numbers."""

import random
from itertools import combinations, product
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.evaluation.statistics import Z, mean_share, pass_at, ratio, wilson


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_limits_are_the_shares_that_would_just_not_be_rejected(trial):
    right, n = trial
    told = wilson(right, n)
    assert 0 <= told.low <= told.value <= told.high <= 1
    for limit in (told.low, told.high):
        deviations = abs(told.value - limit) / max(1e-12, sqrt(limit * (1 - limit) / n))
        at_the_end = limit in (0, 1) and limit == told.value
        assert at_the_end or deviations == pytest.approx(Z, rel=1e-5)


def test_wilson_as_published():
    """Newcombe 1998, table I, method 3."""
    for right, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]:  # fmt: skip
        told = wilson(right, n)
        assert (told.low, told.high) == pytest.approx((low, high), abs=5e-5)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n in range(1, 8):
        for right in range(n + 1):
            samples = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                draws = [any(drawn) for drawn in combinations(samples, k)]
                assert pass_at(k, right, n) == pytest.approx(sum(draws) / len(draws))
    assert pass_at(1, 3, 8) == pytest.approx(3 / 8)


def test_the_bootstrap_is_that_of_all_resamples():
    values = [0.0, 0.125, 0.5, 0.5, 1.0]
    means = sorted(sum(drawn) / 5 for drawn in product(values, repeat=5))
    told = mean_share(values, seed=0)
    assert told.value == pytest.approx(sum(values) / 5)
    for place, limit in ((0.025, told.low), (0.975, told.high)):  # of 2000 drawn: ±4 deviations
        spread = 4 * sqrt(0.025 * 0.975 / 2000)
        low, high = (means[int((place + d) * len(means))] for d in (-spread, spread))
        assert low <= limit <= high


def test_the_bootstrap_of_many_is_nearly_normal_and_repeatable():
    chance = random.Random(1)
    values = [chance.random() for _ in range(900)]
    told = mean_share(values, seed=3)
    mean = sum(values) / 900
    half = Z * sqrt(sum((v - mean) ** 2 for v in values) / 900 / 900)
    assert told.low == pytest.approx(mean - half, abs=0.1 * half)
    assert told.high == pytest.approx(mean + half, abs=0.1 * half)
    assert mean_share(values, seed=3) == told
    assert mean_share(values, seed=4) != told


def test_without_spread_nothing_is_certain():
    assert mean_share([1.0] * 30, 0) == wilson(30, 30)
    assert mean_share([0.0] * 30, 0) == wilson(0, 30)
    assert mean_share([1.0], 0).low < 0.3


def test_a_ratio_weighs_by_its_denominators():
    told = ratio([10, 90], [10, 30], seed=0)
    assert (told.value, told.low, told.high) == (2.5, 1.0, 3.0)
    alone = ratio([3], [2], seed=0)
    assert (alone.value, alone.low, alone.high) == (1.5, None, None)


def test_nonsense_is_refused():
    for call in (
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
        lambda: pass_at(3, 1, 2),
        lambda: pass_at(1, 3, 2),
        lambda: ratio([1], [0], 0),
        lambda: ratio([], [], 0),
    ):
        with pytest.raises(ValueError, match=r"must be|need"):
            call()
