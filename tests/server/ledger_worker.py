"""Other processes that use a ledger, and die. Run as ``python -m tests.server.ledger_worker``.

spend DB COUNT          reserve and settle COUNT requests; a line for each that is settled
grab DB COUNT           wait for a line, then try to reserve COUNT times; the number that could
hold DB                 reserve one, say so, and wait
die DB STEP REQUEST AT  take one step of a request, and kill this process before its AT-th
                        statement
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from qiusuo.server.database import Database
from qiusuo.server.keys import Keys
from qiusuo.server.ledger import InsufficientBalance, Ledger, OverBudget, Used
from qiusuo.server.prices import Price

PRICE = Price(20, 1000, 4000)
USED = Used("m", hit=100, miss=900, output=50, finish="stop", endpoint="chat")
COST = 100 * 20 + 900 * 1000 + 50 * 4000
MOST = 1000 * 1000 + 100 * 4000
GRAB = 7


def say(line: object) -> None:
    os.write(1, f"{line}\n".encode())


def spend(ledger: Ledger, database: Database, count: str) -> None:
    key = Keys(database).list()[0]
    for number in range(int(count)):
        request = f"{os.getpid()}-{number}"
        ledger.reserve(request, key, "main", "m", MOST, PRICE)
        ledger.settle(request, USED)
        say(request)


def grab(ledger: Ledger, database: Database, count: str) -> None:
    key, got = Keys(database).list()[0], 0
    say("ready")
    sys.stdin.readline()
    for number in range(int(count)):
        try:
            ledger.reserve(f"{os.getpid()}-{number}", key, "main", "m", GRAB, PRICE)
            got += 1
        except (InsufficientBalance, OverBudget):
            pass
    say(got)
    sys.stdin.readline()  # alive, so that what it holds is not another's to release


def hold(ledger: Ledger, database: Database) -> None:
    ledger.reserve("held", None, "main", "m", MOST, PRICE)
    say("held")
    sys.stdin.readline()


def die(ledger: Ledger, database: Database, step: str, request: str, at: str) -> None:
    key = Keys(database).list()[0]
    steps: dict[str, Callable[[], object]] = {
        "reserve": lambda: ledger.reserve(request, key, "main", "m", MOST, PRICE),
        "settle": lambda: ledger.settle(request, USED),
        "refund": lambda: ledger.refund(request),
        "top up": lambda: ledger.top_up("main", 5, token=request),
    }
    if step in ("settle", "refund"):
        steps["reserve"]()
    left = int(at)

    def count(statement: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    database._writer.set_trace_callback(count)
    steps[step]()


if __name__ == "__main__":
    what, path, *words = sys.argv[1:]
    opened = Database(Path(path))
    {"spend": spend, "grab": grab, "hold": hold, "die": die}[what](Ledger(opened), opened, *words)
