"""/api/conversations: what the chat keeps on the server, and steering an answer under way."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from qiusuo.server.api.auth import CallerDep, HouseDep
from qiusuo.server.api.errors import ApiError
from qiusuo.server.house import House
from qiusuo.server.job import Job
from qiusuo.server.page.export import as_markdown, attachment_header
from qiusuo.server.page.parts import PartsDep
from qiusuo.server.question import Caller

MOST_SETTINGS = 64 << 10  # bytes of JSON: definitions of tools are among them
router = APIRouter(prefix="/api", tags=["page: chat"])


def _small(value: JsonValue) -> JsonValue:
    """Any JSON, but not much of it, and text that is Unicode."""
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError as error:
        raise ValueError("has text that is no valid Unicode") from error
    if size > MOST_SETTINGS:
        raise ValueError(f"takes {size:,} bytes: {MOST_SETTINGS:,} are the most")
    return value


Small = Annotated[JsonValue, AfterValidator(_small)]
SmallTable = Annotated[dict[str, JsonValue], AfterValidator(_small)]
Title = Annotated[str, Field(max_length=200)]
Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=2_000_000)]
Id = Annotated[str, Field(max_length=64)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    def given(self) -> dict[str, Any]:
        """What was in the request, and no defaults."""
        return self.model_dump(exclude_unset=True)


class NewConversation(Body):
    title: Title = ""
    model: Name | None = None
    system: Text | None = None
    settings: SmallTable | None = None


class ChangedConversation(NewConversation):
    leaf: Id | None = None


class Attachment(Body):
    name: Name
    text: Text


class ToolCall(Body):
    id: Name
    name: Name
    arguments: Text


class ChangedMessage(Body):
    content: Text = ""
    reasoning_content: Text | None = None
    reasoning_seconds: float | None = Field(None, ge=0)
    model: Name | None = None
    usage: Small = None
    cost: Small = None
    speed: Small = None
    finish_reason: Annotated[str, Field(max_length=40)] | None = None
    attachments: list[Attachment] | None = Field(None, max_length=16)
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: Name | None = None


class NewMessage(ChangedMessage):
    parent: Id | None = None
    role: Literal["user", "assistant", "tool"]


def owner(caller: Caller) -> str:
    """Whose conversations a caller sees: one key's are not another's, even of one account."""
    return f"account {caller.account}" if caller.key is None else f"key {caller.key.id}"


@router.get("/conversations")
def list_conversations(
    caller: CallerDep,
    parts: PartsDep,
    q: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[float | None, Query(allow_inf_nan=False)] = None,
) -> list[dict[str, Any]]:
    """The latest conversations, or those in which the words of `q` are found. `before`: the
    `updated` of the last one of an earlier list."""
    if q.strip():
        return parts.conversations.search(owner(caller), q, limit, before)
    return parts.conversations.latest(owner(caller), limit, before)


@router.post("/conversations", status_code=201)
def create_conversation(
    body: NewConversation, caller: CallerDep, parts: PartsDep
) -> dict[str, Any]:
    return parts.conversations.create(
        owner(caller), body.title, body.model, body.system or "", body.settings or {}
    )


@router.get("/conversations/{conversation}")
def get_conversation(conversation: str, caller: CallerDep, parts: PartsDep) -> dict[str, Any]:
    """With all messages of all branches; `leaf` is where the one shown ends."""
    return parts.conversations.get(owner(caller), conversation)


@router.patch("/conversations/{conversation}")
def change_conversation(
    conversation: str, body: ChangedConversation, caller: CallerDep, parts: PartsDep
) -> dict[str, Any]:
    return parts.conversations.change(owner(caller), conversation, body.given())


@router.delete("/conversations/{conversation}", status_code=204)
def delete_conversation(conversation: str, caller: CallerDep, parts: PartsDep) -> None:
    parts.conversations.delete(owner(caller), conversation)


@router.post("/conversations/{conversation}/messages", status_code=201)
def add_message(
    conversation: str, body: NewMessage, caller: CallerDep, parts: PartsDep
) -> dict[str, Any]:
    message = {"parent": None, "content": ""} | body.given()
    return parts.conversations.add(owner(caller), conversation, message)


@router.patch("/conversations/{conversation}/messages/{message}")
def change_message(
    conversation: str, message: str, body: ChangedMessage, caller: CallerDep, parts: PartsDep
) -> dict[str, Any]:
    return parts.conversations.amend(owner(caller), conversation, message, body.given())


@router.get("/conversations/{conversation}/export")
def export_conversation(
    conversation: str,
    caller: CallerDep,
    parts: PartsDep,
    format: Literal["md", "json"] = "md",
) -> Response:
    """A file: the branch shown as Markdown, or every branch as JSON."""
    found = parts.conversations.get(owner(caller), conversation)
    headers = {"content-disposition": attachment_header(found["title"], format)}
    if format == "json":
        return JSONResponse(found, headers=headers)
    return Response(as_markdown(found), headers=headers, media_type="text/markdown; charset=utf-8")


@router.post("/requests/{request}/end-thinking", status_code=204)
async def end_thinking(request: str, caller: CallerDep, house: HouseDep) -> None:
    """Let an answer under way end its thought now and answer."""
    _own_job(house, caller, request).close_thought()


@router.post("/requests/{request}/stop", status_code=204)
async def stop(request: str, caller: CallerDep, house: HouseDep) -> None:
    """End an answer under way; what was written stays, and is what it costs."""
    _own_job(house, caller, request).stop()


def _own_job(house: House, caller: Caller, request: str) -> Job:
    job = house.desk.jobs.get(request)
    if job is None or owner(job.caller) != owner(caller):
        raise ApiError(404, f"there is no request {request[:80]!r} under way")
    return job
