"""The tables of keys, prices, ledger and usage, with the rules that the database itself keeps.

Whatever program writes: postings, transactions and usage are only ever added to, postings go to the
newest transaction alone, and a transaction whose postings do not sum to zero cannot be committed.
SQLite has no deferred triggers, but it has deferred foreign keys: a transaction out of balance has
a row in ``unbalanced`` which refers to a table that is always empty.

Amounts are nano-units, moments milliseconds since 1970 in UTC.
"""

from __future__ import annotations

from qiusuo.server.database import Schema


def _append_only(table: str) -> str:
    return "".join(
        f"""
CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} BEGIN
    SELECT RAISE(ABORT, '{table} is only ever added to: write an entry that corrects');
END;"""
        for change in ("UPDATE", "DELETE")
    )


_FIRST = f"""
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE accounts (
    name TEXT PRIMARY KEY,
    open INTEGER NOT NULL CHECK (open IN (0, 1)),  -- may go below zero: needs no prepaid balance
    created INTEGER NOT NULL
) STRICT;

CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    account TEXT NOT NULL REFERENCES accounts,
    hash TEXT NOT NULL UNIQUE,
    prefix TEXT NOT NULL,
    models TEXT,  -- a JSON list; null: all
    rpm INTEGER,
    tpm INTEGER,
    concurrency INTEGER,
    budget INTEGER,
    admin INTEGER NOT NULL CHECK (admin IN (0, 1)),
    created INTEGER NOT NULL,
    revoked INTEGER,
    spent INTEGER NOT NULL DEFAULT 0,
    reserved INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE prices (
    id INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    hit INTEGER NOT NULL CHECK (hit >= 0),
    miss INTEGER NOT NULL CHECK (miss >= 0),
    output INTEGER NOT NULL CHECK (output >= 0),
    windows TEXT NOT NULL,
    holds_from INTEGER NOT NULL,
    made INTEGER NOT NULL
) STRICT;
CREATE INDEX prices_in_force ON prices (model, holds_from, id);

CREATE TABLE reservations (
    request TEXT PRIMARY KEY,
    account TEXT NOT NULL REFERENCES accounts,
    key TEXT REFERENCES keys,
    model TEXT NOT NULL,
    granted INTEGER NOT NULL CHECK (granted >= 0),      -- what was taken from which balance
    topped_up INTEGER NOT NULL CHECK (topped_up >= 0),
    hit INTEGER NOT NULL,                               -- the price agreed upon
    miss INTEGER NOT NULL,
    output INTEGER NOT NULL,
    price INTEGER REFERENCES prices,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'settled', 'refunded')),
    owner TEXT NOT NULL,
    created INTEGER NOT NULL
) STRICT;
CREATE INDEX reservations_open ON reservations (owner) WHERE state = 'reserved';
CREATE TRIGGER reservations_final BEFORE UPDATE ON reservations
WHEN OLD.state <> 'reserved' OR NEW.request <> OLD.request BEGIN
    SELECT RAISE(ABORT, 'a settled or refunded reservation does not change');
END;
CREATE TRIGGER reservations_kept BEFORE DELETE ON reservations BEGIN
    SELECT RAISE(ABORT, 'reservations are kept');
END;

CREATE TABLE transactions (
    id INTEGER PRIMARY KEY,
    made INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('top up', 'take back', 'reserve', 'settle', 'refund')),
    request TEXT REFERENCES reservations,
    token TEXT UNIQUE,
    note TEXT NOT NULL,
    UNIQUE (request, kind)
) STRICT;

CREATE TABLE postings (
    entry INTEGER NOT NULL REFERENCES transactions,
    account TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount <> 0),
    PRIMARY KEY (entry, account)
) STRICT, WITHOUT ROWID;

CREATE TABLE balances (account TEXT PRIMARY KEY, amount INTEGER NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE never (value INTEGER PRIMARY KEY) STRICT;
CREATE TRIGGER never_stays_empty BEFORE INSERT ON never BEGIN
    SELECT RAISE(ABORT, 'this table is always empty');
END;
CREATE TABLE unbalanced (
    entry INTEGER PRIMARY KEY,
    remainder INTEGER NOT NULL REFERENCES never DEFERRABLE INITIALLY DEFERRED
) STRICT;

CREATE TRIGGER postings_to_the_newest BEFORE INSERT ON postings
WHEN NEW.entry <> (SELECT max(id) FROM transactions) BEGIN
    SELECT RAISE(ABORT, 'postings is only ever added to: that transaction is complete');
END;
CREATE TRIGGER postings_count AFTER INSERT ON postings BEGIN
    INSERT INTO balances VALUES (NEW.account, NEW.amount)
        ON CONFLICT (account) DO UPDATE SET amount = amount + excluded.amount;
    INSERT INTO unbalanced VALUES (NEW.entry, NEW.amount)
        ON CONFLICT (entry) DO UPDATE SET remainder = remainder + excluded.remainder;
    DELETE FROM unbalanced WHERE entry = NEW.entry AND remainder = 0;
END;

CREATE TABLE usage (
    request TEXT PRIMARY KEY REFERENCES reservations,
    key TEXT REFERENCES keys,
    account TEXT NOT NULL REFERENCES accounts,
    model TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    hit INTEGER NOT NULL CHECK (hit >= 0),
    miss INTEGER NOT NULL CHECK (miss >= 0),
    output INTEGER NOT NULL CHECK (output >= 0),
    reasoning INTEGER NOT NULL CHECK (reasoning >= 0),
    amount INTEGER NOT NULL CHECK (amount >= 0),
    started INTEGER NOT NULL,
    seconds REAL NOT NULL,
    finish TEXT NOT NULL
) STRICT;
CREATE INDEX usage_started ON usage (started);
{"".join(map(_append_only, ("postings", "transactions", "usage", "prices")))}

INSERT INTO accounts VALUES ('local', 1, 0);
"""

LEDGER = Schema("ledger", (_FIRST,))
