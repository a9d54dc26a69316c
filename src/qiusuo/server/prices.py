"""What a token costs: by model, by kind of token, and by the time of day.

DeepSeek prices three kinds: prompt tokens found in the cache (hit), prompt tokens that were not
(miss), and output. At peak hours (weekdays 9-12 and 14-18 in Beijing, but for holidays) each costs
twice as much. Lists of prices are only ever added to, each with the moment from which it holds, so
what any old request cost can be told again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import ROUND_HALF_UP
from fractions import Fraction

from qiusuo.server.database import Database, milliseconds, moment, now
from qiusuo.server.ledger_tables import LEDGER
from qiusuo.server.money import UNITS, MoneyError, decimal, told
from qiusuo.server.windows import PriceError, Window, window_from, window_table

EVERY_MODEL = "*"  # the price of models that have none of their own
CURRENCY = "CNY"
_PER = 1000  # nano-units per token in one unit per million tokens


@dataclass(frozen=True)
class Price:
    """Nano-units per token. ``version``: of the list it came from; None where nothing is charged
    because no price was ever set."""

    hit: int = 0
    miss: int = 0
    output: int = 0
    version: int | None = field(default=None, compare=False)


FREE = Price()


@dataclass(frozen=True)
class Listed:
    """A model's prices off the peak (nano-units per token), its windows, and since when. The first
    window that holds counts."""

    model: str
    price: Price
    windows: tuple[Window, ...]
    holds_from: datetime

    def at(self, moment: datetime) -> Price:
        """What holds at a moment, peak factor and all."""
        for window in self.windows:
            if window.holds(moment):
                return _times(self.price, window.factor)
        return self.price


def per_million(text: str) -> int:
    """Nano-units per token of a price for a million tokens: "0.02" is 20. PriceError, naming the
    nearest that would do, where that is not whole: a price has three decimals at most."""
    try:
        exact = decimal(text) * _PER
    except MoneyError as error:
        raise PriceError(f"price: {error}") from error
    if exact < 0:
        raise PriceError(f"a price of {text} would pay people for asking")
    nearest = int(exact.to_integral_value(ROUND_HALF_UP))
    if exact != nearest:
        raise PriceError(
            f"a price of {text} for a million tokens is {exact.normalize():f} nano-units for one, "
            f"and it must be whole: the nearest that is: {told_per_million(nearest)}"
        )
    return nearest


def told_per_million(nano: int) -> str:
    """A price per token as the price of a million, exactly."""
    return told(nano * 10**6)


def cost(price: Price, hit: int, miss: int, output: int) -> int:
    """Nano-units for so many tokens."""
    return price.hit * hit + price.miss * miss + price.output * output


def most(price: Price, prompt: int, output: int) -> int:
    """Nano-units that a request cannot exceed: whatever of the prompt the cache holds."""
    return max(price.hit, price.miss) * prompt + price.output * output


class PriceBook:
    """The lists of prices in a database. A model without one costs what ``EVERY_MODEL`` does, and
    nothing where that has none either."""

    def __init__(self, database: Database) -> None:
        database.migrate(LEDGER)
        self._database = database

    @property
    def currency(self) -> str:
        """Three letters: what the units are."""
        with self._database.read() as connection:
            return _currency(connection)

    def price(self, model: str, at: datetime | None = None) -> Price:
        """What a token costs at a moment, by default now."""
        at = at or now()
        with self._database.read() as connection:
            listed = _in_force(connection, model, milliseconds(at))
            listed = listed or _in_force(connection, EVERY_MODEL, milliseconds(at))
        return FREE if listed is None else listed.at(at)

    def current(self, at: datetime | None = None) -> list[Listed]:
        """The list in force of every model that has one."""
        at_ms = milliseconds(at or now())
        with self._database.read() as connection:
            models = connection.execute("SELECT DISTINCT model FROM prices ORDER BY model")
            found = [_in_force(connection, row["model"], at_ms) for row in models.fetchall()]
        return [listed for listed in found if listed is not None]

    def history(self, model: str | None = None) -> list[Listed]:
        """Every list there ever was, oldest first, those that begin in the future too."""
        query = "SELECT * FROM prices WHERE ? IS NULL OR model = ? ORDER BY holds_from, id"
        with self._database.read() as connection:
            return [_listed(row) for row in connection.execute(query, (model, model))]

    def set(
        self,
        model: str,
        price: Price,
        windows: Sequence[Window] = (),
        holds_from: datetime | None = None,
    ) -> bool:
        """Add a list, in force from a moment on (by default now). PriceError where a window's
        factor makes a price that is not whole. False where this very list holds already."""
        return bool(self.add([Listed(model, price, tuple(windows), holds_from or now())]))

    def add(self, lists: Sequence[Listed], currency: str | None = None) -> int:
        """Add several lists, all or nothing, as ``price_file.read_prices`` gives them; how many
        were new. PriceError for another currency than that of a ledger already begun."""
        added = 0
        for listed in lists:
            _check(listed)
        with self._database.write() as connection:
            if currency is not None:
                _set_currency(connection, currency)
            for listed in lists:
                at = milliseconds(listed.holds_from)
                before = _in_force(connection, listed.model, at)
                if before is not None and replace(before, holds_from=listed.holds_from) == listed:
                    continue
                connection.execute(
                    "INSERT INTO prices (model, hit, miss, output, windows, holds_from, made) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        listed.model,
                        listed.price.hit,
                        listed.price.miss,
                        listed.price.output,
                        json.dumps([window_table(window) for window in listed.windows]),
                        at,
                        milliseconds(now()),
                    ),
                )
                added += 1
        return added


def _check(listed: Listed) -> None:
    """Before it is stored: whole at every hour, and small enough to multiply."""
    if not listed.model or not listed.model.isprintable():
        raise PriceError(f"{listed.model!r} names no model")
    for factor in (Fraction(1), *(window.factor for window in listed.windows)):
        price = _times(listed.price, factor)
        for kind in ("hit", "miss", "output"):
            each = getattr(price, kind)
            if not 0 <= each <= UNITS:
                raise PriceError(f"{kind}: {each} nano-units a token are not within 0 to {UNITS}")


def _times(price: Price, factor: Fraction) -> Price:
    for kind in ("hit", "miss", "output"):
        exact = getattr(price, kind) * factor
        if exact.denominator != 1:
            step = factor.denominator
            nearest = round(Fraction(getattr(price, kind), step)) * step
            raise PriceError(
                f"{kind}: {told_per_million(getattr(price, kind))} for a million tokens, times "
                f"{factor}, is no whole number of nano-units for one: the nearest price that gives "
                f"one is {told_per_million(nearest)}"
            )
    hit, miss, output = (int(each * factor) for each in (price.hit, price.miss, price.output))
    return Price(hit, miss, output, price.version)


def _in_force(connection: sqlite3.Connection, model: str, at: int) -> Listed | None:
    row = connection.execute(
        "SELECT * FROM prices WHERE model = ? AND holds_from <= ? "
        "ORDER BY holds_from DESC, id DESC LIMIT 1",
        (model, at),
    ).fetchone()
    return None if row is None else _listed(row)


def _listed(row: sqlite3.Row) -> Listed:
    price = Price(row["hit"], row["miss"], row["output"], row["id"])
    windows = tuple(map(window_from, json.loads(row["windows"])))
    return Listed(row["model"], price, windows, moment(row["holds_from"]))


def _currency(connection: sqlite3.Connection) -> str:
    row = connection.execute("SELECT value FROM settings WHERE name = 'currency'").fetchone()
    return CURRENCY if row is None else str(row["value"])


def _set_currency(connection: sqlite3.Connection, code: str) -> None:
    if code == _currency(connection):
        return
    if not (isinstance(code, str) and len(code) == 3 and code.isascii() and code.isupper()):
        raise PriceError(f"{code!r} is no currency: write three letters, like CNY or USD")
    used = connection.execute("SELECT 1 FROM transactions LIMIT 1").fetchone()
    if used is not None:
        raise PriceError(
            f"the ledger holds {_currency(connection)} and cannot go on in {code}: begin another "
            "database for another currency"
        )
    connection.execute(
        "INSERT INTO settings VALUES ('currency', ?) "
        "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (code,),
    )
