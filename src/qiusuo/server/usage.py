"""What was used and what it cost: by day, by model, by key, or request by request.

The rows are written with the charge itself (ledger.py), so these sums are the ledger's revenue and
never an estimate.
"""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Literal

from qiusuo.data.errors import DataError
from qiusuo.server.database import Database, milliseconds, moment
from qiusuo.server.ledger_tables import LEDGER
from qiusuo.server.money import told
from qiusuo.server.windows import zone

By = Literal["day", "model", "key"]
LONGEST_DAYS = 3700  # of one report: ten years
YEARS = range(1900, 9999)  # whose days have a midnight everywhere, and a day after them
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


class UsageError(DataError):
    """A report that cannot be made."""


@dataclass(frozen=True)
class Sums:
    """Of one ``group``: a day (2026-11-22), a model, or a key's id; "" for the caller at this
    machine, who has no key. ``name`` is the key's. ``amount`` in nano-units; ``reasoning`` tokens
    are among ``output``."""

    group: str
    requests: int
    hit: int
    miss: int
    output: int
    reasoning: int
    amount: int
    name: str = ""


@dataclass(frozen=True)
class Row:
    """One request. ``key``: its id, None for the caller at this machine."""

    request: str
    key: str | None
    account: str
    model: str
    endpoint: str
    hit: int
    miss: int
    output: int
    reasoning: int
    amount: int
    started: datetime
    seconds: float
    finish: str


class UsageReports:
    """The usage in a database. Use from any thread. ``first`` and
    ``last`` are days, both included, of ``timezone`` (a name like Asia/Shanghai; without it the
    server's own); ``account`` and ``key`` (an id) leave out all others'."""

    def __init__(self, database: Database) -> None:
        database.migrate(LEDGER)
        self._database = database

    def report(
        self,
        by: By,
        first: date | None = None,
        last: date | None = None,
        timezone: str | None = None,
        *,
        account: str | None = None,
        key: str | None = None,
    ) -> list[Sums]:
        """Days in order, models and keys by name. Groups without a request are left out."""
        if by not in ("day", "model", "key"):
            raise UsageError(f"usage is reported by day, model or key, not by {by!r}")
        with self._database.read() as connection:
            where = _Chosen(first, last, _zone(timezone), account, key)
            if by == "day":
                return _by_day(connection, where)
            group = "model" if by == "model" else "coalesce(u.key, '')"
            rows = connection.execute(
                f"SELECT {group} AS grouped, {_SUMS}, max(coalesce(k.name, '')) AS name "
                "FROM usage u LEFT JOIN keys k ON k.id = u.key "
                f"WHERE {_WHERE} GROUP BY grouped ORDER BY {'name, ' * (by == 'key')} grouped",
                where.parameters(),
            )
            return [_sums(row, row["grouped"], row["name"] if by == "key" else "") for row in rows]

    def total(
        self,
        first: date | None = None,
        last: date | None = None,
        timezone: str | None = None,
        *,
        account: str | None = None,
        key: str | None = None,
    ) -> Sums:
        """All in one; its group is "total"."""
        where = _Chosen(first, last, _zone(timezone), account, key)
        with self._database.read() as connection:
            query = f"SELECT {_SUMS} FROM usage u WHERE {_WHERE}"
            return _sums(connection.execute(query, where.parameters()).fetchone(), "total")

    def rows(
        self,
        first: date | None = None,
        last: date | None = None,
        timezone: str | None = None,
        *,
        account: str | None = None,
        key: str | None = None,
        limit: int = 1000,
    ) -> list[Row]:
        """Single requests, the latest first."""
        where = _Chosen(first, last, _zone(timezone), account, key)
        with self._database.read() as connection:
            found = connection.execute(
                f"SELECT * FROM usage u WHERE {_WHERE} ORDER BY started DESC, request LIMIT :limit",
                where.parameters() | {"limit": limit},
            )
            return [Row(**{**dict(row), "started": moment(row["started"])}) for row in found]


def as_csv(sums: Iterable[Sums], by: By, currency: str) -> str:
    """A report as a spreadsheet reads it; amounts are exact decimals of the currency."""
    names = ["key", "name"] if by == "key" else [by]
    counts = ["requests", "hit", "miss", "output", "reasoning"]
    lines: list[list[object]] = [[*names, *counts, currency]]
    for one in sums:
        group: list[object] = [one.group, one.name] if by == "key" else [one.group]
        lines.append([*group, *(getattr(one, count) for count in counts), told(one.amount)])
    return _csv(lines)


def rows_as_csv(rows: Iterable[Row], currency: str) -> str:
    """Single requests; moments in UTC."""
    names = [one.name for one in fields(Row) if one.name != "amount"]
    lines: list[list[object]] = [[*names, currency]]
    for row in rows:
        started = row.started.astimezone(UTC).isoformat(timespec="milliseconds")
        shown = replace(row, key=row.key or "")
        values = {name: getattr(shown, name) for name in names} | {"started": started}
        lines.append([*values.values(), told(row.amount)])
    return _csv(lines)


def _csv(lines: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([_cell(value) for value in line] for line in lines)
    return text.getvalue()


def _cell(value: object) -> object:
    """A name that begins like a formula would be one to a spreadsheet: a quote makes it text."""
    if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA):
        return "'" + value
    return value


_SUMS = (
    "count(*) AS requests, coalesce(sum(hit), 0) AS hit, coalesce(sum(miss), 0) AS miss, "
    "coalesce(sum(output), 0) AS output, coalesce(sum(reasoning), 0) AS reasoning, "
    "coalesce(sum(amount), 0) AS amount"
)
_WHERE = (
    "started >= :begin AND started < :end AND (:account IS NULL OR u.account = :account) "
    "AND (:key IS NULL OR u.key = :key)"
)


@dataclass(frozen=True)
class _Chosen:
    """Which rows a report is of."""

    first: date | None
    last: date | None
    zone: tzinfo | None  # None: the machine's own
    account: str | None
    key: str | None

    def __post_init__(self) -> None:
        for day in (self.first, self.last):
            if day is not None and day.year not in YEARS:
                raise UsageError(f"{day}: name a day of the years {YEARS[0]} to {YEARS[-1]}")

    def parameters(self) -> dict[str, object]:
        after_last = None if self.last is None else self.last + timedelta(days=1)
        return {
            "begin": -(2**62) if self.first is None else _midnight(self.first, self.zone),
            "end": 2**62 if after_last is None else _midnight(after_last, self.zone),
            "account": self.account,
            "key": self.key,
        }


def _by_day(connection: sqlite3.Connection, where: _Chosen) -> list[Sums]:
    """Days are as long as their timezone makes them, so the limits of each are worked out."""
    parameters = where.parameters()
    ends = connection.execute(
        f"SELECT min(started), max(started) FROM usage u WHERE {_WHERE}", parameters
    ).fetchone()
    if ends[0] is None:
        return []
    day, last = (moment(end).astimezone(where.zone).date() for end in ends)
    if (last - day).days > LONGEST_DAYS:
        raise UsageError(f"{day} to {last} is too long for one report: {LONGEST_DAYS} days will do")
    days = [day + timedelta(days=n) for n in range((last - day).days + 1)]
    begins = [_midnight(one, where.zone) for one in [*days, last + timedelta(days=1)]]
    limits = [
        (str(one), begin, end) for one, begin, end in zip(days, begins, begins[1:], strict=False)
    ]
    rows = connection.execute(
        "WITH days AS (SELECT value ->> 0 AS day, value ->> 1 AS day_begins, "
        "value ->> 2 AS day_ends FROM json_each(:days)) "
        f"SELECT day, {_SUMS} FROM days CROSS JOIN usage u "
        "ON started >= day_begins AND started < day_ends "
        f"WHERE {_WHERE} GROUP BY day ORDER BY day",
        parameters | {"days": json.dumps(limits)},
    )
    return [_sums(row, row["day"]) for row in rows]


def _midnight(day: date, zone: tzinfo | None) -> int:
    """When a day begins there, in milliseconds."""
    return milliseconds(datetime.combine(day, time(), zone).astimezone())


def _sums(row: sqlite3.Row, group: str, name: str = "") -> Sums:
    counts = {key: row[key] for key in ("requests", "hit", "miss", "output", "reasoning", "amount")}
    return Sums(group=group, name=name, **counts)


def _zone(name: str | None) -> tzinfo | None:
    return None if name is None else zone(name)
