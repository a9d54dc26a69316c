"""Lists of conversations: the latest ones, and those in which words are found.

Search goes through an index of all three-letter pieces (FTS5's trigrams), which needs no words and
so finds Chinese as well as English; for less than three letters there is no piece, and the texts
themselves are looked through. What a person types is never read as FTS5's language, nor as LIKE's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

SNIPPET = 160  # characters
MOST_WORDS = 8  # looked for at once
PIECE = 3  # characters that the index knows


def words_of(query: str) -> list[str]:
    """What is looked for."""
    printable = "".join(char if char.isprintable() else " " for char in query)
    return printable.split()[:MOST_WORDS]


def latest(
    connection: sqlite3.Connection, owner: str, limit: int, before: float | None
) -> list[dict[str, Any]]:
    """Each with the beginning of its last message."""
    rows = connection.execute(
        f"SELECT c.id, c.title, c.updated, c.model, substr(m.content, 1, {SNIPPET}) AS snippet "
        "FROM conversations c LEFT JOIN messages m ON m.id = c.leaf "
        "WHERE c.owner = ? AND c.updated < ? ORDER BY c.updated DESC LIMIT ?",
        (owner, _before(before), limit),
    )
    return [_listed(row) for row in rows]


def search(
    connection: sqlite3.Connection,
    owner: str,
    words: Sequence[str],
    limit: int,
    before: float | None,
) -> list[dict[str, Any]]:
    """Those with all words in one message or in the title; each with the first one's place."""
    likes = {f"like{i}": _like(word) for i, word in enumerate(words)}
    in_text = [
        f"m.content LIKE :like{i} ESCAPE '\\'" for i, word in enumerate(words) if len(word) < PIECE
    ]
    pieces = " AND ".join(_quoted(word) for word in words if len(word) >= PIECE)
    if pieces:
        in_text.append(
            "m.number IN (SELECT rowid FROM message_words WHERE message_words MATCH :pieces)"
        )
    in_title = [f"c.title LIKE :like{i} ESCAPE '\\'" for i in range(len(words))]
    place = "max(1, instr(lower(m.content), lower(:first)) - 40)"
    rows = connection.execute(
        "WITH found AS (SELECT m.conversation AS id, max(m.number) AS number "
        "FROM messages m JOIN conversations c ON c.id = m.conversation "
        f"WHERE c.owner = :owner AND {' AND '.join(in_text)} GROUP BY m.conversation) "
        "SELECT c.id, c.title, c.updated, c.model, "
        f"substr(m.content, {place}, {SNIPPET}) AS snippet "
        "FROM conversations c LEFT JOIN found f ON f.id = c.id "
        "LEFT JOIN messages m ON m.number = f.number "
        "WHERE c.owner = :owner AND c.updated < :before "
        f"AND (f.id IS NOT NULL OR ({' AND '.join(in_title)})) "
        "ORDER BY c.updated DESC LIMIT :limit",
        likes
        | {
            "owner": owner,
            "pieces": pieces,
            "first": words[0],
            "before": _before(before),
            "limit": limit,
        },
    )
    return [_listed(row) for row in rows]


def _listed(row: sqlite3.Row) -> dict[str, Any]:
    return dict(row) | {"snippet": " ".join((row["snippet"] or "").split())}


def _before(moment: float | None) -> float:
    return 1e18 if moment is None else moment


def _quoted(word: str) -> str:
    """A string of FTS5's language, in which nothing is an operator."""
    doubled = word.replace('"', '""')
    return f'"{doubled}"'


def _like(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"
