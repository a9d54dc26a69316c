"""The file under it all: versions, other programs' files, what a failure leaves."""

from __future__ import annotations

import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from qiusuo.server.database import Database, DatabaseError, Schema, milliseconds, moment, now

ONE = Schema("things", ("CREATE TABLE things (name TEXT);",))
TWO = Schema("things", (*ONE.migrations, "ALTER TABLE things ADD COLUMN size INTEGER;"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "money.sqlite3"


def names(database: Database) -> list[str]:
    with database.read() as connection:
        return [row["name"] for row in connection.execute("SELECT name FROM things")]


def test_the_file_is_its_owners_and_keeps_a_log(path: Path) -> None:
    database = Database(path)
    database.migrate(ONE)
    with database.write() as connection:
        settings = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys", "recursive_triggers")
        }
    assert settings == {
        "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "recursive_triggers": 1
    }  # fmt: skip
    assert len(list(path.parent.iterdir())) == 3
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    database.close()
    database.close()
    for use in (database.read, database.write):
        with pytest.raises(DatabaseError, match="closed"), use():
            pass


def test_tables_are_brought_up_to_date_with_what_is_in_them(path: Path) -> None:
    old = Database(path)
    old.migrate(ONE)
    with old.write() as connection:
        connection.execute("INSERT INTO things VALUES ('a')")
    new = Database(path)
    for _ in range(2):
        new.migrate(TWO)
    with new.write() as connection:
        connection.execute("INSERT INTO things VALUES ('b', 3)")
    assert names(old) == names(new) == ["a", "b"]
    with pytest.raises(DatabaseError, match=r"money\.sqlite3.*'things'.*version 2.*knows 1"):
        Database(path).migrate(ONE)
    Database(path).migrate(Schema("other things", ("CREATE TABLE others (name TEXT);",)))


def test_a_migration_that_fails_leaves_nothing(path: Path) -> None:
    database = Database(path)
    broken = Schema("things", ("CREATE TABLE things (name TEXT);\nCREATE TABLE things (x TEXT);",))
    with pytest.raises(sqlite3.OperationalError):
        database.migrate(broken)
    database.migrate(ONE)
    assert names(database) == []
    with pytest.raises(ValueError, match="ends within a statement"):
        database.migrate(Schema("more", ("CREATE TABLE more (name TEXT)",)))


def test_what_is_no_database_of_ours_is_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no database, but quite a few letters " * 50)
    foreign = tmp_path / "foreign.sqlite3"
    other = sqlite3.connect(foreign)
    other.execute("CREATE TABLE bookmarks (url TEXT)")
    other.close()
    for path in (text, foreign):
        before = path.read_bytes()
        with pytest.raises(DatabaseError, match=path.name):
            Database(path)
        assert path.read_bytes() == before
    for path in (tmp_path, text / "below", tmp_path / ("x" * 300)):
        with pytest.raises(DatabaseError):
            Database(path)


def test_a_transaction_is_wholly_there_or_not_at_all(path: Path) -> None:
    database = Database(path)
    database.migrate(ONE)

    def fail() -> None:
        with database.write() as connection:
            connection.execute("INSERT INTO things VALUES ('a')")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with database.write() as connection:
        connection.execute("INSERT INTO things VALUES ('b')")
        assert names(database) == []  # a reader sees what is committed
    assert names(database) == ["b"]
    with pytest.raises(sqlite3.OperationalError), database.read() as connection:
        connection.execute("INSERT INTO things VALUES ('c')")
    assert names(database) == ["b"]


def test_a_reader_sees_one_state_throughout(path: Path) -> None:
    database = Database(path)
    database.migrate(ONE)
    with database.read() as reader:
        assert reader.execute("SELECT count(*) FROM things").fetchone()[0] == 0
        with database.write() as connection:
            connection.execute("INSERT INTO things VALUES ('a')")
        assert reader.execute("SELECT count(*) FROM things").fetchone()[0] == 0
    assert names(database) == ["a"]


def test_writers_wait_for_each_other(path: Path) -> None:
    """Of one process and of two connections: what is read and then written is never overtaken."""
    databases = [Database(path), Database(path)]
    databases[0].migrate(Schema("count", ("CREATE TABLE count (n INTEGER);",)))
    with databases[0].write() as connection:
        connection.execute("INSERT INTO count VALUES (0)")

    def add(database: Database) -> None:
        for _ in range(25):
            with database.write(durable=False) as connection:
                n = connection.execute("SELECT n FROM count").fetchone()["n"]
                connection.execute("UPDATE count SET n = ?", (n + 1,))

    threads = [threading.Thread(target=add, args=(databases[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with databases[1].read() as connection:
        assert connection.execute("SELECT n FROM count").fetchone()["n"] == 100


def test_a_moment_needs_a_timezone() -> None:
    at = now().replace(microsecond=123_000)
    assert moment(milliseconds(at)) == at
    with pytest.raises(ValueError, match="timezone"):
        milliseconds(at.replace(tzinfo=None))
