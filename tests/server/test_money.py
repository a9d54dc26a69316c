"""Amounts: exact both ways, or refused."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.server.money import LARGEST, UNITS, MoneyError, amount, told


@pytest.mark.parametrize(
    ("text", "nano"),
    [
        ("0.02", 20_000_000),
        ("1", 10**9),
        (" -12.5 ", -12_500_000_000),
        ("0.000000001", 1),
        ("0", 0),
    ],
)
def test_an_amount_is_read_exactly(text: str, nano: int) -> None:
    assert amount(text) == nano


@pytest.mark.parametrize(
    "text",
    ["", "a", "nan", "inf", "1,5", "1_000", "0.0000000001", "1e-10", "100000000.000000001",
     "1e99999999", "1e-1999990", "9" * 5000, "1.0000000000000000000000000000000001", "١"],
)  # fmt: skip
def test_what_is_no_exact_amount_is_refused(text: str) -> None:
    with pytest.raises(MoneyError):
        amount(text)


def test_a_refusal_names_the_nearest_that_would_do() -> None:
    with pytest.raises(MoneyError, match=r"0\.000000001"):
        amount("0.0000000019")


@given(st.integers(-LARGEST, LARGEST))
def test_what_is_told_is_read_back(nano: int) -> None:
    text = told(nano)
    assert Decimal(text) == Decimal(nano) / UNITS
    assert len(text.partition(".")[2]) >= 2
    assert amount(text) == nano


@pytest.mark.parametrize(
    ("nano", "places", "text"),
    [
        (0, None, "0.00"),
        (20, None, "0.00000002"),
        (1_500_000_000, None, "1.50"),
        (-1, None, "-0.000000001"),
        (1_005_000_000, 2, "1.01"),
        (1_994_999_999, 2, "1.99"),
        (-1_995_000_000, 2, "-2.00"),
        (-1, 2, "0.00"),
        (2_499_999_999, 0, "2"),
        (1, 9, "0.000000001"),
    ],
)
def test_told_and_rounded(nano: int, places: int | None, text: str) -> None:
    assert told(nano, places) == text
