"""From the body of a request to ``/anthropic/v1/messages`` to a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from qiusuo.server.api.anthropic_messages import Message, System, chat_messages
from qiusuo.server.api.chat_request import (
    ChatRequest,
    Effort,
    Function,
    JSONSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Thinking,
    Tool,
)
from qiusuo.server.api.errors import ApiError, misfit
from qiusuo.server.api.fields import Body, Count, Number, sayable


class NoThreadsError(ApiError):
    """In the form that tells Anthropic's client to send all of the conversation instead."""

    def __init__(self) -> None:
        super().__init__(400, "thread: this server keeps no conversations; send all messages")

    @property
    def anthropic_body(self) -> dict[str, Any]:
        told = super().anthropic_body
        details = {"error_code": "thread_unsupported_request", "unsupported": []}
        told["error"]["details"] = details
        return told


class ClientTool(Body):
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class ThinkingConfig(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


class JSONFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Effort | None = None
    format: JSONFormat | None = None


class Metadata(Body):
    user_id: str | None = None


class CountRequest(Body):
    """What is read of a conversation, which can be counted without an answer."""

    model: str
    messages: list[Message]
    system: System | None = None
    tools: list[ClientTool] | None = None
    tool_choice: Choice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    thread: Any = None

    _sayable = model_validator(mode="before")(sayable)

    def chat(self, model: str) -> ChatRequest:
        """The same question to the chat API. ApiError 400 for what cannot be asked there."""
        if self.thread is not None:
            raise NoThreadsError
        thinking = self.thinking
        output = self.output_config or OutputConfig()
        return ChatRequest(
            model=model,
            messages=chat_messages(self.system, self.messages),
            thinking=None if thinking is None else Thinking(type=thinking.type),
            thinking_budget=None if thinking is None else thinking.budget_tokens,
            reasoning_effort=output.effort,
            response_format=_format(output.format),
            tools=_tools(self.tools or ()),
            tool_choice=_choice(self.tool_choice),
        )


class MessagesRequest(CountRequest):
    max_tokens: Count
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None

    def chat(self, model: str) -> ChatRequest:
        more: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "user_id": None if self.metadata is None else self.metadata.user_id,
        }
        return super().chat(model).model_copy(update=more)


# -- tools and formats ----------------------------------------------------------------------


def _tools(tools: Sequence[ClientTool]) -> list[Tool]:
    told = []
    for place, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            raise ApiError(400, f"tools[{place}]: server tools are not supported")
        if tool.input_schema is None:
            raise misfit(f"tools[{place}]", "missing field `input_schema`")
        function = Function(
            name=tool.name, description=tool.description, parameters=tool.input_schema
        )
        told.append(Tool(type="function", function=function))
    return told


def _choice(choice: Choice | None) -> Literal["none", "auto", "required"] | NamedTool | None:
    if choice is None or choice.type == "auto":
        return None
    if choice.type == "any":
        return "required"
    if choice.type == "none":
        return "none"
    if choice.name is None:
        raise misfit("tool_choice", "missing field `name`")
    return NamedTool(function=NamedFunction(name=choice.name))


def _format(form: JSONFormat | None) -> ResponseFormat | None:
    if form is None:
        return None
    return ResponseFormat(type="json_schema", json_schema=JSONSchema(schema=form.schema_))
