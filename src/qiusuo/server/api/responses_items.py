"""The items of a Responses request, as the messages of a chat.

``input`` is a flat list of items where a chat has messages; what the assistant thought, said and
called between two turns of others becomes one message.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from qiusuo.server.api.chat_messages import PART_END, GivenCall, GivenFunction, GivenMessage
from qiusuo.server.api.errors import ApiError, misfit
from qiusuo.server.api.fields import Body, text_or_list

SEAL = "qiusuo-1:"
TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class Part(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Tag("(list)")],
    Discriminator(text_or_list),
]


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ReasoningItem(Body):
    type: Literal["reasoning"]
    content: list[Part] | None = None
    encrypted_content: str | None = None


class CallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class OtherItem(Body):
    type: str


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", "other")
    if kind is None:
        return "(message)"
    return f"({kind})" if kind in KINDS else "(other)"


KINDS = ["message", "reasoning", "function_call", "function_call_output"]
Item = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[ReasoningItem, Tag("(reasoning)")]
    | Annotated[CallItem, Tag("(function_call)")]
    | Annotated[OutputItem, Tag("(function_call_output)")]
    | Annotated[OtherItem, Tag("(other)")],
    Discriminator(_kind),
]
Input = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Item], Tag("(list)")],
    Discriminator(text_or_list),
]


# -- messages -------------------------------------------------------------------------------


@dataclass
class ItemMessages:
    """What the assistant said is collected until somebody else speaks."""

    done: list[GivenMessage] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[GivenCall] = field(default_factory=list)

    def add(self, message: GivenMessage) -> None:
        self._end_turn()
        self.done.append(message)

    def all(self) -> list[GivenMessage]:
        self._end_turn()
        return self.done

    def take(self, where: str, item: Item) -> None:
        match item:
            case MessageItem(role="assistant"):
                self.texts.append(plain(where, item.content))
            case MessageItem():
                self.add(GivenMessage(role=item.role, content=plain(where, item.content)))
            case ReasoningItem():
                self.thoughts.append(_thought(where, item))
            case CallItem():
                function = GivenFunction(name=item.name, arguments=item.arguments)
                self.calls.append(GivenCall(id=item.call_id, function=function))
            case OutputItem():
                content = plain(where, item.output)
                self.add(GivenMessage(role="tool", tool_call_id=item.call_id, content=content))
            case _:
                known = ", ".join(KINDS)
                told = f"{where}: items of type {item.type[:40]!r} mean nothing here"
                raise ApiError(400, f"{told}; there are: {known}")

    def _end_turn(self) -> None:
        if self.thoughts or self.texts or self.calls:
            message = GivenMessage(
                role="assistant",
                content=PART_END.join(self.texts),
                reasoning_content="\n".join(self.thoughts) if self.thoughts else None,
                tool_calls=self.calls or None,
            )
            self.done.append(message)
            self.thoughts, self.texts, self.calls = [], [], []


def plain(where: str, content: str | Sequence[Part]) -> str:
    """The text of a content. ApiError 400 for an image or the like."""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in (*TEXTS, "refusal"):
            told = f"{where}.content[{index}]: the models here read text only"
            raise ApiError(400, f"{told}; leave out what is of type {part.type[:40]!r}")
        if text is None:
            raise misfit(f"{where}.content[{index}]", "missing field `text`")
        texts.append(text)
    return PART_END.join(texts)


def _thought(where: str, item: ReasoningItem) -> str:
    if item.content:
        return "\n".join(plain(where, [part]) for part in item.content)
    return unsealed(item.encrypted_content or "")


def sealed(thought: str) -> str:
    """For clients that send back nothing else of a thought. Not a secret: it is told in clear."""
    return SEAL + base64.b64encode(thought.encode()).decode()


def unsealed(text: str) -> str:
    """The thought again; nothing for another server's."""
    if not text.startswith(SEAL):
        return ""
    try:
        return base64.b64decode(text.removeprefix(SEAL), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def check_calls(items: Sequence[Item]) -> None:
    calls = {item.call_id for item in items if isinstance(item, CallItem)}
    outputs = {item.call_id for item in items if isinstance(item, OutputItem)}
    for call in sorted(outputs - calls):
        raise ApiError(400, f"No tool call found for tool output with call_id {call}.")
    for call in sorted(calls - outputs):
        raise ApiError(400, f"No tool output found for tool call {call}.")
