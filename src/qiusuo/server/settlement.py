"""What a request took and what it was charged: the row of usage that stands beside the postings."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from qiusuo.server.reservations import Reservation


@dataclass(frozen=True)
class Used:
    """What a request took: tokens of the prompt found in the cache and not, and of the output, of
    which ``reasoning`` were thought. ``model`` is that of the reservation."""

    model: str
    hit: int
    miss: int
    output: int
    reasoning: int = 0
    finish: str = "stop"
    seconds: float = 0.0
    endpoint: str = ""


@dataclass(frozen=True)
class Settled:
    """``amount`` was charged, ``beyond`` of it over and above what had been reserved."""

    amount: int
    beyond: int = 0


def find_settled(connection: sqlite3.Connection, found: Reservation) -> Settled:
    """What a settled request was charged."""
    row = connection.execute(
        "SELECT amount FROM usage WHERE request = ?", (found.request,)
    ).fetchone()
    return Settled(row["amount"], max(0, row["amount"] - found.most))


def note_usage(connection: sqlite3.Connection, found: Reservation, used: Used, amount: int) -> None:
    """Write it down, in the transaction that charges it."""
    connection.execute(
        "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(found.request, found.key, found.account, found.model, used.endpoint),
            *(used.hit, used.miss, used.output, used.reasoning, amount),
            *(found.created, used.seconds, used.finish),
        ),
    )
