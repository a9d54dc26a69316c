"""Runs watched live: one look a quarter of a second at each run's files, however many watch.

A reader gets whole lines only, from the byte it has seen; `state` events tell where the run stands.
The file is what is sent, so nothing is queued for a slow reader: it reads on from its own place.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qiusuo.server.api.errors import ApiError
from qiusuo.server.page.growing import Tail
from qiusuo.server.page.runs import Runs

LOOK_SECONDS = 0.25
LOOKS_PER_STATE = 4  # a state is told once a second at most
HEARTBEAT_SECONDS = 15.0
BATCH = 256 << 10  # bytes of lines sent in one piece
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # not kept back by a proxy
HEARTBEAT = b": still here\n\n"


def event(name: str, data: Any, place: str | None = None) -> bytes:
    """One event of a `text/event-stream`; ``data`` is JSON already, or a value."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    head = f"id: {place}\n" if place is not None else ""
    return f"{head}event: {name}\ndata: {text}\n\n".encode()


class Watched:
    """One run that somebody watches. ``state`` is None until the first look, and ``over`` when the
    run is gone or the server ends."""

    def __init__(self, runs: Runs, name: str, ending: Callable[[], bool]) -> None:
        self.runs, self.name, self._ending = runs, name, ending
        self.state: dict[str, Any] | None = None
        self.over = False
        self.readers: set[asyncio.Event] = set()
        self.task = asyncio.create_task(self._look())

    async def _look(self) -> None:
        files, looks = self.runs.logs(self.name), 0
        seen: Any = None
        try:
            while self.readers and not self._ending():
                sizes = [_mark(file) for file in files]
                news = sizes != seen
                if looks % LOOKS_PER_STATE == 0:
                    state = await asyncio.to_thread(self.runs.summary, self.name)
                    news, self.state = news or state != self.state, state
                seen = sizes
                if news:
                    self._tell()
                looks += 1
                await asyncio.sleep(LOOK_SECONDS)
        except (ApiError, OSError):  # the folder was removed
            pass
        finally:
            self.over = True
            self._tell()

    def _tell(self) -> None:
        for reader in self.readers:
            reader.set()


class Watches:
    """Belongs to one event loop. ``ending`` says whether the server is about to end."""

    def __init__(self, runs: Runs, ending: Callable[[], bool]) -> None:
        self.runs, self.ending = runs, ending
        self.watched: dict[str, Watched] = {}

    async def stream(
        self, name: str, after: int | None, samples_after: int | None
    ) -> AsyncIterator[bytes]:
        """Events of a run as they come: `record` for each line of the log from byte ``after`` on,
        and of the samples from ``samples_after`` on (None: from now on); `state`, when it has
        changed; `reset` where the log was rewritten and now comes from its beginning. An event's
        id is both places, "log-samples". Ends with the server, or when nobody reads."""
        files = self.runs.logs(name)
        tails = [
            await asyncio.to_thread(Tail, file, place)
            for file, place in zip(files, (after, samples_after), strict=True)
        ]
        news, told = asyncio.Event(), None
        watched = self._watch(name, news)
        try:
            while True:
                news.clear()  # before looking: what comes meanwhile sets it again
                for tail in tails:
                    while lines := await asyncio.to_thread(tail.chunk, BATCH):
                        yield _records(lines[1], tail, tails)
                if watched.state != told and watched.state is not None:
                    told = watched.state
                    yield event("state", told)
                if watched.over:
                    return
                try:
                    await asyncio.wait_for(news.wait(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield HEARTBEAT
        finally:
            watched.readers.discard(news)

    def _watch(self, name: str, reader: asyncio.Event) -> Watched:
        watched = self.watched.get(name)
        if watched is None or watched.over:
            self._forget_over()
            watched = self.watched[name] = Watched(self.runs, name, self.ending)
        watched.readers.add(reader)
        return watched

    def _forget_over(self) -> None:
        for name in [name for name, one in self.watched.items() if one.over]:
            del self.watched[name]


def _records(lines: bytes, tail: Tail, tails: list[Tail]) -> bytes:
    """The lines as events; the id of the last says where both files have been read to."""
    events = []
    if tail.rewritten:
        tail.rewritten = False
        events.append(event("reset", {}))
    for line in lines.splitlines():
        if line.startswith(b"{") and line.endswith(b"}"):
            events.append(b"event: record\ndata: " + line + b"\n\n")
    if events:
        place = "-".join(str(one.end) for one in tails)
        events[-1] = f"id: {place}\n".encode() + events[-1]
    return b"".join(events)


def _mark(file: Path) -> tuple[int, int, int]:
    with suppress(OSError):
        status = file.stat()
        return status.st_dev, status.st_ino, status.st_size
    return 0, 0, 0
