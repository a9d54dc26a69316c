"""From the body of a request to ``/responses`` to a chat request.

Nothing is kept here between two requests, as in DeepSeek's API, so what refers to an earlier
response is refused: to leave it out in silence would make a model forget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from qiusuo.server.api.chat_messages import GivenMessage
from qiusuo.server.api.chat_request import (
    ChatRequest,
    Effort,
    Function,
    JSONSchema,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Tool,
)
from qiusuo.server.api.errors import ApiError, misfit
from qiusuo.server.api.fields import Body, Count, Number, sayable
from qiusuo.server.api.responses_items import Input, ItemMessages, check_calls

KEPT_ELSEWHERE = ("previous_response_id", "conversation", "prompt")
LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"  # of `include`


class FlatTool(Body):
    """A function. Tools that only OpenAI's own servers have are not shown to the model."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(Body):
    type: Literal["function"]
    name: str


class Reasoning(Body):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(Body):
    model: str
    input: Input | None = None
    instructions: str | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    max_output_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

    _sayable = model_validator(mode="before")(sayable)

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    @property
    def wants_seal(self) -> bool:
        return SEALED in (self.include or ())

    def chat(self) -> ChatRequest:
        """The same question to the chat API. ApiError 400 for what cannot be asked there."""
        self._check_alone()
        reasoning = self.reasoning or Reasoning()
        return ChatRequest(
            model=self.model,
            messages=self._messages(),
            tools=_tools(self.tools or ()),
            tool_choice=_choice(self.tool_choice),
            reasoning_effort=reasoning.effort,
            response_format=_format(self.text),
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=self.wants_logprobs,
            top_logprobs=self.top_logprobs if self.wants_logprobs else None,
            user_id=self.safety_identifier or self.user,
        )

    def _check_alone(self) -> None:
        for name in KEPT_ELSEWHERE:
            if getattr(self, name) is not None:
                told = f"{name}: this server keeps no responses; send all of the conversation"
                raise ApiError(400, f"{told} as `input`", param=name)
        if self.background:
            told = "background: this server keeps no responses; leave it out, or use `stream`"
            raise ApiError(400, told, param="background")

    def _messages(self) -> list[GivenMessage]:
        if self.input is None and self.instructions is None:
            raise ApiError(400, "Either input or instructions must be provided")
        if self.input == []:
            raise ApiError(400, "Input items array must not be empty")
        told = ItemMessages()
        if self.instructions is not None:
            told.add(GivenMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            told.add(GivenMessage(role="user", content=self.input))
        elif self.input is not None:
            check_calls(self.input)
            for place, item in enumerate(self.input):
                told.take(f"input[{place}]", item)
        return told.all()


# -- tools and formats ----------------------------------------------------------------------


def _tools(tools: Sequence[FlatTool]) -> list[Tool]:
    told = []
    for place, tool in enumerate(tools):
        if tool.type == "custom":
            raise ApiError(400, f"tools[{place}]: custom tools are not supported; use a function")
        if tool.type != "function":
            continue
        if tool.name is None:
            raise misfit(f"tools[{place}]", "missing field `name`")
        function = Function(
            name=tool.name, description=tool.description, parameters=tool.parameters
        )
        told.append(Tool(type="function", function=function))
    return told


def _choice(
    choice: Literal["none", "auto", "required"] | FlatChoice | None,
) -> Literal["none", "auto", "required"] | NamedTool | None:
    if isinstance(choice, FlatChoice):
        return NamedTool(function=NamedFunction(name=choice.name))
    return choice


def _format(text: TextConfig | None) -> ResponseFormat | None:
    form = None if text is None else text.format
    if form is None:
        return None
    if form.type != "json_schema":
        return ResponseFormat(type=form.type)
    if form.schema_ is None:
        raise misfit("text.format", "missing field `schema`")
    return ResponseFormat(type="json_schema", json_schema=JSONSchema(schema=form.schema_))
