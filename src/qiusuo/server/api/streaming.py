"""Answers on their way to a client who may have to wait, or may leave.

While there is nothing to say a client still hears something, or it would take the server for dead:
comments in a stream of events, blank lines before a JSON body, as DeepSeek's API sends them. And
the server listens while it speaks: whoever disconnects leaves the job's context at once, so that
its place in the engine is free within a step, also while nothing was sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from types import TracebackType
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qiusuo.server.api.errors import ApiError, failed_answer

Work = AbstractAsyncContextManager[object]
Shape = Callable[[ApiError], dict[str, Any]]

KEEP_ALIVE = b": keep-alive\n\n"
BLANK_LINE = b"\n"
DONE = b"data: [DONE]\n\n"


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def to_json(value: Mapping[str, Any]) -> str:
    return _encoder.encode(value)


def frame(value: Mapping[str, Any]) -> bytes:
    """One event without a name."""
    return f"data: {to_json(value)}\n\n".encode()


def named_frame(value: Mapping[str, Any]) -> bytes:
    """One event under the name of its type."""
    return f"event: {value['type']}\n".encode() + frame(value)


async def frames(chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    """Chunks as OpenAI's clients read them: ``[DONE]`` behind the last, or an error instead."""
    try:
        async for chunk in chunks:
            yield frame(chunk)
    except Exception as error:
        yield frame(failed_answer(error).body)
    else:
        yield DONE


class EventStream(Response):
    """Server-sent events made while ``work`` (a job) is entered. ``events`` gives whole frames and
    turns errors into one: the status is sent before the first."""

    media_type = "text/event-stream"

    def __init__(
        self,
        work: Work,
        events: AsyncIterator[bytes],
        keep_alive: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code, self.background = 200, None
        self.work, self.events, self.keep_alive = work, events, keep_alive
        # A proxy must not collect what is meant to be seen as it comes.
        unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.init_headers(unbuffered | dict(headers or {}))
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.work:
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self.events) as events, Pulse(send, self.keep_alive) as pulse:  # type: ignore[type-var]
            async for event in events:
                pulse.beat()
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class PatientJSON(Response):
    """One JSON body, worked out by ``body`` while ``work`` is entered. An error that comes before
    anything was sent is raised, to be answered with its status; later it is the body."""

    media_type = "application/json"

    def __init__(
        self,
        work: Work,
        body: Callable[[], Awaitable[Mapping[str, Any]]],
        keep_alive: float,
        headers: Mapping[str, str] | None = None,
        shape: Shape = lambda error: error.body,
    ) -> None:
        self.status_code, self.background = 200, None
        self.work, self.make, self.keep_alive, self.shape = work, body, keep_alive, shape
        self.init_headers(headers)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.work:
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        making = asyncio.ensure_future(self.make())
        started = False
        try:
            while not (await asyncio.wait((making,), timeout=self.keep_alive))[0]:
                if not started:
                    await self._start(send)
                    started = True
                await send({"type": "http.response.body", "body": BLANK_LINE, "more_body": True})
            told = making.result()
        except Exception as error:
            refusal = failed_answer(error)
            if not started:
                raise refusal from error
            told = self.shape(refusal)
        finally:
            making.cancel()
        body = to_json(told).encode()
        if not started:
            self.headers["content-length"] = str(len(body))
            await self._start(send)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})


class Pulse:
    """Sends a comment whenever nothing was sent for ``seconds``."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self._task: asyncio.Task[None] | None = None
        self.beat()

    def beat(self) -> None:
        self._last = asyncio.get_running_loop().time()

    async def __aenter__(self) -> Pulse:
        self._task = asyncio.create_task(self._beats())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _beats(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            silent = clock() - self._last
            if silent < self._seconds:
                await asyncio.sleep(self._seconds - silent)
                continue
            self.beat()
            await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work until it is done, or the client is gone: then it is cancelled where it is."""
    doing = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)
    if not doing.cancelled():
        doing.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
