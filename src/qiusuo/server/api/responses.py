"""POST /responses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from qiusuo.server.api.auth import CallerDep, HouseDep
from qiusuo.server.api.errors import failed_answer
from qiusuo.server.api.responses_events import ResponseEvents, Told
from qiusuo.server.api.responses_request import ResponsesRequest
from qiusuo.server.api.streaming import EventStream, PatientJSON, named_frame
from qiusuo.server.api.token_texts import token_texts
from qiusuo.server.job import Job

router = APIRouter(tags=["responses"])


@router.post("/responses")
async def responses(body: ResponsesRequest, house: HouseDep, caller: CallerDep) -> Response:
    """Answer a conversation, as OpenAI's Responses API does; nothing is kept of it."""
    model = house.registry.get(body.model)
    question = body.chat().question(model, house.settings)
    job = await house.desk.ask(caller, question, endpoint="responses")
    texts = token_texts(model.lm.needed_tokenizer()) if body.wants_logprobs else None
    told = ResponseEvents(job.request_id, job.created, model.name, body, texts)
    headers = {"X-Request-Id": job.request_id}
    keep_alive = house.settings.keep_alive_seconds
    if body.stream:
        return EventStream(job, _frames(job, told), keep_alive, headers)

    async def whole() -> dict[str, Any]:
        async for _ in _events(job, told):
            continue
        return told.response

    return PatientJSON(job, whole, keep_alive, headers)


async def _frames(job: Job, told: ResponseEvents) -> AsyncIterator[bytes]:
    """There is no ``[DONE]``: the last event says itself that it is the last."""
    try:
        async for event in _events(job, told):
            yield named_frame(event)
    except Exception as error:
        for event in told.fail(failed_answer(error)):
            yield named_frame(event)


async def _events(job: Job, told: ResponseEvents) -> AsyncIterator[Told]:
    for one in told.begin():
        yield one
    async for _, event in job.events():
        for one in told.push(event):
            yield one
    [result] = await job.results()
    usage = await job.usage()
    await job.close()  # settled before it is told
    for one in told.finish(result.finish_reason, usage):
        yield one
