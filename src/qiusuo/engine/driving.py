"""Who drives an engine: one caller at a time, and nothing that was begun is left behind.

An engine is not for several threads. Calls that wait take the wheel until their answers are there;
a stream takes it for each step, so between two events others may drive, and carry it along. Whoever
comes while it is taken is told so at once. A stream that is closed while someone else drives leaves
its answer to be let go by him.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qiusuo.engine.answer_events import Event
from qiusuo.engine.answering import Answering, OnEvent
from qiusuo.engine.asking import Asked, T, failed
from qiusuo.engine.core import Engine
from qiusuo.engine.request import EngineError, RequestError
from qiusuo.engine.request import Sequence as Answer

CALL = "another call, or one whose on_event has not returned,"  # in words for EngineError

Begun = list[tuple[Answer, Answering | None]]


def begin(engine: Engine, asked: Asked[T], listeners: Sequence[OnEvent | None]) -> Begun:
    """Submit a request, with a listener for each answer. For whoever drives: a step between the two
    would draw tokens that no one hears."""
    sequences = engine.submit(asked.request)
    try:
        return list(zip(sequences, asked.follow(sequences, listeners), strict=True))
    except BaseException:
        for sequence in sequences:
            engine.cancel(sequence)
        raise


class Driver:
    """``make``: gives the engine when it is first needed, as it takes memory for its cache."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make, self._making = make, threading.Lock()
        self._engine: Engine | None = None
        self._wheel, self._who = threading.Lock(), ""
        self._abandoned: deque[Answer] = deque()  # of streams closed while someone else drove

    @property
    def engine(self) -> Engine:
        """The one engine, whichever thread asks first."""
        with self._making:
            if self._engine is None:
                self._engine = self._make()
            return self._engine

    @contextmanager
    def driving(self, who: str) -> Iterator[None]:
        """Whoever submits to the engine or steps it does so in here, and alone. EngineError, saying
        who it is, if somebody else does at this moment."""
        if not self._wheel.acquire(blocking=False):
            raise EngineError(
                f"{self._who or 'someone else'} drives this model's engine: ask through it, or "
                "wait until it is done; a server of many clients asks through a RunningEngine"
            )
        self._who = who
        try:
            self._let_go()
            yield
        finally:
            self._who = ""
            self._wheel.release()
            self._cancel_abandoned()

    def answers(self, groups: Sequence[Asked[T]], on_event: OnEvent | None = None) -> list[list[T]]:
        """What is told of the answers to each request; stopped midway, they are cancelled."""
        with self.driving(CALL):
            under_way: list[tuple[Asked[T], Begun]] = []
            ours: list[Answer] = []
            try:
                for asked in groups:
                    begun = begin(self.engine, asked, [on_event] * asked.request.n)
                    under_way.append((asked, begun))
                    ours += [sequence for sequence, _ in begun]
                while any(sequence.finish_reason is None for sequence in ours):
                    self._let_go()
                    self.engine.step()
            except BaseException:
                for sequence in ours:
                    self.engine.cancel(sequence)
                raise
        lone = len(ours) == 1
        return [[_told(asked, *pair, lone) for pair in begun] for asked, begun in under_way]

    def stream(self, asked: Asked[T]) -> Generator[Event, None, T]:
        """The events of one answer, and its value what is told of it. Closed early, the answer is
        cancelled."""
        heard: deque[Event] = deque()
        with self.driving(CALL):
            [(sequence, answering)] = begin(self.engine, asked, [heard.append])
        try:
            while sequence.finish_reason is None:
                with self.driving(CALL):
                    self.engine.step()
                while heard:
                    yield heard.popleft()
        finally:
            if sequence.finish_reason is None:
                self._abandoned.append(sequence)
                self._cancel_abandoned()
        try:
            return asked.told(sequence, answering)
        finally:  # what was held back until the end
            yield from heard

    def _let_go(self) -> None:
        """Cancel the answers of streams that were closed: for whoever drives."""
        while self._abandoned:
            self.engine.cancel(self._abandoned.popleft())

    def _cancel_abandoned(self) -> None:
        """The same for whoever does not, unless someone does: he looks again when he is done."""
        while self._abandoned and self._wheel.acquire(blocking=False):
            try:
                self._let_go()
            finally:
                self._wheel.release()


def _told(asked: Asked[T], sequence: Answer, answering: Answering | None, lone: bool) -> Any:
    """One failed answer among several takes none of the others away."""
    try:
        return asked.told(sequence, answering)
    except RequestError:
        if lone:
            raise
        return failed(sequence)  # several are only asked for as completions
