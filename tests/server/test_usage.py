"""Usage: sums against plain Python over the same rows, days as long as they are, safe CSV."""

from __future__ import annotations

import csv
import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random
from zoneinfo import ZoneInfo

import pytest

from qiusuo.server.database import Database
from qiusuo.server.keys import Key, Keys
from qiusuo.server.ledger import Ledger, Used
from qiusuo.server.prices import Price
from qiusuo.server.usage import Row, Sums, UsageError, UsageReports, as_csv, rows_as_csv
from qiusuo.server.windows import PriceError

Ask = Callable[..., None]


class Clock:
    now = datetime(2026, 11, 22, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "money.sqlite3")
    yield database
    database.close()


@pytest.fixture
def usage(database: Database) -> UsageReports:
    return UsageReports(database)


@pytest.fixture
def ask(database: Database) -> Iterator[Ask]:
    clock, count = Clock(), 0
    ledger = Ledger(database, clock)

    def ask(at: datetime, key: Key | None = None, model: str = "m", **tokens: int) -> None:
        nonlocal count
        clock.now, count = at, count + 1
        account = "local" if key is None else key.account
        ledger.reserve(f"r{count}", key, account, model, 10**9, Price(20, 1000, 4000))
        used = Used(model, **({"hit": 0, "miss": 0, "output": 0} | tokens), seconds=1.5)
        ledger.settle(f"r{count}", used)

    yield ask
    ledger.check()
    ledger.close()


def key_of(database: Database, name: str, account: str = "main") -> Key:
    ledger = Ledger(database)
    ledger.top_up(account, 10**15, token=name)
    ledger.close()
    return Keys(database).make(name, account)[0]


def plain(rows: list[Row], group: Callable[[Row], str]) -> dict[str, list[int]]:
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * 6)
    for row in rows:
        counts = (1, row.hit, row.miss, row.output, row.reasoning, row.amount)
        sums[group(row)] = [a + b for a, b in zip(sums[group(row)], counts, strict=True)]
    return dict(sums)


def as_plain(sums: list[Sums]) -> dict[str, list[int]]:
    return {
        one.group: [one.requests, one.hit, one.miss, one.output, one.reasoning, one.amount]
        for one in sums
    }


@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai", "America/New_York", "Asia/Kathmandu"])
def test_reports_are_the_sums_of_their_rows_and_the_revenue(
    database: Database, usage: UsageReports, ask: Ask, zone: str
) -> None:
    random = Random(7)
    keys = [None, key_of(database, "one"), key_of(database, "two"), key_of(database, "x", "other")]
    begin = datetime(2026, 10, 30, tzinfo=UTC)  # over New York's long day, 1 November
    for _ in range(60):
        output = random.randrange(300)
        ask(
            begin + timedelta(seconds=random.randrange(5 * 86400)),
            random.choice(keys),
            random.choice("mno"),
            hit=random.randrange(99), miss=random.randrange(99), output=output,
            reasoning=random.randrange(output + 1),
        )  # fmt: skip
    rows = usage.rows()
    assert [row.started for row in rows] == sorted((row.started for row in rows), reverse=True)
    days = as_plain(usage.report("day", timezone=zone))
    assert days == plain(rows, lambda row: str(row.started.astimezone(ZoneInfo(zone)).date()))
    assert list(days) == sorted(days)
    assert as_plain(usage.report("model")) == plain(rows, lambda row: row.model)
    assert as_plain(usage.report("key")) == plain(rows, lambda row: row.key or "")
    assert {one.name for one in usage.report("key")} == {"", "one", "two", "x"}
    for row in rows:
        assert row.amount == 20 * row.hit + 1000 * row.miss + 4000 * row.output
    with database.read() as connection:
        query = "SELECT sum(amount) FROM postings WHERE account = 'house:revenue'"
        revenue = connection.execute(query).fetchone()[0]
    for by in ("day", "model", "key"):
        assert sum(one.amount for one in usage.report(by, timezone=zone)) == revenue
    assert usage.total().amount == revenue
    first, last = date(2026, 10, 31), date(2026, 11, 1)
    mine = {"timezone": zone, "account": "main", "key": keys[1].id}
    chosen = [
        row for row in rows
        if row.key == keys[1].id
        and first <= row.started.astimezone(ZoneInfo(zone)).date() <= last
    ]  # fmt: skip
    assert usage.rows(first, last, **mine) == chosen
    assert as_plain(usage.report("day", first, last, **mine)) == plain(
        chosen, lambda row: str(row.started.astimezone(ZoneInfo(zone)).date())
    )
    assert usage.total(first, last, **mine).requests == len(chosen) > 0
    assert usage.report("model", account="main", key="none") == []


def test_a_day_ends_at_midnight_there(usage: UsageReports, ask: Ask) -> None:
    ask(datetime(2026, 11, 22, 15, 59, 59, 999_000, tzinfo=UTC), output=1)
    ask(datetime(2026, 11, 22, 16, tzinfo=UTC), output=2)
    days = usage.report("day", timezone="Asia/Shanghai")
    assert [(one.group, one.output) for one in days] == [("2026-11-22", 1), ("2026-11-23", 2)]
    last = date(2026, 11, 22)
    assert usage.total(last, last, "Asia/Shanghai").output == 1
    assert usage.total(first=date(2026, 11, 23), timezone="Asia/Shanghai").output == 2


def test_without_a_timezone_days_are_the_machines(
    usage: UsageReports, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(datetime(2026, 11, 22, 16, tzinfo=UTC), output=1)
    for zone, day in (("Asia/Shanghai", "2026-11-23"), ("America/New_York", "2026-11-22")):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert [one.group for one in usage.report("day")] == [day]
        assert usage.total(date.fromisoformat(day), date.fromisoformat(day)).output == 1
    monkeypatch.undo()
    time.tzset()


def test_nothing_used_is_nothing(usage: UsageReports) -> None:
    assert usage.report("day") == usage.report("model") == usage.report("key") == usage.rows() == []
    assert usage.total() == Sums("total", 0, 0, 0, 0, 0, 0)


def test_what_cannot_be_reported_is_refused(usage: UsageReports, ask: Ask) -> None:
    with pytest.raises(UsageError, match="day, model or key"):
        usage.report("colour; DROP TABLE usage")
    with pytest.raises(PriceError, match="timezone"):
        usage.report("day", timezone="Mars/Olympus")
    for day in (date.min, date.max):
        with pytest.raises(UsageError, match="1900 to 9998"):
            usage.report("model", first=day)
        with pytest.raises(UsageError, match="1900 to 9998"):
            usage.total(last=day)
    ask(datetime(1999, 1, 1, tzinfo=UTC))
    ask(datetime(2026, 1, 1, tzinfo=UTC))
    with pytest.raises(UsageError, match="too long"):
        usage.report("day")


FORMULAE = ["=1+1", "+1", "-1", "@SUM(A1)", "  =1", "＝1", "\t=1", "\r=1"]


@pytest.mark.parametrize("name", FORMULAE)
def test_a_name_is_no_formula_in_a_spreadsheet(
    database: Database, usage: UsageReports, ask: Ask, name: str
) -> None:
    key = key_of(database, name) if name.isprintable() else None
    ask(datetime(2026, 11, 22, tzinfo=UTC), key, name, output=1)
    for text in (
        as_csv(usage.report("key"), "key", "CNY"),
        as_csv(usage.report("model"), "model", "CNY"),
        rows_as_csv(usage.rows(), "CNY"),
    ):
        for line in csv.reader(io.StringIO(text, newline="")):
            assert not any(cell.strip(" ").startswith(tuple("=+-@\t\r＝")) for cell in line)
    text = as_csv(usage.report("model"), "model", "CNY")
    assert next(csv.DictReader(io.StringIO(text, newline="")))["model"] == f"'{name}"


def test_csv_has_exact_amounts(database: Database, usage: UsageReports, ask: Ask) -> None:
    key = key_of(database, 'a "b", c')
    ask(datetime(2026, 11, 22, 1, 2, 3, tzinfo=UTC), key, hit=1, miss=2, output=3, reasoning=2)
    (line,) = csv.DictReader(io.StringIO(as_csv(usage.report("key"), "key", "CNY")))
    assert line == {
        "key": key.id, "name": 'a "b", c', "requests": "1", "hit": "1", "miss": "2", "output": "3",
        "reasoning": "2", "CNY": "0.00001402",
    }  # fmt: skip
    assert Decimal(line["CNY"]) * 10**9 == 20 + 2000 + 12000
    (line,) = csv.DictReader(io.StringIO(rows_as_csv(usage.rows(), "CNY")))
    assert line == {
        "request": "r1", "key": key.id, "account": "main", "model": "m", "endpoint": "",
        "hit": "1", "miss": "2", "output": "3", "reasoning": "2", "CNY": "0.00001402",
        "started": "2026-11-22T01:02:03.000+00:00", "seconds": "1.5", "finish": "stop",
    }  # fmt: skip
    (line,) = csv.DictReader(io.StringIO(as_csv(usage.report("day", timezone="UTC"), "day", "CNY")))
    assert line["day"] == "2026-11-22"
