"""Answers under way to one question, from their first token to what they cost.

A client that goes away leaves the ``async with`` of its job, the engine stops within a step, and
the tokens that were made until then are what is settled: the engine itself counts them, in the
same process, so nothing has to be estimated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, cast

from qiusuo.engine.answer_events import Event
from qiusuo.engine.answer_handle import AnswerHandle
from qiusuo.engine.asking import Asked, Completion, Message, Usage
from qiusuo.engine.request import EngineError, RequestError
from qiusuo.server.api.errors import failed_answer
from qiusuo.server.ledger import Used
from qiusuo.server.metrics import Metrics
from qiusuo.server.prices import Price
from qiusuo.server.question import Caller
from qiusuo.server.registry import ServedModel

Result = Message | Completion


class Job:
    """Answers under way to one question; ``async with`` it. Leaving it, for whatever reason, ends
    what still runs and settles once for what was made. ``cost`` is known then."""

    def __init__(
        self,
        request_id: str,
        caller: Caller,
        model: ServedModel,
        price: Price,
        endpoint: str,
        asked: Asked[Any],
        metrics: Metrics,
        settling: Callable[[Job], asyncio.Task[None]],
    ) -> None:
        self.request_id, self.caller, self.model = request_id, caller, model
        self.price = price
        self.created = int(time.time())
        self.n = asked.request.n
        self.cost: int | None = None
        self.first_token_seconds: float | None = None
        self.seconds: float | None = None
        self._endpoint, self._asked = endpoint, asked
        self._metrics, self._settling = metrics, settling
        self._began = time.monotonic()
        self._handles: list[AnswerHandle[Any]] = []
        self._results: list[Result | Exception] | None = None

    async def __aenter__(self) -> Job:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> None:
        self._handles = list(await self.model.engine.ask(self._asked))

    # -- reading ----------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(which answer, event) of all as they come. Ends when all have ended; an error of one is
        raised by ``results``."""
        last: float | None = None
        async with aclosing(self._alone() if self.n == 1 else self._together()) as events:
            async for choice, event in events:
                last = self._clock(last)
                yield choice, event

    async def _alone(self) -> AsyncGenerator[tuple[int, Event]]:
        [handle] = self._handles
        with suppress(RequestError, EngineError):
            async for event in handle:
                yield 0, event

    async def _together(self) -> AsyncGenerator[tuple[int, Event]]:
        queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()

        async def read(choice: int, handle: AnswerHandle[Any]) -> None:
            try:
                async for event in handle:
                    queue.put_nowait((choice, event))
            except (RequestError, EngineError):
                pass
            finally:
                queue.put_nowait((choice, None))

        tasks = [asyncio.create_task(read(i, one)) for i, one in enumerate(self._handles)]
        try:
            left = len(tasks)
            while left:
                choice, event = await queue.get()
                if event is None:
                    left -= 1
                else:
                    yield choice, event
        finally:
            for task in tasks:
                task.cancel()

    def _clock(self, last: float | None) -> float:
        """Notes how long an event was waited for; the time now."""
        now = time.monotonic()
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._began
            self._metrics.first_token(self.model.name, self.first_token_seconds)
        elif last is not None and self.n == 1:
            self._metrics.between_tokens(self.model.name, now - last)
        return now

    async def results(self) -> list[Result]:
        """All answers, in order. ApiError where one of them failed in the engine."""
        told = await self.ended()
        for one in told:
            if isinstance(one, Exception):
                raise failed_answer(one) from one
        return cast(list[Result], told)

    async def usage(self) -> Usage:
        """Of all answers together; the prompt counts once, and as found in the cache what the
        first of them found there."""
        return self._usage(await self.ended())

    @property
    def prompt_tokens(self) -> int:
        return len(self._asked.request.prompt)

    # -- steering ---------------------------------------------------------------------------

    def close_thought(self, choice: int | None = None) -> None:
        """End the thought of one answer, or of all, and let it answer."""
        for place, handle in enumerate(self._handles):
            if choice in (None, place):
                handle.close_thought()

    def stop(self) -> None:
        """End all answers after the step they are in; readers see the end."""
        for handle in self._handles:
            handle.cancel()

    async def close(self) -> None:
        """Settle; a second time nothing. Goes on to the end even if the caller is cancelled."""
        if self.cost is None:
            await asyncio.shield(self._settling(self))

    # -- the end ----------------------------------------------------------------------------

    async def ended(self) -> list[Result | Exception]:
        """Each answer, or what it failed with, once all have ended."""
        if self._results is None:
            told = await asyncio.gather(
                *(handle.message() for handle in self._handles), return_exceptions=True
            )
            for one in told:
                if isinstance(one, BaseException) and not isinstance(one, Exception):
                    raise one
            self._results = cast(list[Result | Exception], told)
            self.seconds = time.monotonic() - self._began
        return self._results

    def _usage(self, told: Sequence[Result | Exception]) -> Usage:
        """An answer that ended in an error of ours is not counted."""
        given = [one.usage for one in told if not isinstance(one, Exception)]
        cached = given[0].cached_tokens if given else 0
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(one.completion_tokens for one in given),
            reasoning_tokens=sum(one.reasoning_tokens for one in given),
            cached_tokens=min(cached, self.prompt_tokens),
        )

    def used(self) -> Used | None:
        """What there is to pay for; None where nothing was made."""
        told = self._results or []
        if all(isinstance(one, Exception) for one in told):
            return None
        usage = self._usage(told)
        reasons = [one.finish_reason for one in told if not isinstance(one, Exception)]
        hit = usage.cached_tokens
        miss = usage.prompt_tokens - hit
        return Used(
            model=self.model.name,
            endpoint=self._endpoint,
            hit=hit,
            miss=miss,
            output=usage.completion_tokens,
            reasoning=usage.reasoning_tokens,
            seconds=self.seconds or 0.0,
            finish=reasons[0],
        )
