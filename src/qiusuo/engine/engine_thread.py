"""The thread that drives an engine: steps while there is work, sleeps while there is none.

Nothing else touches the engine. Whoever wants something of it hands in an errand, which runs
between two steps. The errands' queue may be put to from anywhere, a finaliser included
(``queue.SimpleQueue``), and none stays unanswered: what comes after the end is refused.
"""

from __future__ import annotations

import atexit
import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from qiusuo.engine.core import Engine
from qiusuo.engine.report import Statistics
from qiusuo.engine.request import EngineError, Sequence

T = TypeVar("T")


@dataclass(frozen=True)
class _Errand:
    act: Callable[[], Any]
    result: Future[Any] | None  # None: what goes wrong in it is the engine's failure

    def run(self) -> None:
        if self.result is None:
            self.act()
        elif self.result.set_running_or_notify_cancel():
            try:
                self.result.set_result(self.act())
            except BaseException as error:
                self.result.set_exception(error)

    def refuse(self, error: EngineError) -> None:
        if self.result is not None and self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)


class EngineThread:
    """``on_end`` hears in this thread of each sequence that has ended in a step, and ``on_stop`` at
    the very end, with an error where it was a step that failed. ``on_pause``: after each step, and
    before it sleeps."""

    def __init__(
        self,
        engine: Engine,
        on_end: Callable[[Sequence], None],
        on_stop: Callable[[EngineError | None], None],
        on_pause: Callable[[], None],
    ) -> None:
        self.engine, self.on_end, self.on_stop = engine, on_end, on_stop
        self.on_pause = on_pause
        self.statistics: Statistics = copy.deepcopy(engine.statistics)  # as of the last step
        self.failure: BaseException | None = None
        self._errands: SimpleQueue[_Errand] = SimpleQueue()
        self._stopping = self._over = False
        self._thread = threading.Thread(target=self._drive, name="qiusuo-engine", daemon=True)
        atexit.register(self.stop)  # a daemon is torn down in the midst of a pass otherwise
        self._thread.start()

    def call(self, act: Callable[[], T]) -> Future[T]:
        """Run this between two steps."""
        result: Future[T] = Future()
        self._put(_Errand(act, result))
        return result

    def post(self, act: Callable[[], None]) -> None:
        """The same, and nobody waits for it."""
        self._put(_Errand(act, None))

    def stop(self) -> None:
        """Stop after the step that is under way, and wait for that."""
        self._stopping = True
        self.post(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.stop)

    def _put(self, errand: _Errand) -> None:
        self._errands.put(errand)
        if self._over:  # it may have come after the last look
            self._refuse_all()

    def _drive(self) -> None:
        try:
            while not self._stopping:
                self._run_errands()
                if not self.engine.idle and not self._stopping:
                    self._step()
                self.on_pause()
        except BaseException as error:  # a bug, or no memory left
            self.failure = error
        finally:
            self._over = True
            self.on_stop(None if self.failure is None else self.refusal())
            self.on_pause()
            self._refuse_all()

    def _step(self) -> None:
        touched = self.engine.step()
        self.statistics = copy.deepcopy(self.engine.statistics)
        for sequence in touched:
            if sequence.finish_reason is not None:
                self.on_end(sequence)

    def _run_errands(self) -> None:
        """All there are; where there is nothing else to do, wait for one."""
        if self.engine.idle:
            self._errands.get().run()
        while not self._stopping:
            try:
                self._errands.get_nowait().run()
            except Empty:
                return

    def _refuse_all(self) -> None:
        while True:
            try:
                self._errands.get_nowait().refuse(self.refusal())
            except Empty:
                return

    def refusal(self) -> EngineError:
        if self.failure is None:
            return EngineError("the engine was stopped")
        error = EngineError(
            f"the engine has failed ({type(self.failure).__name__}: {self.failure}); stop it and "
            "start it again"
        )
        error.__cause__ = self.failure
        return error
