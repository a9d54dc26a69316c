"""An answer on its way from the engine's thread to a client, who may be slow, or gone.

The engine's thread puts events into an outlet and never waits: they are small, and an answer has
an end. A client takes them in any event loop. It is woken only if it waits, and all are woken
together after a step, so whoever lags behind costs the engine nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Generic, TypeVar

from qiusuo.engine.answer_events import Event
from qiusuo.engine.answering import Answering
from qiusuo.engine.asking import Asked
from qiusuo.engine.engine_thread import EngineThread
from qiusuo.engine.request import Sequence
from qiusuo.engine.sampler import Drawn

T = TypeVar("T")
Sleeper = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Bell:
    """Wakes clients, each in its event loop, once a step: to call into another thread's loop costs
    as much as a good part of an answer's token. The engine's thread alone touches it."""

    def __init__(self) -> None:
        self._sleepers: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}

    def add(self, sleepers: Iterable[Sleeper]) -> None:
        """To be woken when it rings."""
        for loop, future in sleepers:
            self._sleepers.setdefault(loop, []).append(future)

    def ring(self) -> None:
        if not self._sleepers:
            return
        sleepers, self._sleepers = self._sleepers, {}
        for loop, futures in sleepers.items():
            # A closed loop: nobody sleeps there any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_wake, futures)


class Outlet(Generic[T]):
    """What is known outside the engine's thread of one answer. Ends once, with a result or an
    error. Who waits for it hears when the bell rings."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._readers: list[Sleeper] = []  # until there is an event, or the end
        self._waiters: list[Sleeper] = []  # until the end
        self._result: T | None = None
        self._error: BaseException | None = None
        self.ended = False

    def put(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
            readers, self._readers = self._readers, []
        self._bell.add(readers)

    def end(self, result: T | None = None, error: BaseException | None = None) -> None:
        with self._lock:
            if self.ended:
                return
            self._result, self._error, self.ended = result, error, True
            sleepers = self._readers + self._waiters
            self._readers, self._waiters = [], []
        self._bell.add(sleepers)

    async def event(self) -> Event | None:
        """The next; None at the end. Raises the error that it ended with."""
        while True:
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self.ended:
                    break
                change = _sleep(self._readers)
            await change
        if self._error is not None:
            raise self._error.with_traceback(None)
        return None

    async def result(self) -> T:
        while True:
            with self._lock:
                if self.ended:
                    break
                change = _sleep(self._waiters)
            await change
        if self._error is not None:
            raise self._error.with_traceback(None)
        assert self._result is not None
        return self._result


def _sleep(sleepers: list[Sleeper]) -> asyncio.Future[None]:
    """A future of this event loop that is done when those here are woken."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    sleepers.append((loop, future))
    return future


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Stream(Generic[T]):
    """The engine's side of an answer; all but ``outlet`` belongs to the engine's thread."""

    def __init__(self, asked: Asked[T], bell: Bell) -> None:  # type: ignore[type-var]
        self.asked = asked
        self.outlet: Outlet[T] = Outlet(bell)
        self.sequence: Sequence | None = None
        self.answering: Answering | None = None

    def begin(self, sequence: Sequence, answering: Answering | None) -> None:
        self.sequence, self.answering = sequence, answering
        follow = sequence.on_token

        def hear(one: Sequence, drawn: Drawn) -> str | None:
            """What goes wrong with the text of one answer ends that one alone."""
            try:
                return None if follow is None else follow(one, drawn)
            except Exception as error:
                one.error = f"the answer cannot be read: {type(error).__name__}: {error}"
                one.finish_reason = "error"
                return "error"

        sequence.on_token = hear

    def finish(self) -> None:
        """The sequence has ended."""
        assert self.sequence is not None
        try:
            result = self.asked.told(self.sequence, self.answering)
        except Exception as error:  # this answer's, and of no other
            self.outlet.end(error=error)
        else:
            self.outlet.end(result)

    def close_thought(self) -> None:
        if self.answering is not None and not self.outlet.ended:
            self.answering.close_thought()


class AnswerHandle(Generic[T]):
    """An answer as it comes: iterate over its events, await ``message``, or both, in any order and
    in any event loop; each event is given once.

    The answer is cancelled when nobody wants it any more: a task that was waiting for it is
    cancelled, ``async with`` ends, or the handle is dropped. RequestError while iterating or
    from ``message`` if it ended in an error of its own, EngineError if the engine failed."""

    def __init__(self, thread: EngineThread, stream: Stream[T], cancel: Callable[[], None]) -> None:
        self._thread, self._stream, self._cancel = thread, stream, cancel
        self._outlet = stream.outlet

    def __aiter__(self) -> AnswerHandle[T]:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await self._outlet.event()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if event is None:
            raise StopAsyncIteration
        return event

    async def message(self) -> T:
        """The whole answer, a ``Message`` (of a plain text a ``Completion``), once it has ended:
        cancelled or past its deadline too, with what there was."""
        try:
            return await self._outlet.result()
        except asyncio.CancelledError:
            self.cancel()
            raise

    @property
    def ended(self) -> bool:
        return self._outlet.ended

    def cancel(self) -> None:
        """Stop before the next step. Nothing where it has ended."""
        if not self._outlet.ended:
            self._thread.post(self._cancel)

    def close_thought(self) -> None:
        """Let the model answer now: its thought is closed in the next step. Nothing where it is
        not thinking."""
        self._thread.post(self._stream.close_thought)

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> AnswerHandle[T]:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()
