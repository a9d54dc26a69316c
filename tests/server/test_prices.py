"""Prices: DeepSeek's own to the last nano-yuan, at each side of every edge of the peak."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.server.database import Database
from qiusuo.server.ledger import Ledger
from qiusuo.server.price_file import read_prices
from qiusuo.server.prices import EVERY_MODEL, FREE, Price, PriceBook, cost, most, per_million
from qiusuo.server.prices import told_per_million as per_million_told
from qiusuo.server.windows import PriceError, Window, deepseek_peak, window_from, window_table

FILE = """
currency = "CNY"
[[window]]
start = "09:00"
end = "12:00"
excluded = [2026-10-01]
[[window]]
start = "14:00"
end = "18:00"
factor = 2
timezone = "Asia/Shanghai"
weekdays = ["mon", "tue", "wed", "thu", "fri"]
excluded = [2026-10-01]
[model.deepseek-v4-flash]
hit = 0.02
miss = 1
output = 4
from = 2026-01-01T00:00:00+08:00
[model."deepseek-v4-pro"]
hit = "0.15"
miss = 4.5
output = 13.5
from = 2026-01-01T00:00:00+08:00
"""
BEIJING = timezone(timedelta(hours=8))


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "money.sqlite3")


@pytest.fixture
def book(database: Database) -> PriceBook:
    return PriceBook(database)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def beijing(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BEIJING)


@given(
    st.sampled_from(["0.02", "0.15", "1", "4.5", "13.5", "0.001"]),
    st.integers(0, 10**7),
)
def test_every_token_costs_a_whole_number(price: str, tokens: int) -> None:
    exact = Decimal(price) * tokens / 1_000_000 * 10**9
    assert cost(Price(per_million(price), 0, 0), tokens, 0, 0) == exact
    assert cost(Price(0, 0, per_million(price)), 0, 0, tokens) == exact


@pytest.mark.parametrize("hit", [0, 1, 700, 1000])
def test_the_most_is_never_exceeded(hit: int) -> None:
    for price in (Price(20, 1000, 4000), Price(1000, 20, 4000)):
        assert cost(price, hit, 1000 - hit, 50) <= most(price, 1000, 50)
    assert most(Price(20, 1000, 4000), 1000, 50) == 1_200_000


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("0.0204", "0.02"), ("0.0205", "0.021"), ("0.0001", "0.00"), ("7.7777", "7.778")],
)
def test_a_price_that_is_not_whole_is_refused_with_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(PriceError, match=f"nearest that is: {nearest}$"):
        per_million(text)


@pytest.mark.parametrize("text", ["-1", "free", "nan", "", "1e30"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(PriceError):
        per_million(text)


def test_a_price_is_told_as_it_was_written() -> None:
    assert per_million_told(per_million("0.02")) == "0.02"
    assert per_million_told(per_million("0.125")) == "0.125"


@pytest.mark.parametrize(
    ("at", "peak"),
    [
        ("2026-09-30T08:59:59.999", False),  # a Wednesday
        ("2026-09-30T09:00:00", True),
        ("2026-09-30T11:59:59.999", True),
        ("2026-09-30T12:00:00", False),
        ("2026-09-30T14:00:00", True),
        ("2026-09-30T17:59:59", True),
        ("2026-09-30T18:00:00", False),
        ("2026-10-01T10:00:00", False),  # a holiday
        ("2026-10-02T10:00:00", True),
        ("2026-10-03T10:00:00", False),  # a Saturday
    ],
)
def test_the_peak_of_deepseek(book: PriceBook, tmp_path: Path, at: str, peak: bool) -> None:
    book.add(*read_prices(write(tmp_path / "prices.toml", FILE)))
    local = beijing(at)
    for moment in (local, local.astimezone(UTC), local.astimezone(timezone(-timedelta(hours=9)))):
        price = book.price("deepseek-v4-flash", moment)
        assert price == (Price(40, 2000, 8000) if peak else Price(20, 1000, 4000))
        assert price.version is not None
    assert any(one.holds(local) for one in deepseek_peak([date(2026, 10, 1)])) == peak


@pytest.mark.parametrize(
    ("at", "night"),
    [
        ("2026-11-23T16:29:59", False),
        ("2026-11-23T16:30:00", True),
        ("2026-11-24T00:29:59", True),  # still Monday's window
        ("2026-11-24T00:30:00", False),
        ("2026-11-24T16:30:00", False),
    ],
)
def test_a_window_past_midnight_belongs_to_the_day_it_starts_on(at: str, night: bool) -> None:
    window = Window("16:30", "00:30", Fraction(1, 4), "UTC", weekdays=(0,))
    assert window.holds(datetime.fromisoformat(at).replace(tzinfo=UTC)) == night


def test_hours_are_those_on_the_wall_when_clocks_change() -> None:
    """New York, 2026-03-08: 9 in the morning is 14:00 UTC the day before and 13:00 UTC then."""
    window = Window("09:00", "10:00", timezone="America/New_York", weekdays=tuple(range(7)))
    assert window.holds(datetime(2026, 3, 7, 14, tzinfo=UTC))
    assert not window.holds(datetime(2026, 3, 8, 14, tzinfo=UTC))
    assert window.holds(datetime(2026, 3, 8, 13, tzinfo=UTC))


def test_a_factor_that_breaks_a_token_is_refused_with_the_nearest_price(book: PriceBook) -> None:
    half = Window("00:00", "24:00", Fraction(1, 2), "UTC")
    with pytest.raises(PriceError, match=r"hit: 0\.021 .* one is 0\.02$"):
        book.set("m", Price(21, 1000, 4000), [half])
    assert book.history() == []
    book.set("m", Price(20, 1000, 4000), [half])
    assert book.price("m", datetime(2026, 11, 23, 8, tzinfo=UTC)) == Price(10, 500, 2000)


@pytest.mark.parametrize(
    ("price", "factor"), [(Price(-1), 1), (Price(10**9 + 1), 1), (Price(0, 0, 10**9), 2)]
)
def test_a_price_that_no_sum_could_hold_is_refused(
    book: PriceBook, price: Price, factor: int
) -> None:
    with pytest.raises(PriceError, match="not within 0 to"):
        book.set("m", price, [Window("00:00", "24:00", Fraction(factor), "UTC")])
    with pytest.raises(PriceError, match="names no model"):
        book.set("", Price(1))
    assert book.current() == []


def test_each_list_holds_from_its_moment(book: PriceBook) -> None:
    june, july = datetime(2026, 6, 1, tzinfo=UTC), datetime(2026, 7, 1, tzinfo=UTC)
    book.set("m", Price(2, 2, 2), holds_from=july)
    book.set("m", Price(1, 1, 1), holds_from=june)  # written later, holds before
    book.set(EVERY_MODEL, Price(9, 9, 9), holds_from=june)
    tick = timedelta(milliseconds=1)
    told = [book.price("m", at) for at in (june - tick, june, july - tick, july)]
    assert told == [FREE, Price(1, 1, 1), Price(1, 1, 1), Price(2, 2, 2)]
    assert book.price("other", june) == Price(9, 9, 9)
    assert [one.price.hit for one in book.current(june)] == [9, 1]
    assert [one.price.hit for one in book.history("m")] == [1, 2]
    assert PriceBook(book._database).price("m", july) == Price(2, 2, 2)


def test_the_same_file_again_adds_nothing(book: PriceBook, tmp_path: Path) -> None:
    path = write(tmp_path / "prices.toml", FILE)
    assert book.add(*read_prices(path)) == 2
    assert book.add(*read_prices(path)) == 0
    path = write(path, FILE.replace("miss = 1\n", "miss = 2\n").replace("from", "#"))
    assert book.add(*read_prices(path)) == 1
    assert book.price("deepseek-v4-flash", beijing("2026-09-26T10:00")).miss == 1000
    assert book.set("x", Price(1, 1, 1), holds_from=datetime(2026, 1, 1, tzinfo=UTC))
    assert not book.set("x", Price(1, 1, 1))


def test_a_window_survives_its_table() -> None:
    window = Window("22:00", "06:30", Fraction(1, 4), "UTC", (5, 6), frozenset({date(2026, 1, 1)}))
    assert window_from(window_table(window)) == window


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("hit = 0.02", "hit = 0.0205"), r"deepseek-v4-flash.*0\.021"),
        (("hit = 0.02", ""), "lacks hit"),
        (("miss = 4.5", "mis = 4.5"), "no 'mis'"),
        (("09:00", "9:00"), "no time of day"),
        (("Asia/Shanghai", "Asia/Shanghia"), "unknown timezone"),
        (('"mon"', '"mo"'), "window"),
        (("factor = 2", "factor = -1"), "factor"),
        (("factor = 2", "factor = 0.30303"), None),
        (("+08:00\n[", "\n["), "timezone"),
        (("[model.deepseek-v4-flash]", "[model.deepseek-v4-flash"), "TOML"),
        (("[model.deepseek-v4-flash]", "[models.deepseek-v4-flash]"), "models"),
        (("2026-10-01", '"1st of October"'), "window"),
    ],
)
def test_a_file_with_a_fault_changes_nothing(
    book: PriceBook, tmp_path: Path, change: tuple[str, str], told: str | None
) -> None:
    path = write(tmp_path / "prices.toml", FILE.replace(*change, 1))
    with pytest.raises(PriceError, match=told):
        book.add(*read_prices(path))
    assert book.history() == []


def test_the_currency_of_a_begun_ledger_stays(database: Database, book: PriceBook) -> None:
    assert book.currency == "CNY"
    book.add([], "USD")
    assert book.currency == "USD"
    ledger = Ledger(database)
    ledger.top_up("main", 1, token="t")
    with pytest.raises(PriceError, match="holds USD"):
        book.add([], "CNY")
    with pytest.raises(PriceError, match="three letters"):
        book.add([], "yuan")
    assert book.currency == "USD"
    ledger.close()
