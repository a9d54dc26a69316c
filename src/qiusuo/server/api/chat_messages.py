"""The messages of a chat request, and as the engine's templates read them.

Text comes as one string, whatever parts it was sent in; calls of tools and their results are
matched here, because what a template is given must make sense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from qiusuo.server.api.errors import ApiError, misfit
from qiusuo.server.api.fields import Body

TEXTS = ("text", "refusal")  # kinds of parts
PART_END = "\n\n"  # between the parts of a content, as DeepSeek joins them


class ContentPart(Body):
    """Text only; images and sounds are refused, not passed over in silence."""

    type: str
    text: str | None = None
    refusal: str | None = None


class GivenFunction(Body):
    name: str
    arguments: str


class GivenCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: GivenFunction


class GivenMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[GivenCall] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None


def engine_messages(given: Sequence[GivenMessage]) -> list[dict[str, Any]]:
    """As the engine's templates want them. ApiError for what makes no conversation."""
    if not given:
        raise ApiError(400, "Empty input messages")
    if any(message.prefix and message.role == "assistant" for message in given[:-1]):
        raise ApiError(
            400,
            "Invalid completion message: prefix set true with message which is not final message "
            "or message role is not assistant",
        )
    messages = [_message(place, message) for place, message in enumerate(given)]
    return _in_order(messages)


def _message(place: int, given: GivenMessage) -> dict[str, Any]:
    content = _text(place, given.content)
    role = "system" if given.role == "developer" else given.role
    if role == "assistant":
        return _assistant(place, given, content)
    if content is None:
        raise misfit(f"messages[{place}]", "content should be a string or a list")
    if role != "tool":
        return {"role": role, "content": content}
    if given.tool_call_id is None:
        raise misfit(f"messages[{place}]", "missing field `tool_call_id`")
    return {"role": role, "content": content, "tool_call_id": given.tool_call_id}


def _assistant(place: int, given: GivenMessage, content: str | None) -> dict[str, Any]:
    if given.tool_calls == []:
        raise ApiError(
            400,
            f"Invalid 'messages[{place}].tool_calls': empty array. Expected an array with minimum "
            "length 1, but got an empty array instead.",
        )
    if content is None and given.tool_calls is None:
        raise ApiError(400, "Invalid assistant message: content or tool_calls must be set")
    message: dict[str, Any] = {"role": "assistant", "content": content or ""}
    thought = given.reasoning if given.reasoning_content is None else given.reasoning_content
    if thought is not None:
        message["reasoning_content"] = thought
    if given.tool_calls is not None:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in given.tool_calls
        ]
    if given.prefix:
        message["prefix"] = True
    return message


def _text(place: int, content: str | Sequence[ContentPart] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        where = f"messages[{place}].content[{index}]"
        if part.type not in TEXTS:
            raise ApiError(
                400,
                f"{where}: the models here read text only; leave out what is of type "
                f"{part.type[:40]!r}",
            )
        text = part.text if part.type == "text" else part.refusal
        if text is None:
            raise misfit(where, f"missing field `{part.type}`")
        texts.append(text)
    return PART_END.join(texts)


def _in_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every call of a tool answered right after it, in the order of the calls: templates write
    results without ids, and a model tells them apart by their place."""
    ordered: list[dict[str, Any]] = []
    waiting: list[str] = []
    results: dict[str, dict[str, Any]] = {}
    for message in messages:
        if message["role"] == "tool":
            _accept(message, waiting, results)
            if len(results) == len(waiting):
                ordered += [results[call] for call in waiting]
                waiting, results = [], {}
            continue
        _check_answered(waiting)
        ordered.append(message)
        waiting = [call["id"] for call in message.get("tool_calls", [])]
    _check_answered(waiting)
    return ordered


def _accept(
    message: dict[str, Any], waiting: Sequence[str], results: dict[str, dict[str, Any]]
) -> None:
    call = message["tool_call_id"]
    if not waiting:
        raise ApiError(
            400,
            "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'",
        )
    if call not in waiting or call in results:
        raise ApiError(
            400,
            "An assistant message with 'tool_calls' must be followed by tool messages responding "
            "to each 'tool_call_id', The following tool_call_ids did not have response messages: "
            f"{call}",
        )
    results[call] = message


def _check_answered(waiting: Sequence[str]) -> None:
    if waiting:
        raise ApiError(
            400,
            "An assistant message with 'tool_calls' must be followed by tool messages responding "
            "to each 'tool_call_id'. (insufficient tool messages following tool_calls message)",
        )
