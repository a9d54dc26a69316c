"""Double entry: money is only ever moved, from some accounts to others, and never made or lost.

A movement is one transaction whose postings sum to zero; credits are positive. A caller's money
stands in three places, what is the house's in three more:

    top up    house:cash            -> user:NAME:topped_up     (a gift: house:grants -> ...:granted)
    reserve   ...:granted, then ...:topped_up -> user:NAME:reserved
    settle    ...:reserved -> house:revenue, and the rest back where it came from
    refund    ...:reserved -> back where it came from

What a request may cost at most is reserved before it begins, in a transaction that no other writer
stands beside, so a balance is never spent twice. The price agreed upon stays with the reservation.
Every step is known by the id of its request and done once, however often it is asked for.

Reserving and refunding do not wait for the disk: after a power cut every reservation is given back
anyhow. A settlement does, and takes along what was written before it.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping
from datetime import datetime

from qiusuo.data.errors import DataError
from qiusuo.server.accounts import Account, Balance, add_account, balance_of, place
from qiusuo.server.database import Database, milliseconds, now
from qiusuo.server.keys import Key
from qiusuo.server.ledger_check import find_faults
from qiusuo.server.ledger_tables import LEDGER
from qiusuo.server.money import LARGEST, told
from qiusuo.server.owners import Owner, found_dead, owners
from qiusuo.server.prices import Price, cost
from qiusuo.server.reservations import Reservation, find_reservation, from_row
from qiusuo.server.settlement import Settled, Used, find_settled, note_usage

log = logging.getLogger("qiusuo.server")


class LedgerError(DataError):
    """What the ledger refuses; nothing was changed."""


class InsufficientBalance(LedgerError):  # noqa: N818
    """The account holds less than what is to be reserved."""


class OverBudget(LedgerError):  # noqa: N818
    """The key has spent and reserved so much that its budget leaves less than is to be reserved."""


class KeyRevoked(LedgerError):  # noqa: N818
    """The key was revoked after it was found."""


class AlreadyRefunded(LedgerError):  # noqa: N818
    """A request cannot be settled when what was reserved for it was given back."""


class Ledger:
    """The ledger in a database. Use from any thread. ``close`` says that this server is gone. All
    that is refused raises LedgerError or AccountError, and nothing was changed."""

    def __init__(self, database: Database, clock: Callable[[], datetime] = now) -> None:
        database.migrate(LEDGER)
        self._database, self._clock = database, clock
        self._owner = Owner(database.path)

    def close(self) -> None:
        """From now on what is still reserved counts as left behind."""
        self._owner.close()

    # -- a request ----------------------------------------------------------------------------

    def reserve(
        self, request: str, key: Key | None, account: str, model: str, most: int, price: Price
    ) -> None:
        """Set aside ``most`` nano-units for a request that costs ``price``. The same again changes
        nothing. InsufficientBalance, OverBudget, KeyRevoked; LedgerError for a request id that was
        used for something else."""
        if not 0 <= most <= LARGEST:
            raise LedgerError(f"{told(most)} cannot be reserved: 0 to {told(LARGEST)} can")
        with self._database.write(durable=False) as connection:
            balance = balance_of(connection, account)
            granted = min(max(balance.granted, 0), most)
            wanted = Reservation(
                request=request,
                account=account,
                key=None if key is None else key.id,
                model=model,
                granted=granted,
                topped_up=most - granted,
                price=price,
                state="reserved",
                owner=self._owner.token,
                created=milliseconds(self._clock()),
            )
            before = find_reservation(connection, request)
            if before is not None:
                if before.same_as(wanted):
                    return
                raise LedgerError(f"request {request!r} was reserved before: give a new id")
            if wanted.key is not None:
                _refuse_key(connection, wanted.key, account, most)
            if most > max(balance.total, 0) and not balance.open:  # what is free may pass
                raise InsufficientBalance(
                    f"account {account!r} has {told(balance.total)}, and this may take "
                    f"{told(most)}: top it up, or ask for fewer tokens"
                )
            wanted.store(connection)
            self._move(connection, "reserve", wanted.moved(), request)

    def settle(self, request: str, used: Used) -> Settled:
        """Charge what was used, at the price that was agreed upon, give the rest back, and note the
        usage, all in one. Again: what was charged the first time. Where more was used than had been
        reserved it is charged all the same, below zero if need be. AlreadyRefunded."""
        with self._database.write() as connection:
            found = _known(connection, request)
            if found.state == "settled":
                return find_settled(connection, found)
            if found.state == "refunded":
                raise AlreadyRefunded(f"request {request!r} was refunded and cannot be settled")
            if used.model != found.model:
                raise LedgerError(
                    f"request {request!r} was reserved for {found.model}, not for {used.model}"
                )
            amount = cost(found.price, used.hit, used.miss, used.output)
            if amount > LARGEST:
                raise LedgerError(f"request {request!r} cannot cost {told(amount)}")
            beyond = max(0, amount - found.most)
            movement, note = found.charged(amount, balance_of(connection, found.account)), ""
            if beyond:
                note = f"{told(beyond)} beyond what was reserved"
                log.warning("request %s of account %s: %s", request, found.account, note)
            found.end(connection, "settled", spent=amount)
            self._move(connection, "settle", movement, request, note=note)
            note_usage(connection, found, used, amount)
            return Settled(amount, beyond)

    def refund(self, request: str) -> bool:
        """Give back what was reserved, for a request that made nothing. True when it did; False,
        with nothing changed, for one that was settled or refunded before."""
        with self._database.write(durable=False) as connection:
            return self._refund(connection, _known(connection, request))

    def release_stale(self) -> int:
        """Give back what servers had reserved that are gone, killed or not; for how many requests.
        Those of servers that live stay, this one among them."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT DISTINCT owner FROM reservations WHERE state = 'reserved'"
            )
            left = {row["owner"] for row in rows}
        released = 0
        for token in sorted((left | owners(self._database.path)) - {self._owner.token}):
            with found_dead(self._database.path, token) as dead:
                released += self._release(token) if dead else 0
        return released

    # -- accounts -----------------------------------------------------------------------------

    def open_account(self, account: str, *, open: bool) -> None:
        """Make an account, or change whether it may go below zero."""
        with self._database.write() as connection:
            add_account(connection, account, milliseconds(self._clock()))
            connection.execute("UPDATE accounts SET open = ? WHERE name = ?", (int(open), account))

    def top_up(
        self, account: str, amount: int, *, granted: bool = False, note: str = "", token: str
    ) -> bool:
        """Add nano-units to an account, made if need be: paid for, or given (``granted``). Once for
        each ``token``: False, with nothing changed, for one that was used for the same before."""
        return self._bring("top up", account, amount, granted, note, token)

    def take_back(
        self, account: str, amount: int, *, granted: bool = False, note: str = "", token: str
    ) -> bool:
        """Take nano-units out again, to mend a top-up or to pay back: what is there at most."""
        return self._bring("take back", account, amount, granted, note, token)

    def balance(self, account: str) -> Balance:
        """AccountError for an account that there is not."""
        with self._database.read() as connection:
            return balance_of(connection, account)

    def check(self) -> None:
        """Add everything up anew: each transaction and all of them sum to zero, and balances, keys,
        reservations and usage agree with the postings. LedgerError lists what does not."""
        with self._database.read() as connection:
            faults = find_faults(connection)
        if faults:
            raise LedgerError(f"{self._database.path} does not add up: {'; '.join(faults)}")

    def accounts(self) -> list[Account]:
        """All, by name."""
        with self._database.read() as connection:
            rows = connection.execute("SELECT name FROM accounts ORDER BY name").fetchall()
            return [Account(row["name"], balance_of(connection, row["name"])) for row in rows]

    # -- within a transaction of the database ---------------------------------------------------

    def _bring(
        self, kind: str, account: str, amount: int, granted: bool, note: str, token: str
    ) -> bool:
        if not 0 < amount <= LARGEST:
            raise LedgerError(f"{told(amount)} is no amount to move: above 0, to {told(LARGEST)}")
        if not token:
            raise LedgerError("give a token, so that the same movement is never made twice")
        part, house = ("granted", "grants") if granted else ("topped_up", "cash")
        where = place(account, part)
        signed = amount if kind == "top up" else -amount
        with self._database.write() as connection:
            if kind == "top up":
                add_account(connection, account, milliseconds(self._clock()))
            balance = balance_of(connection, account)
            before = connection.execute(
                "SELECT kind, account, amount FROM transactions JOIN postings ON entry = id "
                "WHERE token = ? AND account LIKE 'user:%'",
                (token,),
            ).fetchone()
            if before is not None:
                if tuple(before) == (kind, where, signed):
                    return False
                raise LedgerError(f"token {token!r} was used for another movement: give a new one")
            there = getattr(balance, part)
            if kind == "take back" and amount > there:
                raise InsufficientBalance(
                    f"account {account!r} has {told(there)} {part.replace('_', ' ')}, which is "
                    f"less than {told(amount)}"
                )
            self._move(
                connection, kind, {where: signed, f"house:{house}": -signed}, None, token, note
            )
        return True

    def _release(self, owner: str) -> int:
        with self._database.write(durable=False) as connection:
            rows = connection.execute(
                "SELECT * FROM reservations WHERE owner = ? AND state = 'reserved'", (owner,)
            ).fetchall()
            return sum(self._refund(connection, from_row(row)) for row in rows)

    def _refund(self, connection: sqlite3.Connection, found: Reservation) -> bool:
        if found.state != "reserved":
            return False
        found.end(connection, "refunded", spent=0)
        back = {place: -amount for place, amount in found.moved().items()}
        self._move(connection, "refund", back, found.request)
        return True

    def _move(
        self,
        connection: sqlite3.Connection,
        kind: str,
        amounts: Mapping[str, int],
        request: str | None,
        token: str | None = None,
        note: str = "",
    ) -> None:
        """The one place where postings are written. Nothing moved is no transaction."""
        postings = {place: amount for place, amount in amounts.items() if amount}
        if sum(postings.values()):
            raise AssertionError(f"{kind} of {request or token}: {postings} do not sum to zero")
        if not postings:
            return
        entry = connection.execute(
            "INSERT INTO transactions (made, kind, request, token, note) VALUES (?, ?, ?, ?, ?)",
            (milliseconds(self._clock()), kind, request, token, note),
        ).lastrowid
        connection.executemany(
            "INSERT INTO postings VALUES (?, ?, ?)",
            [(entry, place, amount) for place, amount in postings.items()],
        )


def _known(connection: sqlite3.Connection, request: str) -> Reservation:
    found = find_reservation(connection, request)
    if found is None:
        raise LedgerError(f"nothing was reserved for request {request!r}")
    return found


def _refuse_key(connection: sqlite3.Connection, key: str, account: str, most: int) -> None:
    """As the key is now: it may have been revoked, or its budget changed, since it was read."""
    row = connection.execute("SELECT * FROM keys WHERE id = ?", (key,)).fetchone()
    if row is None or row["account"] != account:
        raise LedgerError(f"key {key} is none of account {account!r}")
    if row["revoked"] is not None:
        raise KeyRevoked(f"key {key} was revoked")
    taken = row["spent"] + row["reserved"]
    if row["budget"] is not None and most > max(row["budget"] - taken, 0):
        raise OverBudget(
            f"key {key} has a budget of {told(row['budget'])}, of which {told(taken)} are spent or "
            f"reserved, and this may take {told(most)}: raise its budget, or ask for fewer tokens"
        )
