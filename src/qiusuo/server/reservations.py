"""What was set aside for a request, at which price, and what becomes of it.

It is reserved, and then settled or refunded, and then it never changes again: the database refuses
it. That is what makes every step happen once.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, replace
from typing import Literal

from qiusuo.server.accounts import Balance, place
from qiusuo.server.prices import Price

State = Literal["reserved", "settled", "refunded"]


@dataclass(frozen=True)
class Reservation:
    """``granted`` and ``topped_up``: what was taken from which; ``owner``: the server that did;
    ``created`` in milliseconds."""

    request: str
    account: str
    key: str | None
    model: str
    granted: int
    topped_up: int
    price: Price
    state: State
    owner: str
    created: int

    @property
    def most(self) -> int:
        """All that was set aside."""
        return self.granted + self.topped_up

    def same_as(self, wanted: Reservation) -> bool:
        """Whether it was asked for in the very same way and still stands."""
        return wanted == replace(
            self, granted=wanted.granted, topped_up=wanted.topped_up, created=wanted.created
        ) and (self.most == wanted.most)

    def moved(self) -> dict[str, int]:
        """The postings that set it aside."""
        return {
            place(self.account, "granted"): -self.granted,
            place(self.account, "topped_up"): -self.topped_up,
            place(self.account, "reserved"): self.most,
        }

    def charged(self, amount: int, left: Balance) -> dict[str, int]:
        """The postings that charge ``amount``: gifts are used up first, the rest goes back where it
        came from, and what the reservation does not cover comes from what is ``left``."""
        granted = self.granted - min(amount, self.granted)
        topped_up = self.most - amount - granted  # below zero: not covered
        if topped_up < 0:
            granted = -min(-topped_up, max(left.granted, 0))
            topped_up -= granted
        return {
            place(self.account, "reserved"): -self.most,
            place(self.account, "granted"): granted,
            place(self.account, "topped_up"): topped_up,
            "house:revenue": amount,
        }

    def store(self, connection: sqlite3.Connection) -> None:
        """With the price, so that a new list of prices does not touch requests under way."""
        price = self.price
        connection.execute(
            "INSERT INTO reservations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(self.request, self.account, self.key, self.model, self.granted, self.topped_up),
                *(price.hit, price.miss, price.output, price.version),
                *(self.state, self.owner, self.created),
            ),
        )
        self._count_for_key(connection, self.most, 0)

    def end(self, connection: sqlite3.Connection, state: State, spent: int) -> None:
        """For good."""
        connection.execute(
            "UPDATE reservations SET state = ? WHERE request = ?", (state, self.request)
        )
        self._count_for_key(connection, -self.most, spent)

    def _count_for_key(self, connection: sqlite3.Connection, reserved: int, spent: int) -> None:
        if self.key is not None and (reserved or spent):
            connection.execute(
                "UPDATE keys SET reserved = reserved + ?, spent = spent + ? WHERE id = ?",
                (reserved, spent, self.key),
            )


def find_reservation(connection: sqlite3.Connection, request: str) -> Reservation | None:
    """By the id of its request."""
    row = connection.execute("SELECT * FROM reservations WHERE request = ?", (request,)).fetchone()
    return None if row is None else from_row(row)


def from_row(row: sqlite3.Row) -> Reservation:
    """What ``store`` wrote."""
    return Reservation(
        request=row["request"],
        account=row["account"],
        key=row["key"],
        model=row["model"],
        granted=row["granted"],
        topped_up=row["topped_up"],
        price=Price(row["hit"], row["miss"], row["output"], row["price"]),
        state=row["state"],
        owner=row["owner"],
        created=row["created"],
    )
