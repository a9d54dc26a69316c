"""POST /anthropic/v1/messages, and what a conversation has of tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

from fastapi import APIRouter
from starlette.responses import Response
from starlette.types import Message as Sent
from starlette.types import Receive, Scope, Send

from qiusuo.engine.asking import Message
from qiusuo.server.api.anthropic_events import MessageEvents, Told, stop_sequence
from qiusuo.server.api.anthropic_request import CountRequest, MessagesRequest
from qiusuo.server.api.auth import CallerDep, HouseDep
from qiusuo.server.api.errors import failed_answer
from qiusuo.server.api.streaming import KEEP_ALIVE, EventStream, PatientJSON, named_frame
from qiusuo.server.house import House
from qiusuo.server.job import Job
from qiusuo.server.question import Caller

THEIR_NAMES = "claude"  # clients have them built in
PING = named_frame({"type": "ping"})

router = APIRouter(prefix="/anthropic/v1", tags=["anthropic"])


@router.post("/messages")
async def messages(body: MessagesRequest, house: HouseDep, caller: CallerDep) -> Response:
    """Answer a conversation, as Anthropic's API does."""
    name = _name(house, caller, body.model)
    model = house.registry.get(name)
    question = body.chat(name).question(model, house.settings)
    job = await house.desk.ask(caller, question, endpoint="anthropic")
    told = MessageEvents(job.request_id, model.name, job.prompt_tokens)
    headers = {"X-Request-Id": job.request_id, "Request-Id": job.request_id}
    keep_alive = house.settings.keep_alive_seconds
    if body.stream:
        return PingedStream(job, _frames(job, told, body), keep_alive, headers)

    async def whole() -> dict[str, Any]:
        async for _ in _events(job, told, body):
            continue
        return told.message

    return PatientJSON(job, whole, keep_alive, headers, shape=lambda error: error.anthropic_body)


@router.post("/messages/count_tokens")
async def count_tokens(body: CountRequest, house: HouseDep, caller: CallerDep) -> dict[str, int]:
    """The tokens that a model would read."""
    name = _name(house, caller, body.model)
    model = house.registry.get(name)
    question = body.chat(name).question(model, house.settings)
    tokens = await asyncio.to_thread(
        model.lm.needed_tokenizer().apply_chat_template,
        question.messages,
        thinking=question.options["thinking"],
        tools=question.options.get("tools"),
        continue_last=question.options.get("continue_last", False),
    )
    return {"input_tokens": len(tokens)}


def _name(house: House, caller: Caller, name: str) -> str:
    """A name of Anthropic's stands for the first model that the caller may use."""
    known = (*house.registry.models, *house.registry.loading)
    if not name.startswith(THEIR_NAMES) or name in known:
        return name
    return next(filter(caller.may_use, known), name)


class PingedStream(EventStream):
    """Says "ping" where others send a comment."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pinging(sent: Sent) -> None:
            await send({**sent, "body": PING} if sent.get("body") == KEEP_ALIVE else sent)

        await super().__call__(scope, receive, pinging)


async def _frames(job: Job, told: MessageEvents, body: MessagesRequest) -> AsyncIterator[bytes]:
    try:
        async for event in _events(job, told, body):
            yield named_frame(event)
    except Exception as error:
        yield named_frame(failed_answer(error).anthropic_body)


async def _events(job: Job, told: MessageEvents, body: MessagesRequest) -> AsyncIterator[Told]:
    for one in told.begin():
        yield one
    async for _, event in job.events():
        for one in told.push(event):
            yield one
    [answer] = cast(list[Message], await job.results())
    usage = await job.usage()
    await job.close()  # settled before it is told
    stopped = stop_sequence(job.model.lm, answer, body.stop_sequences or ())
    for one in told.finish(answer.finish_reason, stopped, usage):
        yield one
