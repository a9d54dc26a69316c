"""An engine that runs for many clients at once: answers as streams, for a server.

>>> async with RunningEngine(lm) as engine:
...     [answer] = await engine.chat([{"role": "user", "content": "求索？"}])
...     async for event in answer:
...         print(event.text, end="")
...     message = await answer.message()

Three places, so that no one waits for another: a thread of its own drives the engine
(engine_thread.py); templates, tokens and grammars are worked out in a pool of threads; and the
event loops only hand events on (answer_handle.py).
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor

from qiusuo.data.chat_template import Message as GivenMessage
from qiusuo.engine.answer_handle import AnswerHandle, Bell, Stream
from qiusuo.engine.asking import (
    Asked,
    Completion,
    Message,
    T,
    beside_the_words,
    prepare_chat,
    prepare_text,
)
from qiusuo.engine.driving import begin
from qiusuo.engine.engine_thread import EngineThread
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.report import Statistics
from qiusuo.engine.request import EngineError
from qiusuo.engine.request import Sequence as Answer


@dataclass(frozen=True)
class EngineLoad:
    """``running`` and ``waiting``: answers. ``cache_tokens_used`` of ``cache_tokens`` are held by
    them; the others are free, or hold beginnings that may be found again. ``capacity``: the longest
    prompt and answer together, in tokens."""

    running: int
    waiting: int
    cache_tokens_used: int
    cache_tokens: int
    capacity: int


class RunningEngine:
    """While it runs the language model's own calls are refused: all go through here.

    Its methods may be called from any event loop, ``start`` and ``stop`` from any thread."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._lifecycle = threading.Lock()
        self._bell = Bell()
        self._thread: EngineThread | None = None
        self._driving = ExitStack()
        self._streams: dict[Answer, Stream[Any]] = {}  # the engine's thread's

    # -- start and stop ---------------------------------------------------------------------

    def start(self) -> None:
        """EngineError if it runs already, or somebody else drives this model's engine."""
        with self._lifecycle, ExitStack() as driving:
            if self._thread is not None:
                raise EngineError("this RunningEngine was started already")
            driving.enter_context(self.lm.driver.driving("a RunningEngine"))
            if not self.lm.engine.idle:
                raise EngineError("answers of this model are under way: end or close them first")
            self._thread = EngineThread(self.lm.engine, self._ended, self._end_all, self._bell.ring)
            self._driving = driving.pop_all()

    def stop(self) -> None:
        """Cancel all that is under way and end the thread, after the step it is in. The handles
        end with what they have; the language model answers calls again."""
        with self._lifecycle:
            if self._thread is not None:
                self._thread.stop()
                self._thread = None
                self._driving.close()

    async def __aenter__(self) -> RunningEngine:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.stop)

    # -- asking -----------------------------------------------------------------------------

    async def chat(
        self,
        messages: Sequence[GivenMessage],
        *,
        n: int = 1,
        priority: int = 0,
        deadline: float | None = None,
        namespace: str = "",
        keep_experts: bool = False,
        **options: Any,
    ) -> list[AnswerHandle[Message]]:
        """``n`` answers to a conversation, once they are under way. ``options``: those of
        ``LanguageModel.chat`` but ``on_event``, the fields of ``Sampling`` among them; the others
        as in ``Request``. DataError, RequestError or ValueError for what cannot be answered,
        EngineError if the engine does not run."""
        self._running()
        request = {"n": n, **beside_the_words(priority, deadline, namespace, keep_experts)}
        return await self.ask(
            await asyncio.to_thread(prepare_chat, self.lm, messages, request, **options)
        )

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        n: int = 1,
        priority: int = 0,
        deadline: float | None = None,
        namespace: str = "",
        keep_experts: bool = False,
        **options: Any,
    ) -> list[AnswerHandle[Completion]]:
        """The same for one text or list of token ids to continue, with the options of
        ``LanguageModel.generate``. Without a tokenizer there are no events."""
        self._running()
        request = {"n": n, **beside_the_words(priority, deadline, namespace, keep_experts)}
        return await self.ask(
            await asyncio.to_thread(prepare_text, self.lm, prompt, request, **options)
        )

    async def ask(self, asked: Asked[T]) -> list[AnswerHandle[T]]:
        thread = self._running()
        streams: list[Stream[T]] = [Stream(asked, self._bell) for _ in range(asked.request.n)]
        handles = [
            AnswerHandle(thread, stream, partial(self._cancel, stream)) for stream in streams
        ]
        try:
            await asyncio.wrap_future(thread.call(partial(self._submit, asked, streams)))
        except asyncio.CancelledError:  # they may be under way already
            for handle in handles:
                handle.cancel()
            raise
        return handles

    # -- the rest ---------------------------------------------------------------------------

    async def swap_weights(self, state: Mapping[str, Tensor]) -> int:
        """Put other weights into the model between two steps; their version. The tensors must not
        change until this returns."""
        swap = partial(self.lm.engine.swap_weights, dict(state))
        return await asyncio.wrap_future(self._running().call(swap))

    @property
    def statistics(self) -> Statistics:
        """As they were after the last step."""
        return copy.deepcopy(self._running().statistics)

    def load(self) -> EngineLoad:
        """How busy it is at this moment. EngineError if it does not run."""
        self._running()
        engine = self.lm.engine
        pool, size = engine.pool, engine.cache.page_tokens
        running, waiting = list(engine.scheduler.running), list(engine.scheduler.waiting)
        siblings = [one for first in (*running, *waiting) for one in first.siblings]
        behind = sum(one.finish_reason is None for one in siblings)  # wait for its prompt
        return EngineLoad(
            running=len(running),
            waiting=len(waiting) + behind,
            cache_tokens_used=(pool.count - pool.available) * size,
            cache_tokens=pool.count * size,
            capacity=engine.capacity,
        )

    def _running(self) -> EngineThread:
        thread = self._thread
        if thread is None:
            raise EngineError("the engine does not run: start it, or use `async with`")
        if thread.failure is not None:
            raise thread.refusal()
        return thread

    # -- in the engine's thread -------------------------------------------------------------

    def _submit(self, asked: Asked[T], streams: list[Stream[T]]) -> None:
        begun = begin(self.lm.engine, asked, [stream.outlet.put for stream in streams])
        for stream, (sequence, answering) in zip(streams, begun, strict=True):
            stream.begin(sequence, answering)
            self._streams[sequence] = stream

    def _cancel(self, stream: Stream[T]) -> None:
        if stream.sequence in self._streams:
            self.lm.engine.cancel(stream.sequence)
            self._ended(stream.sequence)

    def _ended(self, sequence: Answer) -> None:
        stream = self._streams.pop(sequence, None)
        if stream is not None:
            stream.finish()

    def _end_all(self, error: EngineError | None) -> None:
        """What is still under way when the thread ends. Every handle ends, whatever else fails."""
        for sequence, stream in self._streams.items():
            try:
                self.lm.engine.cancel(sequence)
            except Exception as wrong:
                stream.outlet.end(error=error or wrong)
            if error is None:
                stream.finish()
            else:
                stream.outlet.end(error=error)
        self._streams.clear()
