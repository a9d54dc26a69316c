"""A server under load: many streams, clients that leave, and what the HTTP layer costs.

    .venv/bin/python benchmarks/server_load.py runs/quickstart               # ten minutes
    .venv/bin/python benchmarks/server_load.py runs/quickstart --seconds 60

Two parts, each with a real server process of its own or none:

    load      64 streams at a time from as many clients with their own keys; a fifth of the clients
              hang up after a random number of tokens. No error may come, the ledger must sum to
              zero with nothing left reserved, what whole streams were told must be booked, and the
              server's memory may not grow by more than 5% after the first fifth of the time.
    overhead  the same questions without hanging up, through HTTP and straight to the engine in a
              process of its own, in turn; tokens a second of both, the medians of the rounds.

Clients run in this process, on the same machine: their work is part of what HTTP costs here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qiusuo.server.database import Database
from qiusuo.server.keys import Keys
from qiusuo.server.ledger import Ledger
from qiusuo.server.money import amount
from qiusuo.server.prices import Price, PriceBook

MODEL = "model"
OPENINGS = ("春风", "明月", "It is a truth", "话说天下大势", "山中", "Mr. Darcy", "夜雨", "The")


@dataclass
class Told:
    """What the clients saw."""

    streams: int = 0
    hung_up: int = 0
    tokens: int = 0
    billed: int = 0  # completion tokens in the usage of whole streams
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-seconds", type=float, default=20)
    parser.add_argument("--skip", choices=("load", "overhead"))
    parser.add_argument("--bare", type=float, help=argparse.SUPPRESS)  # the engine alone
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(options.model, options.bare, options.streams)))
        return
    failed = False
    if options.skip != "load":
        failed = load(options.model, options.seconds, options.streams)
    if options.skip != "overhead":
        overhead(options)
    if failed:
        raise SystemExit("the server did not hold")


# -- load -----------------------------------------------------------------------------------


def load(model: str, seconds: float, streams: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder, "server.sqlite3")
        secrets = prepare(database, streams)
        server, port = start(model, database)
        try:
            memory = Memory(server.pid)
            told = asyncio.run(drive(port, secrets, seconds, 0.2, memory))
        finally:
            server.terminate()
            server.wait()
        return judge(told, memory, database, seconds)


def prepare(path: Path, count: int) -> list[str]:
    database = Database(path)
    keys, ledger = Keys(database), Ledger(database)
    PriceBook(database).set(MODEL, Price(hit=20, miss=1000, output=4000))
    secrets = []
    for place in range(count):
        _, secret = keys.make(f"client-{place}", account=f"client-{place}")
        ledger.top_up(f"client-{place}", amount("1000"), token=f"start-{place}")
        secrets.append(secret)
    database.close()
    return secrets


def start(model: str, database: Path) -> tuple[subprocess.Popen[str], int]:
    words = f"-m qiusuo serve {model} --name {MODEL} --port 0 --database {database}".split()
    server = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    port = None
    assert server.stderr is not None
    for line in server.stderr:
        found = re.search(r"http://localhost:(\d+)", line)
        port = int(found[1]) if found else port
        if "is ready" in line and port is not None:
            return server, port
    raise SystemExit("the server did not start")


class Memory:
    """Resident bytes of a process, looked at now and then."""

    def __init__(self, process: int) -> None:
        self.process, self.seen = process, list[tuple[float, int]]()
        self.began = time.monotonic()

    async def watch(self) -> None:
        while True:
            words = Path(f"/proc/{self.process}/statm").read_text(encoding="ascii").split()
            self.seen.append((time.monotonic() - self.began, int(words[1]) * 4096))
            await asyncio.sleep(1)

    def growth(self, seconds: float) -> float:
        """Between what it was after a fifth of the time and what it is at the end."""
        later = [size for when, size in self.seen if when >= seconds / 5]
        tenth = max(1, len(later) // 10)
        return statistics.median(later[-tenth:]) / statistics.median(later[:tenth]) - 1


async def drive(
    port: int, secrets: list[str], seconds: float, leaving: float, memory: Memory | None = None
) -> Told:
    told = Told()
    until = time.monotonic() + seconds
    watching = None if memory is None else asyncio.create_task(memory.watch())
    await asyncio.gather(
        *(client(port, secret, i, until, leaving, told) for i, secret in enumerate(secrets))
    )
    if watching is not None:
        watching.cancel()
    return told


async def client(
    port: int, secret: str, number: int, until: float, leaving: float, told: Told
) -> None:
    chance = random.Random(number)
    while time.monotonic() < until:
        body = question(chance)
        leave_after = chance.randrange(1, 64) if chance.random() < leaving else None
        try:
            await stream(port, secret, body, leave_after, told)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            told.errors.append(f"{type(error).__name__}: {error}")


def question(chance: random.Random) -> dict[str, object]:
    return {
        "model": MODEL,
        "prompt": "".join(chance.choices(OPENINGS, k=chance.randrange(1, 24))),
        "max_tokens": chance.randrange(16, 129),
        "temperature": 0.8,
        "seed": chance.randrange(1 << 31),
    }


async def stream(
    port: int, secret: str, body: dict[str, object], leave_after: int | None, told: Told
) -> None:
    """One answer over a connection of its own, read as it comes."""
    content = json.dumps(body | {"stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n"
        f"Authorization: Bearer {secret}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    began = last = time.monotonic()
    pieces = 0
    usage: dict[str, int] | None = None
    try:
        writer.write(head.encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            told.errors.append((status + await reader.read(2000)).decode(errors="replace"))
            return
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            now = time.monotonic()
            if line.startswith(b"data: [DONE]"):
                break
            if b'"error"' in line:
                told.errors.append(line.decode())
                return
            if b'"usage":{' in line or b'"usage": {' in line:
                usage = json.loads(line[6:])["usage"]
            (told.between if pieces else told.first).append(now - (last if pieces else began))
            last = now
            pieces += 1
            if pieces == leave_after:
                told.hung_up += 1
                return
        else:
            told.errors.append("the stream ended without [DONE]")
            return
        told.streams += 1
        if usage is None:
            told.errors.append("a whole stream without its usage")
        else:
            told.billed += usage["completion_tokens"]
    finally:
        writer.close()


def judge(told: Told, memory: Memory, path: Path, seconds: float) -> bool:
    database = Database(path)
    ledger = Ledger(database)
    ledger.check()
    with database.read() as rows:
        (postings,) = rows.execute("SELECT COALESCE(SUM(amount), 0) FROM postings").fetchone()
        count, output = rows.execute("SELECT COUNT(*), SUM(output) FROM usage").fetchone()
        (spent,) = rows.execute("SELECT COALESCE(SUM(amount), 0) FROM usage").fetchone()
    reserved = sum(account.balance.reserved for account in ledger.accounts())
    growth = memory.growth(seconds)
    print(f"streams that ended   {told.streams:,}; hung up {told.hung_up:,}")
    print(f"requests booked      {count:,}, {output:,} tokens, {spent:,} nano-units")
    print(f"postings sum to      {postings}, reserved still {reserved}")
    print(f"errors               {len(told.errors)} {told.errors[:3]}")
    print(f"memory               {memory.seen[-1][1] / 1e6:,.0f} MB, {growth:+.1%} over the run")
    for name, times in (("to first token", told.first), ("between tokens", told.between)):
        cuts = statistics.quantiles(times, n=100)
        print(f"time {name}  p50 {cuts[49] * 1e3:,.1f} ms, p99 {cuts[98] * 1e3:,.1f} ms")
    return bool(told.errors or postings or reserved or growth > 0.05 or output < told.billed)


# -- overhead -------------------------------------------------------------------------------


def overhead(options: argparse.Namespace) -> None:
    """Both do the same questions of the same clients in the same order."""
    through: list[float] = []
    straight: list[float] = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder, "server.sqlite3")
            secrets = prepare(database, options.streams)
            server, port = start(options.model, database)
            try:
                began = time.monotonic()
                told = asyncio.run(drive(port, secrets, options.round_seconds, 0.0))
                through.append(told.billed / (time.monotonic() - began))
            finally:
                server.terminate()
                server.wait()
        alone = [sys.executable, __file__, options.model, "--bare", str(options.round_seconds)]
        said = subprocess.run(alone, check=True, capture_output=True, text=True).stdout
        straight.append(json.loads(said.splitlines()[-1]))
    http, engine = statistics.median(through), statistics.median(straight)
    print(f"tokens a second      {http:,.0f} through HTTP, {engine:,.0f} of the engine alone")
    print(f"the HTTP layer costs {1 - http / engine:.1%} (clients on the same machine)")


def bare(model: str, seconds: float, streams: int) -> float:
    """Tokens a second of the same questions, straight to the running engine."""
    import qiusuo
    from qiusuo.engine.running import RunningEngine

    async def ask(engine: RunningEngine, number: int, until: float) -> int:
        chance, made = random.Random(number), 0
        while time.monotonic() < until:
            body = question(chance)
            chance.random()  # as a client that might leave
            options: dict[str, Any] = {
                name: body[name] for name in ("max_tokens", "temperature", "seed")
            }
            [answer] = await engine.complete(str(body["prompt"]), **options)
            async for _ in answer:
                pass
            made += (await answer.message()).usage.completion_tokens
        return made

    async def run() -> float:
        async with RunningEngine(qiusuo.load(model)) as engine:
            began = time.monotonic()
            made = await asyncio.gather(*(ask(engine, i, began + seconds) for i in range(streams)))
            return sum(made) / (time.monotonic() - began)

    return asyncio.run(run())


if __name__ == "__main__":
    main()
