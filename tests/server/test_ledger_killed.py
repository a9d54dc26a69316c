"""Real processes, killed: what was settled stays, what was reserved comes back, all adds up."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qiusuo.server.database import Database
from qiusuo.server.keys import Keys
from qiusuo.server.ledger import Ledger
from qiusuo.server.owners import owners
from qiusuo.server.usage import UsageReports
from tests.server.ledger_worker import COST, GRAB, MOST

ROOT = Path(__file__).parents[2]
PAID = 10**12


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "money.sqlite3")
    ledger = Ledger(database)
    ledger.top_up("main", PAID, token="first")
    Keys(database).make("worker", "main")
    ledger.close()
    yield database
    database.close()


def start(database: Database, what: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.server.ledger_worker", what, database.path, *map(str, words)],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> str:
    """What it had still said; `communicate` would miss what is in the buffer of `readline`."""
    process.kill()
    with process:
        told = process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    return told


@pytest.mark.parametrize("lines", [1, 2, 7, 20, 45])
def test_a_kill_among_many_loses_nothing_settled(database: Database, lines: int) -> None:
    """Wherever the kill falls; two processes at once, one of which goes on."""
    other, victim = start(database, "spend", 40), start(database, "spend", 100_000)
    told = [victim.stdout.readline() for _ in range(lines)]
    told += kill(victim).splitlines()
    others, wrong = other.communicate()
    assert other.returncode == 0, wrong
    told = [line.strip() for line in told]
    ledger = Ledger(database)
    assert ledger.release_stale() <= 1
    ledger.check()
    settled = {row.request for row in UsageReports(database).rows(limit=10**6)}
    assert settled >= {*told, *others.split()}
    assert len(settled) - len(told) - 40 in (0, 1)  # settled, and killed before it said so
    balance = ledger.balance("main")
    assert (balance.reserved, balance.topped_up) == (0, PAID - COST * len(settled))
    assert Keys(database).list()[0].spent == COST * len(settled)
    assert Keys(database).list()[0].reserved == 0
    ledger.close()


@pytest.mark.parametrize(
    ("step", "charge"), [("reserve", 0), ("settle", COST), ("refund", 0), ("top up", -5)]
)
def test_a_kill_before_any_statement(database: Database, step: str, charge: int) -> None:
    """Killed before its first, second, third ... statement, until it has no more: each step is
    wholly there or not at all."""
    ledger, at, died, left = Ledger(database), 0, True, PAID
    while died:
        at += 1
        process = start(database, "die", step, f"request {at}", at)
        wrong = process.communicate()[1]
        died = process.returncode == -signal.SIGKILL
        assert died or process.returncode == 0, wrong
        ledger.check()
        ledger.release_stale()
        ledger.check()
        left -= 0 if died else charge
        balance = ledger.balance("main")
        assert (balance.reserved, balance.topped_up) == (0, left)
    assert at > 5
    ledger.close()


def test_a_living_server_keeps_what_it_has_reserved(database: Database, tmp_path: Path) -> None:
    """Known by whichever name the two call the database."""
    (tmp_path / "link.sqlite3").symlink_to(database.path)
    ledger = Ledger(Database(tmp_path / "link.sqlite3"))
    process = start(database, "hold")
    assert process.stdout.readline() == "held\n"
    assert ledger.release_stale() == 0
    assert ledger.balance("main").reserved == MOST
    kill(process)
    assert len(owners(database.path)) == 2
    assert ledger.release_stale() == 1
    assert ledger.release_stale() == 0
    assert ledger.balance("main").topped_up == PAID
    assert len(owners(database.path)) == 1
    ledger.close()
    assert owners(database.path) == set()


@pytest.mark.parametrize("limit", ["balance", "budget"])
def test_processes_together_do_not_overspend(database: Database, limit: str) -> None:
    keys, ledger = Keys(database), Ledger(database)
    if limit == "budget":
        keys.change(keys.list()[0].id, budget=100)
    else:
        ledger.take_back("main", PAID - 100, token="all but little")
    processes = [start(database, "grab", 20) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    got = sum(int(process.stdout.readline()) for process in processes)
    assert got == 100 // GRAB
    assert ledger.balance("main").reserved == got * GRAB
    assert keys.list()[0].reserved == got * GRAB
    for process in processes:
        process.communicate("end\n")
    assert ledger.release_stale() == got
    ledger.check()
    ledger.close()


def test_servers_that_start_together_make_one_database(tmp_path: Path) -> None:
    """Each makes the tables or finds them made."""
    path = tmp_path / "new.sqlite3"
    program = (
        "import sys; from qiusuo.server.database import Database; "
        "from qiusuo.server.ledger import Ledger; sys.stdin.readline(); "
        "ledger = Ledger(Database(sys.argv[1])); ledger.top_up('main', 1, token=sys.argv[2])"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, path, str(number)],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(4)
    ]  # fmt: skip
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        wrong = process.communicate()[1]
        assert process.returncode == 0, wrong
    ledger = Ledger(Database(path))
    assert ledger.balance("main").total == 4
    ledger.check()
