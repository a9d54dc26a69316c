"""Conversations kept on the server: trees of messages, each seen by its owner alone.

An edit or a second answer is a sibling: nothing is overwritten, and ``leaf`` says which branch is
shown. The index beside the messages is for finding.py.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from qiusuo.server.api.errors import ApiError
from qiusuo.server.database import Database, Schema
from qiusuo.server.page import finding

MOST_CONVERSATIONS = 10_000  # of an owner
MOST_MESSAGES = 4096  # of a conversation
MOST_BYTES = 256 << 20  # of all that an owner keeps

_FIRST = """
CREATE TABLE conversations (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    title TEXT NOT NULL,
    model TEXT,
    system TEXT NOT NULL,
    settings TEXT NOT NULL,   -- JSON
    leaf TEXT,                -- the message at which the branch shown ends
    size INTEGER NOT NULL,    -- bytes of its messages
    created REAL NOT NULL,    -- seconds since 1970
    updated REAL NOT NULL
) STRICT;
CREATE INDEX conversations_latest ON conversations (owner, updated);

CREATE TABLE messages (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE,
    parent TEXT REFERENCES messages (id),  -- no cascade: SQLite nests one a thousand times at most
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    rest TEXT NOT NULL,       -- JSON: thought, usage, cost, attachments ...
    created REAL NOT NULL
) STRICT;
CREATE INDEX messages_of ON messages (conversation);
CREATE INDEX messages_below ON messages (parent);

CREATE VIRTUAL TABLE message_words USING fts5(
    content, content = 'messages', content_rowid = 'number', tokenize = 'trigram'
);
CREATE TRIGGER messages_found AFTER INSERT ON messages BEGIN
    INSERT INTO message_words (rowid, content) VALUES (NEW.number, NEW.content);
END;
CREATE TRIGGER messages_lost AFTER DELETE ON messages BEGIN
    INSERT INTO message_words (message_words, rowid, content)
        VALUES ('delete', OLD.number, OLD.content);
END;
CREATE TRIGGER messages_changed AFTER UPDATE OF content ON messages BEGIN
    INSERT INTO message_words (message_words, rowid, content)
        VALUES ('delete', OLD.number, OLD.content);
    INSERT INTO message_words (rowid, content) VALUES (NEW.number, NEW.content);
END;
"""

CONVERSATIONS = Schema("conversations", (_FIRST,))


class Conversations:
    """In a database, whose tables it makes. Use from any thread. Every call names the owner, and
    finds nothing of another's: ApiError 404. ApiError 400 above a bound. A kill loses nothing; a
    power cut may take the last moments, for which no growing answer waits on the disk."""

    def __init__(self, database: Database) -> None:
        self._database = database
        database.migrate(CONVERSATIONS)
        self._clock = threading.Lock()
        self._last = 0.0

    # -- conversations ------------------------------------------------------------------------

    def create(
        self, owner: str, title: str, model: str | None, system: str, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        now, name = self._now(), uuid.uuid4().hex
        with self._database.write(durable=False) as connection:
            [count] = connection.execute(
                "SELECT count(*) FROM conversations WHERE owner = ?", (owner,)
            ).fetchone()
            if count >= MOST_CONVERSATIONS:
                raise ApiError(400, f"{count:,} conversations are kept already: delete some")
            connection.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, NULL, 0, ?, ?)",
                (name, owner, title, model, system, json.dumps(settings), now, now),
            )
            return _told(_conversation(connection, owner, name)) | {"messages": []}

    def get(self, owner: str, name: str) -> dict[str, Any]:
        """A conversation with all its messages, in the order in which they came."""
        with self._database.read() as connection:
            found = _told(_conversation(connection, owner, name))
            rows = connection.execute(
                "SELECT * FROM messages WHERE conversation = ? ORDER BY number", (name,)
            )
            return found | {"messages": [_message(row) for row in rows]}

    def change(self, owner: str, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Set some of title, model, system, settings and leaf."""
        values = dict(changes)
        with self._database.write(durable=False) as connection:
            _conversation(connection, owner, name)
            if values.get("leaf") is not None:
                _known_message(connection, name, values["leaf"])
            if "settings" in values:
                values["settings"] = json.dumps(values["settings"] or {})
            if "system" in values:
                values["system"] = values["system"] or ""
            for column in ("title", "model", "system", "settings", "leaf"):
                if column in values:
                    connection.execute(
                        f"UPDATE conversations SET {column} = ? WHERE id = ?",
                        (values[column], name),
                    )
            if set(values) - {"leaf"}:  # looking at another branch is no change
                self._touch(connection, name, 0)
            return _told(_conversation(connection, owner, name))

    def hand_over(self, owner: str, heir: str) -> None:
        """All of one owner's become another's."""
        with self._database.write() as connection:
            connection.execute("UPDATE conversations SET owner = ? WHERE owner = ?", (heir, owner))

    def delete(self, owner: str, name: str) -> None:
        """With all its messages."""
        with self._database.write(durable=False) as connection:
            _conversation(connection, owner, name)
            connection.execute("DELETE FROM conversations WHERE id = ?", (name,))

    # -- messages -----------------------------------------------------------------------------

    def add(self, owner: str, name: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """Put a message below ``parent``; it becomes the leaf. The first question gives a
        conversation without a title its own."""
        rest = dict(message)
        parent, role, content = rest.pop("parent"), rest.pop("role"), rest.pop("content")
        told = json.dumps(rest)
        made = uuid.uuid4().hex
        with self._database.write(durable=False) as connection:
            conversation = _conversation(connection, owner, name)
            [count] = connection.execute(
                "SELECT count(*) FROM messages WHERE conversation = ?", (name,)
            ).fetchone()
            if count >= MOST_MESSAGES:
                raise ApiError(400, f"this conversation has {count:,} messages: begin a new one")
            if parent is not None:
                _known_message(connection, name, parent)
            size = len(content.encode()) + len(told)
            _check_room(connection, owner, size)
            connection.execute(
                "INSERT INTO messages (id, conversation, parent, role, content, rest, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (made, name, parent, role, content, told, self._now()),
            )
            title = conversation["title"]
            if not title and role == "user":
                title = _title(content)
            connection.execute(
                "UPDATE conversations SET leaf = ?, title = ? WHERE id = ?", (made, title, name)
            )
            self._touch(connection, name, size)
            return _message(_known_message(connection, name, made))

    def amend(
        self, owner: str, name: str, message: str, changes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Change some fields of a message, as an answer grows or is stopped."""
        rest = dict(changes)
        with self._database.write(durable=False) as connection:
            _conversation(connection, owner, name)
            row = _known_message(connection, name, message)
            content = rest.pop("content", row["content"])
            told = json.dumps(json.loads(row["rest"]) | rest)
            before = len(row["content"].encode()) + len(row["rest"])
            size = len(content.encode()) + len(told) - before
            _check_room(connection, owner, size)
            connection.execute(
                "UPDATE messages SET content = ?, rest = ? WHERE number = ?",
                (content, told, row["number"]),
            )
            self._touch(connection, name, size)
            return _message(_known_message(connection, name, message))

    # -- looking for them -----------------------------------------------------------------------

    def latest(self, owner: str, limit: int, before: float | None = None) -> list[dict[str, Any]]:
        """Those last changed, before a moment if one is given (the ``updated`` of an earlier list),
        each with the beginning of its last message."""
        with self._database.read() as connection:
            return finding.latest(connection, owner, limit, before)

    def search(
        self, owner: str, query: str, limit: int, before: float | None = None
    ) -> list[dict[str, Any]]:
        """Conversations of which one message, or the title, has all words of ``query``; each with
        the place where the first of them stands."""
        words = finding.words_of(query)
        with self._database.read() as connection:
            if not words:
                return finding.latest(connection, owner, limit, before)
            return finding.search(connection, owner, words, limit, before)

    # -- inside -----------------------------------------------------------------------------

    def _now(self) -> float:
        """Microseconds apart, so that ``before`` neither loses one nor shows it twice."""
        with self._clock:
            self._last = max(round(time.time(), 6), round(self._last + 1e-6, 6))
            return self._last

    def _touch(self, connection: sqlite3.Connection, name: str, size: int) -> None:
        connection.execute(
            "UPDATE conversations SET updated = ?, size = size + ? WHERE id = ?",
            (self._now(), size, name),
        )


def _conversation(connection: sqlite3.Connection, owner: str, name: str) -> sqlite3.Row:
    row = connection.execute(
        "SELECT * FROM conversations WHERE id = ? AND owner = ?", (name, owner)
    ).fetchone()
    if row is None:
        raise ApiError(404, f"there is no conversation {name[:80]!r}")
    return row


def _known_message(connection: sqlite3.Connection, conversation: str, name: str) -> sqlite3.Row:
    row = connection.execute(
        "SELECT * FROM messages WHERE id = ? AND conversation = ?", (name, conversation)
    ).fetchone()
    if row is None:
        raise ApiError(404, f"there is no message {name[:80]!r} in this conversation")
    return row


def _check_room(connection: sqlite3.Connection, owner: str, size: int) -> None:
    [kept] = connection.execute(
        "SELECT total(size) FROM conversations WHERE owner = ?", (owner,)
    ).fetchone()
    if size > 0 and kept + size > MOST_BYTES:
        raise ApiError(400, f"conversations may hold {MOST_BYTES:,} bytes in all: delete some")


def _told(row: sqlite3.Row) -> dict[str, Any]:
    names = ("id", "title", "model", "system", "leaf", "created", "updated")
    return {name: row[name] for name in names} | {"settings": json.loads(row["settings"])}


def _message(row: sqlite3.Row) -> dict[str, Any]:
    names = ("id", "parent", "role", "content", "created")
    return {name: row[name] for name in names} | json.loads(row["rest"])


def _title(question: str) -> str:
    return " ".join(question.split())[:60]
