"""One SQLite file that several threads and processes write to, and that survives a kill.

Write-ahead logging lets readers go on while one writes; ``synchronous=FULL`` has a commit on the
disk before it counts. A writing transaction takes its place at once (BEGIN IMMEDIATE): what it
reads cannot change before it writes, which is all that "never overspent" needs.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qiusuo.data.errors import DataError

APPLICATION = 0x71697573  # "qius", in the file's header
OLDEST_SQLITE = (3, 38, 0)  # strict tables, and JSON always
BUSY_SECONDS = 30.0  # how long a writer waits for those before it
KEPT_READERS = 8  # connections that wait for the next reader


class DatabaseError(DataError):
    """A database that cannot be used as it is; the message names the file and the remedy."""


@dataclass(frozen=True)
class Schema:
    """Tables of one subject: ``migrations[0]`` makes version 1, and each one after makes the next.
    What was released is never edited, only added to."""

    name: str
    migrations: tuple[str, ...]


class Database:
    """An open file, made if need be; whoever needs tables in it calls ``migrate``. Use from any
    thread; not across a fork. Raises DatabaseError."""

    def __init__(self, path: str | Path) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise DatabaseError(
                f"this Python has SQLite {sqlite3.sqlite_version}, and 3.38 is the oldest that "
                "will do: use a newer Python"
            )
        self.path = Path(path).resolve()  # one name, for the files beside it too
        self._writing = threading.RLock()
        self._readers: list[sqlite3.Connection] = []  # those that nobody uses now
        self._migrated: set[Schema] = set()
        self._closed = False
        _create(self.path)
        self._writer = self._connect()
        try:
            self._set_up()
        except BaseException:
            self._writer.close()
            raise

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer stands beside: committed at the end, undone by an
        exception. Not to be nested. ``durable=False`` does not wait for the disk (milliseconds): a
        kill loses nothing even so, a power cut what came after the last durable one."""
        with self._writing:
            self._refuse_closed()
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # a full disk may have rolled it back by itself
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One state of the whole file for as many queries as are made; never waits for writers."""
        self._refuse_closed()
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = self._connect()
            connection.execute("PRAGMA query_only = ON")
        try:
            connection.execute("BEGIN")
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if self._closed or len(self._readers) >= KEPT_READERS:
                connection.close()
            else:
                self._readers.append(connection)

    def migrate(self, schema: Schema) -> None:
        """Bring the tables of a subject up to date, all or nothing; again does nothing."""
        if schema in self._migrated:
            return
        known = len(schema.migrations)
        with self.write(durable=False) as connection:
            row = connection.execute(
                "SELECT version FROM schemas WHERE name = ?", (schema.name,)
            ).fetchone()
            version = 0 if row is None else row["version"]
            if version > known:
                raise DatabaseError(
                    f"{self.path}: its tables {schema.name!r} are of version {version}, and this "
                    f"qiusuo knows {known} at most: install the newer qiusuo that wrote them"
                )
            for migration in schema.migrations[version:]:
                for statement in _statements(migration):
                    connection.execute(statement)
            connection.execute(
                "INSERT INTO schemas VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET version = excluded.version",
                (schema.name, known),
            )
        self._migrated.add(schema)

    def close(self) -> None:
        """Close what is open; again does nothing."""
        with self._writing:
            self._closed = True
            while self._readers:
                with suppress(IndexError):
                    self._readers.pop().close()
            self._writer.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise DatabaseError(f"{self.path} was closed")

    def _connect(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise DatabaseError(f"{self.path} cannot be opened: {error}") from error
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA recursive_triggers = ON")  # or INSERT OR REPLACE deletes unseen
        return connection

    def _set_up(self) -> None:
        """Refuse another program's file, and turn on the write-ahead log."""
        try:
            self._writer.execute("BEGIN")  # another server may be making it: both before, or after
            mark = self._writer.execute("PRAGMA application_id").fetchone()[0]
            empty = self._writer.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
            self._writer.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise DatabaseError(f"{self.path} is no usable SQLite database: {error}") from error
        if mark != APPLICATION and not empty:
            raise DatabaseError(f"{self.path} is another program's database: name another file")
        self._turn_on_log()
        with self.write(durable=False) as connection:
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS schemas "
                "(name TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT"
            )

    def _turn_on_log(self) -> None:
        """Two processes that do this at once do not wait for each other as they do elsewhere."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                mode = self._writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise DatabaseError(
                f"{self.path} stands on a disk without a write-ahead log (a network folder?): "
                "name a file on a local disk"
            )


def milliseconds(moment: datetime) -> int:
    """How a moment is stored: milliseconds since 1970 in UTC. ValueError without a timezone."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment} has no timezone, so it is no moment: give it one")
    return round(moment.timestamp() * 1000)


def moment(milliseconds: int) -> datetime:
    """A stored moment, in UTC."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def now() -> datetime:
    """The clock where none is given."""
    return datetime.now(UTC)


def _create(path: Path) -> None:
    """For the owner's eyes alone; SQLite gives its log the same rights."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise DatabaseError(f"{path} cannot be written: {error.strerror}") from error


def _statements(script: str) -> Iterator[str]:
    """``executescript`` would commit on the way."""
    statement = ""
    for line in script.strip().splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        raise ValueError(f"a migration ends within a statement: {statement.strip()[:80]}")
