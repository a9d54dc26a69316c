"""Who has money with the house, and how much: rows that the ledger reads and never adds up anew.

``balances`` follows the postings by a trigger of the database, within the same transaction.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from qiusuo.data.errors import DataError

LOCAL = "local"  # the open account of who sits at this machine
LONGEST_NAME = 100


class AccountError(DataError):
    """No such account, or no name for one."""


@dataclass(frozen=True)
class Balance:
    """Nano-units. ``total`` is what can be spent: ``granted`` plus ``topped_up``, without what is
    ``reserved`` for requests under way. ``open``: it may go below zero."""

    granted: int
    topped_up: int
    reserved: int
    open: bool = False

    @property
    def total(self) -> int:
        return self.granted + self.topped_up


@dataclass(frozen=True)
class Account:
    """By name."""

    name: str
    balance: Balance


def add_account(connection: sqlite3.Connection, name: str, created: int) -> None:
    """Make an account that needs a prepaid balance, unless there is one of that name."""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or name != name.strip():
        raise AccountError(f"{name!r} cannot name an account: write 1 to {LONGEST_NAME} characters")
    if ":" in name:
        raise AccountError(f"{name!r} cannot name an account: without a colon")
    connection.execute(
        "INSERT INTO accounts VALUES (?, 0, ?) ON CONFLICT DO NOTHING", (name, created)
    )


def balance_of(connection: sqlite3.Connection, name: str) -> Balance:
    """As it stands in this transaction. AccountError where there is no account of that name."""
    row = connection.execute("SELECT open FROM accounts WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise AccountError(f"there is no account {name!r}: top it up, or make a key for it")
    parts = ("granted", "topped_up", "reserved")
    rows = connection.execute(
        "SELECT account, amount FROM balances WHERE account IN (?, ?, ?)",
        [place(name, part) for part in parts],
    )
    amounts = {row["account"]: row["amount"] for row in rows}
    granted, topped_up, reserved = (amounts.get(place(name, part), 0) for part in parts)
    return Balance(granted, topped_up, reserved, bool(row["open"]))


def place(name: str, part: str) -> str:
    """How the ledger calls one of an account's three places."""
    return f"user:{name}:{part}"
