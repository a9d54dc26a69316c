"""POST /completions: texts to go on with, to score, or to fill in the middle of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, cast

from fastapi import APIRouter
from starlette.responses import Response

from qiusuo.engine.answer_events import Event
from qiusuo.engine.asking import Completion, Usage, worth
from qiusuo.server.api.auth import CallerDep, HouseDep
from qiusuo.server.api.chat_chunks import Chunk, extension, fingerprint, usage_told
from qiusuo.server.api.completions_request import CompletionRequest
from qiusuo.server.api.completions_shape import Echo, TextShape
from qiusuo.server.api.streaming import EventStream, PatientJSON, frames
from qiusuo.server.api.token_texts import token_texts
from qiusuo.server.desk import new_request_id
from qiusuo.server.house import House
from qiusuo.server.job import Job
from qiusuo.server.question import Caller, TextQuestion

router = APIRouter(tags=["completions"])


@router.post("/completions")
async def completions(body: CompletionRequest, house: HouseDep, caller: CallerDep) -> Response:
    """Continue texts, as OpenAI's older API does; with a ``suffix``, fill in the middle."""
    model = house.registry.get(body.model)
    questions = await asyncio.to_thread(body.questions, model, house.settings)
    stack, jobs = await _ask_all(house, caller, questions)
    answer = _Answer(house, body, jobs)
    headers = {"X-Request-Id": jobs[0].request_id}
    keep_alive = house.settings.keep_alive_seconds
    if body.stream:
        return EventStream(stack, frames(answer.chunks()), keep_alive, headers)
    return PatientJSON(stack, answer.whole, keep_alive, headers)


async def _ask_all(
    house: House, caller: Caller, questions: Sequence[TextQuestion]
) -> tuple[AsyncExitStack, list[Job]]:
    """A job for each prompt; where one is refused, the others are ended."""
    request_id = new_request_id()
    jobs: list[Job] = []
    async with AsyncExitStack() as stack:
        for place, question in enumerate(questions):
            name = request_id if not place else f"{request_id}-{place}"
            job = await house.desk.ask(caller, question, name, endpoint="completions")
            jobs.append(await stack.enter_async_context(job))
        return stack.pop_all(), jobs


class _Answer:
    def __init__(self, house: House, body: CompletionRequest, jobs: Sequence[Job]) -> None:
        self.house, self.body, self.jobs = house, body, jobs
        model = jobs[0].model
        self.tokenizer = model.lm.tokenizer
        wanted = body.logprobs is not None and self.tokenizer is not None
        self.shape = TextShape(
            id=jobs[0].request_id,
            created=jobs[0].created,
            model=model.name,
            fingerprint=fingerprint(model),
            null_usage=body.include_usage,
            texts=token_texts(model.lm.needed_tokenizer()) if wanted else None,
        )

    async def chunks(self) -> AsyncIterator[Chunk]:
        each = self.body.each
        for place, echo in enumerate(self._echoes()):
            if echo is not None:
                for choice in range(each):
                    yield self.shape.piece(place * each + choice, echo.text)
        if self.body.wants_text:
            async with aclosing(_merged(self.jobs)) as events:  # type: ignore[type-var]
                async for place, choice, event in events:
                    if event.text:
                        yield self.shape.piece(place * each + choice, event.text, event.drawn)
        answers = [answer for job in self.jobs for answer in await _results(job)]
        endings = [self.shape.closing(choice, answer) for choice, answer in enumerate(answers)]
        endings[-1] |= await self._account()
        for chunk in endings:
            yield chunk

    async def whole(self) -> dict[str, Any]:
        choices: list[Chunk] = []
        for job, echo in zip(self.jobs, self._echoes(), strict=True):
            answers = await _results(job)
            if self.body.best_of is not None:
                answers = sorted(answers, key=worth, reverse=True)[: self.body.each]
            for answer in answers:
                told = self.shape.choice(len(choices), answer, echo, self.body.wants_text)
                choices.append(told)
        account = await self._account()
        return self.shape.whole(choices, account.pop("usage")) | account

    def _echoes(self) -> list[Echo | None]:
        if not self.body.echo or self.tokenizer is None:
            return [None] * len(self.jobs)
        return [Echo.of(self.tokenizer, prompt) for prompt in self.body.prompts()]

    async def _account(self) -> Chunk:
        usages = [await job.usage() for job in self.jobs]
        await asyncio.gather(*(job.close() for job in self.jobs))
        usage = Usage(
            prompt_tokens=sum(one.prompt_tokens for one in usages),
            completion_tokens=sum(one.completion_tokens for one in usages),
            reasoning_tokens=0,
            cached_tokens=sum(one.cached_tokens for one in usages),
        )
        told: Chunk = {"usage": usage_told(usage, thinking=False)}
        if self.body.extended:
            currency = self.house.prices.currency
            told["qiusuo"] = extension(self.jobs, usage.completion_tokens, currency)
        return told


async def _results(job: Job) -> list[Completion]:
    return cast(list[Completion], await job.results())


async def _merged(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, int, Event]]:
    """(which job, which of its answers, event), as they come."""
    queue: asyncio.Queue[tuple[int, int, Event] | None] = asyncio.Queue()

    async def read(place: int, job: Job) -> None:
        try:
            async with aclosing(job.events()) as events:  # type: ignore[type-var]
                async for choice, event in events:
                    queue.put_nowait((place, choice, event))
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(read(place, job)) for place, job in enumerate(jobs)]
    try:
        left = len(tasks)
        while left:
            told = await queue.get()
            if told is None:
                left -= 1
            else:
                yield told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
