"""What `qiusuo keys`, `qiusuo accounts` and `qiusuo prices` do: the server need not run.

A new secret goes to the standard output alone, so that it can be piped, and is told nowhere else.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qiusuo.server.database import Database
from qiusuo.server.keys import MAIN, Changes, Key, Keys, KeysError, Limits
from qiusuo.server.ledger import Ledger
from qiusuo.server.money import amount, told
from qiusuo.server.price_file import read_prices
from qiusuo.server.prices import Price, PriceBook, per_million, told_per_million

NONE = "none"  # how a limit is taken away on the command line


def make_key(
    database: Path,
    name: str,
    account: str = MAIN,
    *,
    models: Sequence[str] | None = None,
    rpm: str | None = None,
    tpm: str | None = None,
    concurrency: str | None = None,
    budget: str | None = None,
    admin: bool = False,
) -> None:
    """Print the secret of a new key. ``budget``: a decimal of the currency. KeysError."""
    limits: Limits = _changes(models, rpm, tpm, concurrency, budget, admin)
    with _open(database) as opened:
        key, secret = Keys(opened).make(name, account, **limits)
    _note(f"Key {key.id} of account {key.account!r}. Its secret is shown this once:")
    print(secret)


def list_keys(database: Path) -> None:
    """Print all keys, revoked ones too, with what they may do and have spent."""
    table = _table("id", "name", "account", "secret", "models", "limits", "spent", "budget", "")
    with _open(database) as opened:
        for key in Keys(opened).list():
            table.add_row(*map(escape, _described(key)))
    _show(table, "There are no keys: make one with `qiusuo keys make NAME`")


def revoke_key(database: Path, id: str) -> None:
    """End a key for good. KeysError where there is none."""
    with _open(database) as opened:
        key = Keys(opened).revoke(_found(Keys(opened), id).id)
    _note(f"Key {key.id} ({key.name}) is revoked.")


def change_key(
    database: Path,
    id: str,
    *,
    name: str | None = None,
    models: Sequence[str] | None = None,
    rpm: str | None = None,
    tpm: str | None = None,
    concurrency: str | None = None,
    budget: str | None = None,
    admin: bool | None = None,
) -> None:
    """Change what is given; the word "none" takes a limit away. KeysError."""
    changes: Changes = {**_changes(models, rpm, tpm, concurrency, budget, admin)}
    if name is not None:
        changes["name"] = name
    if not changes:
        raise KeysError("nothing to change: give a limit, as in --rpm 60 or --budget none")
    with _open(database) as opened:
        keys = Keys(opened)
        key = keys.change(_found(keys, id).id, **changes)
    _note(f"Key {key.id} ({key.name}): {', '.join(_described(key)[4:])}")


def top_up(
    database: Path, account: str, sum: str, *, granted: bool = False, note: str = "",
    token: str | None = None,
) -> None:  # fmt: skip
    """Add a decimal of the currency to an account; a negative one is taken out again. ``token``:
    the same movement with the same token is made once. LedgerError."""
    nano = amount(sum)
    with _ledger(database) as (opened, ledger):
        move = ledger.top_up if nano >= 0 else ledger.take_back
        token = token or secrets.token_hex(16)
        made = move(account, abs(nano), granted=granted, note=note, token=token)
        left, currency = ledger.balance(account), PriceBook(opened).currency
    done = "" if made else f" Token {token!r} was used before: nothing was moved."
    _note(f"Account {account!r} has {told(left.total)} {currency}.{done}")


def open_account(database: Path, account: str, *, open: bool) -> None:
    """Let an account, made if need be, go below zero, or no longer."""
    with _ledger(database) as (_, ledger):
        ledger.open_account(account, open=open)
    _note(f"Account {account!r} {'may go below zero' if open else 'needs a prepaid balance'}.")


def list_accounts(database: Path) -> None:
    """Print what every account has, and whether the ledger adds up. LedgerError if not."""
    with _ledger(database) as (opened, ledger):
        table = _table("account", PriceBook(opened).currency, "granted", "reserved", "")
        for account in ledger.accounts():
            has = account.balance
            amounts = (told(has.total), told(has.granted), told(has.reserved))
            table.add_row(escape(account.name), *amounts, "open" if has.open else "prepaid")
        _show(table, "")
        ledger.check()
    _note("The ledger adds up.")


def set_price(database: Path, model: str, hit: str, miss: str, output: str) -> None:
    """What a million tokens of a model cost from now on, at all hours. PriceError."""
    with _open(database) as opened:
        PriceBook(opened).set(model, Price(*map(per_million, (hit, miss, output))))
    list_prices(database)


def load_prices(database: Path, path: Path) -> None:
    """Take over a price file (price_file.py). PriceError."""
    with _open(database) as opened:
        new = PriceBook(opened).add(*read_prices(path))
    _note(f"{new} new price{'' if new == 1 else 's'} of {path}.")
    list_prices(database)


def list_prices(database: Path) -> None:
    """Print the prices in force now, for a million tokens, and their hours."""
    with _open(database) as opened:
        book = PriceBook(opened)
        table = _table("model", f"hit ({book.currency})", "miss", "output", "hours", "since")
        for listed in book.current():
            hours = [
                f"{window.start}-{window.end} {window.timezone} x{window.factor}"
                for window in listed.windows
            ]
            price = listed.price
            amounts = map(told_per_million, (price.hit, price.miss, price.output))
            since = listed.holds_from.isoformat(" ", timespec="minutes")
            table.add_row(escape(listed.model), *amounts, ", ".join(hours), since)
    _show(table, "Nothing is charged: no price was set")


@contextmanager
def _open(path: Path) -> Iterator[Database]:
    with closing(Database(path)) as database:
        yield database


@contextmanager
def _ledger(path: Path) -> Iterator[tuple[Database, Ledger]]:
    with _open(path) as database, closing(Ledger(database)) as ledger:
        yield database, ledger


def _changes(
    models: Sequence[str] | None,
    rpm: str | None,
    tpm: str | None,
    concurrency: str | None,
    budget: str | None,
    admin: bool | None,
) -> Limits:
    """Those that are given: None is not given, "none" is no limit."""
    given: dict[str, Any] = {}
    if models:
        given["models"] = None if list(models) == [NONE] else tuple(models)
    for limit, text in (("rpm", rpm), ("tpm", tpm), ("concurrency", concurrency)):
        if text is not None:
            given[limit] = None if text == NONE else _count(limit, text)
    if budget is not None:
        given["budget"] = None if budget == NONE else amount(budget)
    if admin is not None:
        given["admin"] = admin
    return cast(Limits, given)


def _count(limit: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise KeysError(f"{limit} must be a whole number above 0, or {NONE}, not {text!r}")
    return int(text)


def _found(keys: Keys, word: str) -> Key:
    """By its id, or by its name where one key alone bears it."""
    found = [key for key in keys.list() if word in (key.id, key.name)]
    exact = [key for key in found if key.id == word] or found
    if len(exact) > 1:
        raise KeysError(f"{len(exact)} keys are called {word!r}: give the id of one")
    return exact[0] if exact else keys.get(word)


def _described(key: Key) -> list[str]:
    limits = {"a minute": key.rpm, "tokens a minute": key.tpm, "at once": key.concurrency}
    return [
        *(key.id, key.name, key.account, key.prefix),
        "all" if key.models is None else ", ".join(key.models),
        ", ".join(f"{limit:,} {what}" for what, limit in limits.items() if limit) or "none",
        told(key.spent),
        "none" if key.budget is None else told(key.budget),
        "revoked" if key.revoked else "admin" if key.admin else "",
    ]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show(table: Table, empty: str) -> None:
    if table.row_count:
        Console(highlight=False).print(table)
    else:
        _note(empty)


def _note(text: str) -> None:
    Console(stderr=True, highlight=False).print(escape(text), soft_wrap=True)
