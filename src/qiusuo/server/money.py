"""Amounts of money as whole numbers of nano-units: a thousand-millionth of one yuan or dollar.

DeepSeek's cheapest price, 0.02 yuan for a million tokens, is 20 nano-yuan for one token. So every
cost is a product and a sum of integers, and no figure is ever rounded.
"""

from __future__ import annotations

import re
from decimal import Decimal

from qiusuo.data.errors import DataError

UNITS = 10**9  # nano-units in one unit of the server's currency
LARGEST = 10**8 * UNITS  # of one movement; SQLite's integers hold 92 times as much
_PLAIN = re.compile("[+-]?[0-9]{1,12}([.][0-9]{1,15})?")  # Decimal rounds from 29 digits on


class MoneyError(DataError):
    """What is no exact amount of money, or too much of it."""


def decimal(text: str) -> Decimal:
    """A plain decimal number. MoneyError for anything else, and for one that is too large."""
    if not _PLAIN.fullmatch(text.strip()):
        raise MoneyError(f"{text[:40]!r} is no amount: write a plain decimal number like 12.50")
    number = Decimal(text.strip())
    if abs(number) * UNITS > LARGEST:
        raise MoneyError(f"{text!r} is too much: {told(LARGEST)} is the most for one movement")
    return number


def amount(text: str) -> int:
    """Nano-units of a decimal: "0.02" is 20,000,000. MoneyError where they would not be whole."""
    nano = decimal(text) * UNITS
    whole = int(nano)
    if whole != nano:
        raise MoneyError(
            f"{text!r} has more than nine decimals: the nearest below is {told(whole)}"
        )
    return whole


def told(amount: int, places: int | None = None) -> str:
    """An amount as an exact decimal, with two places or as many as it needs. With ``places`` (0 to
    9) it is rounded half away from zero, for the eye alone."""
    size = abs(amount)
    if places is not None:
        step = 10 ** (9 - places)
        size = (size + step // 2) // step * step
    units, rest = divmod(size, UNITS)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0") if places is None else f"{rest:09d}"[:places]
    sign = "-" if amount < 0 and size else ""
    return f"{sign}{units}.{decimals}" if decimals else f"{sign}{units}"
