"""A price book as one writes it: a TOML file.

Prices are for a million tokens, in the currency the file names::

    currency = "CNY"
    [[window]]
    start = "09:00"
    end = "12:00"
    factor = 2
    timezone = "Asia/Shanghai"
    weekdays = ["mon", "tue", "wed", "thu", "fri"]
    excluded = [2026-10-01]
    [model.deepseek-v4-flash]
    hit = 0.02
    miss = 1
    output = 4
    from = 2026-01-01T00:00:00+08:00    # without: from now on
"""

from __future__ import annotations

import tomllib
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from qiusuo.server.database import now
from qiusuo.server.prices import Listed, Price, per_million
from qiusuo.server.windows import PriceError, Window, window_from

_KINDS = ("hit", "miss", "output")


def read_prices(path: str | Path) -> tuple[list[Listed], str | None]:
    """The lists of a file and its currency, None where it names none. PriceError says what is
    wrong with which entry."""
    try:
        with Path(path).open("rb") as file:
            table = tomllib.load(file, parse_float=Decimal)  # a float would round
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PriceError(f"{path} is no TOML: {error}") from error
    try:
        _only(table, {"currency", "window", "model"}, "a price file")
        windows = tuple(map(window_from, _tables(table.get("window", []), "[[window]]")))
        models = table.get("model", {})
        if not isinstance(models, dict) or not models:
            raise PriceError("it lists no model: write [model.NAME] with hit, miss and output")
        lists = [_listed(name, entry, windows) for name, entry in models.items()]
    except PriceError as error:
        raise PriceError(f"{path}: {error}") from error
    return lists, table.get("currency")


def _listed(model: str, entry: Any, windows: tuple[Window, ...]) -> Listed:
    (entry,) = _tables([entry], f"[model.{model}]")
    _only(entry, {*_KINDS, "from", "window"}, f"[model.{model}]")
    if missing := [kind for kind in _KINDS if kind not in entry]:
        raise PriceError(f"[model.{model}] lacks {', '.join(missing)}")
    start = entry.get("from", now())
    if not isinstance(start, datetime) or start.tzinfo is None:
        raise PriceError(
            f"[model.{model}] from = {start}: write a moment with its timezone, like "
            "2026-01-01T00:00:00+08:00"
        )
    own = entry.get("window")
    if own is not None:
        windows = tuple(map(window_from, _tables(own, f"[[model.{model}.window]]")))
    try:
        price = Price(*(per_million(str(entry[kind])) for kind in _KINDS))
    except PriceError as error:
        raise PriceError(f"[model.{model}]: {error}") from error
    return Listed(model, price, windows, start)


def _only(table: dict[str, Any], known: set[str], what: str) -> None:
    if surplus := set(table) - known:
        raise PriceError(f"{what} has no {sorted(surplus)[0]!r}: it has {', '.join(sorted(known))}")


def _tables(given: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise PriceError(f"{what} must be a table")
    return given
