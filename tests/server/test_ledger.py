"""The ledger: every step once, nothing made or lost, nothing spent twice."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qiusuo.server.accounts import AccountError
from qiusuo.server.database import Database
from qiusuo.server.keys import Key, Keys
from qiusuo.server.ledger import (
    AlreadyRefunded,
    InsufficientBalance,
    KeyRevoked,
    Ledger,
    LedgerError,
    OverBudget,
    Settled,
    Used,
)
from qiusuo.server.prices import FREE, Price, PriceBook
from qiusuo.server.usage import UsageReports

PRICE = Price(20, 1000, 4000)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "money.sqlite3")
    yield database
    database.close()


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    ledger = Ledger(database)
    yield ledger
    ledger.check()
    ledger.close()


def key_of(database: Database, account: str = "main", budget: int | None = None) -> Key:
    return Keys(database).make("somebody", account, budget=budget)[0]


def used(output: int, hit: int = 0, miss: int = 0) -> Used:
    return Used("m", hit, miss, output)


def parts(ledger: Ledger, account: str = "main") -> tuple[int, int, int]:
    balance = ledger.balance(account)
    return balance.granted, balance.topped_up, balance.reserved


def postings(database: Database, kind: str) -> dict[str, int]:
    query = (
        "SELECT account, amount FROM postings JOIN transactions ON entry = id "
        "WHERE kind = ? ORDER BY id DESC"
    )
    with database.read() as connection:
        return {row["account"]: row["amount"] for row in connection.execute(query, (kind,))}


def test_a_request_from_top_up_to_revenue(ledger: Ledger, database: Database) -> None:
    """DeepSeek's flash prices: 1,234 tokens found, 566 not, 321 written."""
    ledger.top_up("main", 10**10, token="a", note="bank transfer 7")
    ledger.reserve("r", key_of(database), "main", "m", 5_000_000, PRICE)
    assert parts(ledger) == (0, 10**10 - 5_000_000, 5_000_000)
    settled = ledger.settle("r", used(321, hit=1234, miss=566))
    assert settled == Settled(1_874_680)  # 24,680 + 566,000 + 1,284,000
    assert parts(ledger) == (0, 10**10 - 1_874_680, 0)
    assert postings(database, "top up") == {
        "user:main:topped_up": 10**10,
        "house:cash": -(10**10),
    }
    assert postings(database, "settle") == {
        "user:main:reserved": -5_000_000,
        "user:main:topped_up": 5_000_000 - 1_874_680,
        "house:revenue": 1_874_680,
    }


@pytest.mark.parametrize(
    ("cost", "left"), [(0, (60, 100)), (5, (55, 100)), (60, (0, 100)), (70, (0, 90)), (90, (0, 70))]
)
def test_gifts_go_first_and_the_rest_goes_back(
    ledger: Ledger, cost: int, left: tuple[int, int]
) -> None:
    ledger.top_up("main", 60, granted=True, token="gift")
    ledger.top_up("main", 100, token="paid")
    ledger.reserve("r", None, "main", "m", 90, Price(0, 0, 1))
    assert parts(ledger) == (0, 70, 90)
    ledger.settle("r", used(cost))
    assert parts(ledger) == (*left, 0)


def test_every_step_happens_once(ledger: Ledger) -> None:
    ledger.top_up("main", 100, token="a")
    assert not ledger.top_up("main", 100, token="a")
    for _ in range(2):
        ledger.reserve("r", None, "main", "m", 40, Price(0, 0, 1))
        assert parts(ledger) == (0, 60, 40)
    assert ledger.settle("r", used(30)) == Settled(30)
    assert ledger.settle("r", used(7)) == Settled(30)
    assert not ledger.refund("r")
    assert parts(ledger) == (0, 70, 0)
    ledger.reserve("s", None, "main", "m", 40, Price(0, 0, 1))
    assert ledger.refund("s")
    assert not ledger.refund("s")
    with pytest.raises(AlreadyRefunded):
        ledger.settle("s", used(1))
    assert parts(ledger) == (0, 70, 0)


def test_an_id_is_used_for_one_thing(ledger: Ledger) -> None:
    ledger.top_up("main", 100, token="a")
    ledger.reserve("r", None, "main", "m", 40, PRICE)
    for most, model, price in ((41, "m", PRICE), (40, "n", PRICE), (40, "m", Price(1, 1, 1))):
        with pytest.raises(LedgerError, match="new id"):
            ledger.reserve("r", None, "main", model, most, price)
    ledger.refund("r")
    with pytest.raises(LedgerError, match="new id"):
        ledger.reserve("r", None, "main", "m", 40, PRICE)
    for amount, account in ((101, "main"), (100, "other")):
        with pytest.raises(LedgerError, match="another movement"):
            ledger.top_up(account, amount, token="a")
    with pytest.raises(LedgerError, match="another movement"):
        ledger.take_back("main", 100, token="a")
    for step in (ledger.refund, lambda request: ledger.settle(request, used(1))):
        with pytest.raises(LedgerError, match="nothing was reserved"):
            step("unknown")
    ledger.reserve("t", None, "main", "m", 4, PRICE)
    with pytest.raises(LedgerError, match="not for n"):
        ledger.settle("t", Used("n", 0, 0, 0))
    with pytest.raises(AccountError):
        ledger.balance("other")


def test_the_balance_is_the_limit(ledger: Ledger) -> None:
    ledger.top_up("main", 100, token="a")
    ledger.reserve("r", None, "main", "m", 60, PRICE)
    with pytest.raises(InsufficientBalance, match=r"has 0\.00000004"):
        ledger.reserve("s", None, "main", "m", 41, PRICE)
    with pytest.raises(InsufficientBalance):
        ledger.take_back("main", 41, token="b")
    ledger.reserve("s", None, "main", "m", 40, PRICE)
    with pytest.raises(AccountError):
        ledger.reserve("t", None, "nobody", "m", 1, PRICE)
    for amount in (0, -1, 10**18):
        with pytest.raises(LedgerError):
            ledger.top_up("main", amount, token="c")
    for most in (-1, 10**18):
        with pytest.raises(LedgerError):
            ledger.reserve("t", None, "main", "m", most, PRICE)


def test_a_key_is_held_to_its_budget_reserved_and_spent(ledger: Ledger, database: Database) -> None:
    keys, key = Keys(database), key_of(database, budget=100)
    ledger.top_up("main", 10_000, token="a")
    ledger.reserve("r", key, "main", "m", 60, Price(0, 0, 1))
    with pytest.raises(OverBudget):
        ledger.reserve("s", key, "main", "m", 41, PRICE)
    ledger.settle("r", used(10))
    ledger.reserve("s", key, "main", "m", 90, PRICE)
    with pytest.raises(OverBudget):
        ledger.reserve("t", key, "main", "m", 1, PRICE)
    ledger.refund("s")
    assert (keys.get(key.id).spent, keys.get(key.id).reserved) == (10, 0)
    keys.change(key.id, budget=None)
    ledger.reserve("t", key, "main", "m", 500, PRICE)  # `key` is as it was read, the key is not
    keys.revoke(key.id)
    with pytest.raises(KeyRevoked):
        ledger.reserve("u", key, "main", "m", 1, PRICE)
    ledger.settle("t", used(0))  # what is under way goes on
    with pytest.raises(LedgerError, match="none of account"):
        ledger.reserve("u", key, "local", "m", 1, PRICE)


def test_an_open_account_needs_nothing_beforehand(ledger: Ledger) -> None:
    ledger.reserve("r", None, "local", "m", 10**12, PRICE)
    ledger.settle("r", used(1000))
    assert parts(ledger, "local") == (0, -4_000_000, 0)
    ledger.top_up("local", 6_000_000, granted=True, token="a")
    ledger.reserve("s", None, "local", "m", 7_000_000, PRICE)
    assert parts(ledger, "local") == (0, -5_000_000, 7_000_000)
    ledger.refund("s")
    ledger.open_account("local", open=False)
    with pytest.raises(InsufficientBalance):
        ledger.reserve("t", None, "local", "m", 2_000_001, PRICE)
    ledger.reserve("t", None, "local", "m", 2_000_000, PRICE)


def test_what_was_used_is_charged_even_where_it_was_not_covered(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.top_up("main", 10, granted=True, token="a")
    ledger.top_up("main", 10, token="b")
    ledger.reserve("r", None, "main", "m", 5, Price(0, 0, 1))
    with caplog.at_level(logging.WARNING, "qiusuo.server"):
        assert ledger.settle("r", used(12)) == Settled(12, beyond=7)
    assert "beyond what was reserved" in caplog.text
    assert parts(ledger) == (0, 8, 0)
    ledger.reserve("s", None, "main", "m", 8, Price(0, 0, 1))
    assert ledger.settle("s", used(20)) == ledger.settle("s", used(20)) == Settled(20, beyond=12)
    assert parts(ledger) == (0, -12, 0)
    with pytest.raises(InsufficientBalance):
        ledger.reserve("t", None, "main", "m", 1, PRICE)
    ledger.reserve("t", None, "main", "m", 0, FREE)


def test_what_is_free_is_noted_and_moves_nothing(ledger: Ledger, database: Database) -> None:
    ledger.reserve("r", key_of(database), "main", "m", 0, FREE)
    assert ledger.settle("r", used(9)) == Settled(0)
    assert postings(database, "reserve") == postings(database, "settle") == {}
    assert UsageReports(database).total().output == 9


def test_the_price_is_the_one_agreed_upon(ledger: Ledger) -> None:
    """Whatever the book says when it ends: the ledger never asks it."""
    ledger.reserve("r", None, "local", "m", 10**6, Price(1, 2, 3))
    assert ledger.settle("r", used(100, hit=10, miss=1)).amount == 312


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE postings SET amount = amount + 1",
        "DELETE FROM postings",
        "UPDATE transactions SET note = 'x'",
        "DELETE FROM transactions",
        "UPDATE usage SET amount = 0",
        "DELETE FROM usage",
        "UPDATE prices SET hit = 0",
        "UPDATE reservations SET state = 'reserved'",
        "DELETE FROM reservations",
        "INSERT OR REPLACE INTO postings SELECT entry, account, amount FROM postings",
        "INSERT OR REPLACE INTO transactions SELECT * FROM transactions",
        "INSERT INTO postings VALUES (1, 'a', 1), (1, 'b', -1)",  # to an old transaction
        "INSERT INTO never VALUES (1)",
        "UPDATE balances SET amount = NULL",
    ],
)
def test_the_database_itself_refuses(ledger: Ledger, database: Database, statement: str) -> None:
    PriceBook(database).set("m", PRICE)
    ledger.top_up("main", 100, token="a")
    ledger.reserve("r", None, "main", "m", 60, PRICE)
    ledger.settle("r", used(0))
    with pytest.raises(sqlite3.IntegrityError), database.write() as connection:
        connection.execute(statement)


@pytest.mark.parametrize("amounts", [(5, -4), (5,), (-3, 1, 1), (2**60, -(2**60) + 1)])
def test_a_transaction_out_of_balance_cannot_be_committed(
    ledger: Ledger, database: Database, amounts: tuple[int, ...]
) -> None:
    def write() -> None:
        with database.write() as connection:
            connection.execute("INSERT INTO transactions VALUES (1, 0, 'top up', NULL, 'x', '')")
            for number, amount in enumerate(amounts):
                connection.execute("INSERT INTO postings VALUES (1, ?, ?)", (f"a{number}", amount))

    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        write()
    with database.read() as connection:
        assert connection.execute("SELECT count(*) FROM transactions").fetchone()[0] == 0
    ledger.top_up("main", 1, token="goes on")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            "UPDATE balances SET amount = amount + 1 WHERE account = 'user:main:topped_up'",
            "balance",
        ),
        ("UPDATE keys SET spent = spent + 1", "key key-"),
        ("UPDATE keys SET reserved = 3", "key key-"),
        ("DROP TRIGGER usage_no_update; UPDATE usage SET amount = amount + 1", "usage comes to"),
        ("DROP TRIGGER usage_no_delete; DELETE FROM usage", "usage says otherwise"),
        ("DROP TRIGGER postings_no_update; UPDATE postings SET amount = amount + 1", "sums to"),
        ("DROP TRIGGER postings_no_delete; DELETE FROM postings WHERE entry = 1", "has 0 postings"),
        (
            "DROP TRIGGER reservations_final; UPDATE reservations SET state = 'refunded'",
            "request r is refunded",
        ),
        ("DROP TRIGGER reservations_final; UPDATE reservations SET state = 'reserved'", "reserved"),
        ("DELETE FROM accounts WHERE name = 'main'", "refers to nothing"),
    ],
)
def test_the_audit_finds_what_was_tampered_with(tmp_path: Path, damage: str, told: str) -> None:
    database = Database(tmp_path / "money.sqlite3")
    ledger = Ledger(database)
    ledger.top_up("main", 100, token="a")
    ledger.reserve("r", key_of(database), "main", "m", 60, Price(0, 0, 1))
    ledger.settle("r", used(10))
    ledger.check()
    other = sqlite3.connect(database.path)  # keeps no foreign keys unless it is asked to
    other.executescript(damage)
    other.close()
    with pytest.raises(LedgerError, match=told):
        ledger.check()


def test_threads_together_do_not_overspend(ledger: Ledger, database: Database) -> None:
    key = key_of(database)
    ledger.top_up("main", 100, token="a")
    start, got = threading.Barrier(6), []

    def ask(name: int) -> None:
        start.wait()
        for number in range(10):
            try:
                ledger.reserve(f"{name}-{number}", key, "main", "m", 7, Price(0, 0, 1))
                got.append(f"{name}-{number}")
            except InsufficientBalance:
                pass

    run_together(ask, 6)
    assert len(got) == 14
    assert parts(ledger) == (0, 2, 98)
    assert len(ledger._database._readers) <= 8


@pytest.mark.parametrize("round", range(8))
def test_threads_settle_and_refund_one_request_once(ledger: Ledger, round: int) -> None:
    ledger.reserve("r", None, "local", "m", 50, Price(0, 0, 1))
    start, ends = threading.Barrier(4), []

    def end(name: int) -> None:
        start.wait()
        try:
            ends.append(ledger.refund("r") if name % 2 else ledger.settle("r", used(9)))
        except AlreadyRefunded:
            ends.append(None)

    run_together(end, 4)
    charged = 9 if Settled(9) in ends else 0
    assert parts(ledger, "local") == (0, -charged, 0)
    assert ends.count(True) == (charged == 0)


def run_together(work: object, count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_moments_are_the_clocks(database: Database) -> None:
    at = datetime(2026, 11, 22, 1, 2, 3, 456_000, tzinfo=UTC)
    ledger = Ledger(database, clock=lambda: at)
    ledger.reserve("r", None, "local", "m", 1, PRICE)
    ledger.settle("r", used(0))
    assert UsageReports(database).rows()[0].started == at
    ledger.close()
