"""API keys: a secret that is shown once and kept as its hash, and what its bearer may do.

A secret is 48 letters and digits drawn by the system, more than 256 bits. Nobody finds one of those
by trying, so one SHA-256 is enough; slow hashes are for passwords that people think of. The lookup
compares hashes in an index, and how long that takes tells nothing that helps to guess a secret.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import string
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict, Unpack

from qiusuo.data.errors import DataError
from qiusuo.server.accounts import add_account
from qiusuo.server.database import Database, milliseconds, moment, now
from qiusuo.server.ledger_tables import LEDGER
from qiusuo.server.money import LARGEST

MAIN = "main"  # the account of keys that are made without naming one
_LETTERS = string.ascii_letters + string.digits
_LENGTH = 48


class KeysError(DataError):
    """No such key, or no such limits."""


@dataclass(frozen=True)
class Key:
    """What is known of a key: not its secret. ``prefix`` is "sk-...last4". None is no limit:
    ``models`` that it may use, ``rpm`` requests and ``tpm`` tokens in a minute, ``concurrency``
    requests at once, ``budget`` nano-units in all, of which ``spent`` are gone and ``reserved`` are
    set aside."""

    id: str
    name: str
    account: str
    prefix: str
    models: tuple[str, ...] | None
    rpm: int | None
    tpm: int | None
    concurrency: int | None
    budget: int | None
    admin: bool
    created: datetime
    revoked: datetime | None
    spent: int = 0
    reserved: int = 0


class Limits(TypedDict, total=False):
    """What can be chosen for a key; None is no limit."""

    models: tuple[str, ...] | None
    rpm: int | None
    tpm: int | None
    concurrency: int | None
    budget: int | None
    admin: bool


class Changes(Limits, total=False):
    """What can be changed of a key."""

    name: str


_CHANGEABLE = tuple(Changes.__annotations__)


class Keys:
    """The keys in a database. Use from any thread."""

    def __init__(self, database: Database, clock: Callable[[], datetime] = now) -> None:
        database.migrate(LEDGER)
        self._database, self._clock = database, clock

    def make(self, name: str, account: str = MAIN, **limits: Unpack[Limits]) -> tuple[Key, str]:
        """A new key and its secret, which nothing can tell again. The account is made if need be.
        KeysError for limits that are none."""
        secret = "sk-" + "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))
        at = milliseconds(self._clock())
        values: dict[str, Any] = {"admin": 0} | _columns({**limits, "name": name})
        values |= {
            "id": f"key-{secrets.token_hex(8)}",
            "account": account,
            "hash": _hash(secret),
            "prefix": f"sk-...{secret[-4:]}",
            "created": at,
        }
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        with self._database.write() as connection:
            add_account(connection, account, at)
            row = connection.execute(
                f"INSERT INTO keys ({names}) VALUES ({marks}) RETURNING *", tuple(values.values())
            ).fetchone()
        return _key(row), secret

    def find(self, secret: str) -> Key | None:
        """Whose secret it is; None for one that is unknown or revoked."""
        query = "SELECT * FROM keys WHERE hash = ? AND revoked IS NULL"
        with self._database.read() as connection:
            row = connection.execute(query, (_hash(secret),)).fetchone()
        return None if row is None else _key(row)

    def get(self, id: str) -> Key:
        """By its id, revoked or not. KeysError where there is none."""
        with self._database.read() as connection:
            return _get(connection, id)

    def list(self) -> list[Key]:
        """All, the oldest first, revoked ones too."""
        with self._database.read() as connection:
            rows = connection.execute("SELECT * FROM keys ORDER BY created, rowid")
            return [_key(row) for row in rows]

    def change(self, id: str, /, **changes: Unpack[Changes]) -> Key:
        """What is named becomes so, from the next request on; the rest stays. KeysError."""
        values = _columns(changes)
        with self._database.write() as connection:
            if _get(connection, id).revoked is not None:
                raise KeysError(f"key {id} was revoked: make a new one")
            for name, value in values.items():
                connection.execute(f"UPDATE keys SET {name} = ? WHERE id = ?", (value, id))
            return _get(connection, id)

    def revoke(self, id: str) -> Key:
        """For good; again changes nothing. Requests under way go on and are charged."""
        with self._database.write() as connection:
            connection.execute(
                "UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL",
                (milliseconds(self._clock()), id),
            )
            return _get(connection, id)

    def any(self) -> bool:
        """Whether a key was ever made. Revoked ones count: to revoke the last key must not open
        the server to everybody on the machine."""
        with self._database.read() as connection:
            return connection.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _columns(limits: Changes) -> dict[str, Any]:
    """As they are stored. KeysError for what is no limit."""
    if unknown := set(limits) - set(_CHANGEABLE):
        raise KeysError(f"a key has no {min(unknown)!r}: it has {', '.join(_CHANGEABLE)}")
    columns: dict[str, Any] = dict(limits)
    for name in ("rpm", "tpm", "concurrency"):
        value = columns.get(name)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            raise KeysError(f"{name} must be a whole number above 0, or none, not {value!r}")
    budget = columns.get("budget")
    if budget is not None and (type(budget) is not int or not 0 <= budget <= LARGEST):
        raise KeysError(f"budget must be nano-units from 0 to {LARGEST}, or none, not {budget!r}")
    if "name" in columns:
        name = columns["name"]
        if not 0 < len(name) <= 100 or not name.isprintable():
            raise KeysError(f"{name!r} cannot name a key: write 1 to 100 characters")
    models = columns.get("models")
    if models is not None:
        if isinstance(models, str) or not all(name and isinstance(name, str) for name in models):
            raise KeysError(f"models must be a list of names, not {models!r}")
        columns["models"] = json.dumps(list(models), ensure_ascii=False)
    if type(columns.get("admin", False)) is not bool:
        raise KeysError(f"admin must be true or false, not {columns['admin']!r}")
    return columns


def _get(connection: sqlite3.Connection, id: str) -> Key:
    row = connection.execute("SELECT * FROM keys WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise KeysError(f"there is no key {id!r}: `qiusuo keys list` shows those there are")
    return _key(row)


def _key(row: sqlite3.Row) -> Key:
    return Key(
        id=row["id"],
        name=row["name"],
        account=row["account"],
        prefix=row["prefix"],
        models=None if row["models"] is None else tuple(json.loads(row["models"])),
        rpm=row["rpm"],
        tpm=row["tpm"],
        concurrency=row["concurrency"],
        budget=row["budget"],
        admin=bool(row["admin"]),
        created=moment(row["created"]),
        revoked=None if row["revoked"] is None else moment(row["revoked"]),
        spent=row["spent"],
        reserved=row["reserved"],
    )
