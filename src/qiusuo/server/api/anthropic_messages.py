"""The messages of Anthropic's API, as those of a chat.

A message is a list of blocks here: calls are blocks of the assistant's, their results blocks of the
user's next message. Where the last message is the assistant's, the answer goes on with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from qiusuo.server.api.chat_messages import PART_END, GivenCall, GivenFunction, GivenMessage
from qiusuo.server.api.errors import ApiError
from qiusuo.server.api.fields import Body, text_or_list

FAILED = "Error: "  # before the result of a tool that failed: templates have no sign for it


class TextBlock(Body):
    type: Literal["text"]
    text: str


class ThinkingBlock(Body):
    """Its signature is not looked at: a thought may be anybody's here."""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Body):
    """Another server's secret, and of no use here."""

    type: Literal["redacted_thinking"]


class UseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OtherBlock(Body):
    type: str


def _kind(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return f"({kind})" if kind in KINDS else "(other)"


KINDS = ["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
ResultPart = Annotated[
    Annotated[TextBlock, Tag("(text)")] | Annotated[OtherBlock, Tag("(other)")],
    Discriminator(lambda block: "(text)" if _kind(block) == "(text)" else "(other)"),
]
ResultContent = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[ResultPart], Tag("(list)")],
    Discriminator(text_or_list),
]


class ResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: ResultContent | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ThinkingBlock, Tag("(thinking)")]
    | Annotated[RedactedBlock, Tag("(redacted_thinking)")]
    | Annotated[UseBlock, Tag("(tool_use)")]
    | Annotated[ResultBlock, Tag("(tool_result)")]
    | Annotated[OtherBlock, Tag("(other)")],
    Discriminator(_kind),
]
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Block], Tag("(list)")],
    Discriminator(text_or_list),
]
System = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[TextBlock], Tag("(list)")],
    Discriminator(text_or_list),
]


BLOCKS: dict[str, tuple[type[Body], ...]] = {
    "user": (TextBlock, ResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedBlock, UseBlock),
    "system": (TextBlock,),
}


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: Content


# -- messages -------------------------------------------------------------------------------


def chat_messages(system: System | None, given: Sequence[Message]) -> list[GivenMessage]:
    if not given:
        raise ApiError(400, "messages: at least one message is required")
    contents = [_blocks(place, message) for place, message in enumerate(given)]
    _check_results(contents)
    told = []
    if system is not None:
        text = system if isinstance(system, str) else PART_END.join(one.text for one in system)
        told.append(GivenMessage(role="system", content=text))
    for message, blocks in zip(given, contents, strict=True):
        if message.role == "assistant":
            told.append(_assistant(blocks, last=message is given[-1]))
        else:
            told += _others(message.role, blocks)
    return told


def _blocks(place: int, message: Message) -> list[Block]:
    if isinstance(message.content, str):
        return [TextBlock(type="text", text=message.content)]
    if not message.content:
        raise ApiError(400, f"messages.{place}: all messages must have non-empty content")
    for index, block in enumerate(message.content):
        where = f"messages.{place}.content.{index}"
        if isinstance(block, OtherBlock):
            raise _no_text(where, block.type)
        if not isinstance(block, BLOCKS[message.role]):
            told = f"{where}: a message of the {message.role}'s has no `{block.type}` blocks"
            raise ApiError(400, told)
    return message.content


def _no_text(where: str, kind: str) -> ApiError:
    told = f"{where}: the models here read text only; leave out what is of type {kind[:40]!r}"
    return ApiError(400, told)


def _assistant(blocks: Sequence[Block], last: bool) -> GivenMessage:
    thoughts = [one.thinking for one in blocks if isinstance(one, ThinkingBlock)]
    calls = [_call(one) for one in blocks if isinstance(one, UseBlock)]
    return GivenMessage(
        role="assistant",
        content=_text(blocks) or "",
        reasoning_content=PART_END.join(thoughts) if thoughts else None,
        tool_calls=calls or None,
        prefix=last and not calls,
    )


def _others(role: Literal["user", "system"], blocks: Sequence[Block]) -> list[GivenMessage]:
    """Results come before the words, wherever they stood."""
    told = [
        GivenMessage(role="tool", tool_call_id=one.tool_use_id, content=_result(one))
        for one in blocks
        if isinstance(one, ResultBlock)
    ]
    text = _text(blocks)
    return told if text is None else [*told, GivenMessage(role=role, content=text)]


def _text(blocks: Sequence[Block]) -> str | None:
    texts = [one.text for one in blocks if isinstance(one, TextBlock)]
    return PART_END.join(texts) if texts else None


def _call(block: UseBlock) -> GivenCall:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return GivenCall(id=block.id, function=GivenFunction(name=block.name, arguments=arguments))


def _result(block: ResultBlock) -> str:
    content = block.content or ""
    if not isinstance(content, str):
        for index, part in enumerate(content):
            if isinstance(part, OtherBlock):
                raise _no_text(f"`tool_result` {block.tool_use_id}.content.{index}", part.type)
        content = _text(content) or ""
    return FAILED + content if block.is_error else content


def _check_results(contents: Sequence[Sequence[Block]]) -> None:
    """In the words of Anthropic's API."""
    used: list[str] = []
    for place, blocks in enumerate(contents):
        results = [one.tool_use_id for one in blocks if isinstance(one, ResultBlock)]
        if missing := [one for one in used if one not in results]:
            raise _unanswered(place, missing)
        if strange := [one for one in results if one not in used]:
            told = f"unexpected `messages.{place}: tool_use_id` found in `tool_result` blocks: "
            must = "must have a corresponding `tool_use` block in the previous message."
            raise ApiError(400, f"{told}{strange[0]}. Each `tool_result` block {must}")
        used = [one.id for one in blocks if isinstance(one, UseBlock)]
    if used:
        raise _unanswered(len(contents), used)


def _unanswered(place: int, calls: Sequence[str]) -> ApiError:
    told = f"messages.{place}: `tool_use` ids were found without `tool_result` blocks immediately "
    told += f"after: {', '.join(calls)}. Each `tool_use` block must have a corresponding "
    return ApiError(400, told + "`tool_result` block in the next message.")
