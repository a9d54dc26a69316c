"""POST /chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

from fastapi import APIRouter
from starlette.responses import Response

from qiusuo.engine.asking import Message
from qiusuo.server.api.auth import CallerDep, HouseDep
from qiusuo.server.api.chat_chunks import (
    ChatShape,
    Chunk,
    extension,
    fingerprint,
    usage_told,
)
from qiusuo.server.api.chat_request import ChatRequest
from qiusuo.server.api.streaming import EventStream, PatientJSON, frames
from qiusuo.server.api.token_texts import token_texts
from qiusuo.server.house import House
from qiusuo.server.job import Job

router = APIRouter(tags=["chat"])


@router.post("/chat/completions")
async def chat_completions(body: ChatRequest, house: HouseDep, caller: CallerDep) -> Response:
    """Answer a conversation, as DeepSeek's and OpenAI's API do."""
    model = house.registry.get(body.model)
    question = body.question(model, house.settings)
    job = await house.desk.ask(caller, question, endpoint="chat")
    answer = _Answer(house, body, job)
    headers = {"X-Request-Id": job.request_id}
    keep_alive = house.settings.keep_alive_seconds
    if body.stream:
        return EventStream(job, frames(answer.chunks()), keep_alive, headers)
    return PatientJSON(job, answer.whole, keep_alive, headers)


class _Answer:
    def __init__(self, house: House, body: ChatRequest, job: Job) -> None:
        self.house, self.body, self.job = house, body, job
        model = job.model
        self.shape = ChatShape(
            id=job.request_id,
            created=job.created,
            model=model.name,
            fingerprint=fingerprint(model),
            thinking=body.thinks(model),
            null_usage=body.include_usage,
            texts=token_texts(model.lm.needed_tokenizer()) if body.logprobs else None,
        )

    async def chunks(self) -> AsyncIterator[Chunk]:
        opened: set[int] = set()
        async for choice, event in self.job.events():
            chunk = self.shape.piece(choice, event)
            if chunk is None:
                continue
            if choice not in opened:
                opened.add(choice)
                yield self.shape.opening(choice)
            yield chunk
        messages = cast(list[Message], await self.job.results())
        for choice in sorted(set(range(self.job.n)) - opened):
            yield self.shape.opening(choice)
        endings = [
            self.shape.closing(choice, message.finish_reason)
            for choice, message in enumerate(messages)
        ]
        endings[-1] |= await self._account()
        for chunk in endings:
            yield chunk

    async def whole(self) -> dict[str, Any]:
        messages = cast(list[Message], await self.job.results())
        account = await self._account()
        return self.shape.whole(messages, account.pop("usage")) | account

    async def _account(self) -> Chunk:
        """Settled before it is told, so that whoever then asks for the balance finds it."""
        usage = await self.job.usage()
        await self.job.close()
        told: Chunk = {"usage": usage_told(usage, self.shape.thinking)}
        if self.body.extended:
            currency = self.house.prices.currency
            told["qiusuo"] = extension([self.job], usage.completion_tokens, currency)
        return told
