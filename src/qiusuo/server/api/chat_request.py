"""From the body of a chat request to what the desk is asked.

The rules are those of DeepSeek's API, as its own ``deepseek-recipe`` applies them (the tests hold
one against the other), and wider where a client gains: ``n`` above 1, schemas of any kind,
``tool_choice`` while thinking, the role ``developer``, and ``reasoning`` for ``reasoning_content``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from qiusuo.engine.constraint import Constraint
from qiusuo.server.api.chat_messages import GivenMessage, engine_messages
from qiusuo.server.api.errors import ApiError, misfit
from qiusuo.server.api.fields import Body, Count, SamplingFields, most_tokens, top_logprobs
from qiusuo.server.question import ChatQuestion
from qiusuo.server.registry import ServedModel
from qiusuo.server.settings import Settings

LOW_EFFORT_TOKENS = 1024  # that a thought of little effort may have
TOOL_NAME = re.compile(r"^[a-zA-Z0-9_-]+$")

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"]


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class JSONSchema(Body):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JSONSchema | None = None
    regex: str | None = None


class ChatRequest(SamplingFields):
    """``thinking_budget``: tokens that a thought may have (not in DeepSeek's API)."""

    messages: list[GivenMessage]
    max_completion_tokens: Count | None = None
    thinking: Thinking | None = None
    reasoning_effort: Effort | None = None
    thinking_budget: Count | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def thinks(self, model: ServedModel) -> bool:
        """Where the request does not say, a model that can think does, but under the old name
        that stood for a model that did not."""
        if self.thinking is not None:
            wanted = self.thinking.type != "disabled"
        elif self.reasoning_effort is not None:
            wanted = self.reasoning_effort != "none"
        else:
            wanted = self.model != "deepseek-chat"
        return wanted and model.thinks

    def question(self, model: ServedModel, settings: Settings) -> ChatQuestion:
        """ApiError 400 for what cannot be asked."""
        self.check(settings.most_answers)
        if len(self.messages) > settings.most_messages:
            raise ApiError(400, f"Too many messages: this server reads {settings.most_messages}")
        thinking = self.thinks(model)
        limit = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        options = self.sampling() | dict(
            thinking=thinking,
            max_tokens=most_tokens(limit, 1, settings.most_tokens, settings.most_tokens),
        )
        if (budget := self._thinking_budget()) is not None:
            options["thinking_budget"] = budget
        if (constraint := _constraint(self.response_format)) is not None:
            options["constraint"] = constraint
        options |= _tools(self.tools or [], self.tool_choice)
        messages = engine_messages(self.messages)
        if messages[-1].get("prefix"):
            self._check_prefixed()
            options["continue_last"] = True
        if self.logprobs:
            options["logprobs"] = top_logprobs(self.top_logprobs)
        elif self.top_logprobs is not None:
            raise ApiError(
                400,
                "Invalid top_logprobs and logprobs value, logprobs must be set to true if "
                "top_logprobs is used.",
            )
        return ChatQuestion(self.model, messages, options, self.asked_for)

    def _check_prefixed(self) -> None:
        """An answer whose beginning is given cannot be one of calls, or JSON from the start."""
        if self.response_format is not None and self.response_format.type == "json_object":
            raise ApiError(400, "response_format json_object should not be used with prefix")
        if self.tools:
            raise ApiError(400, "Function call should not be used with prefix")

    def _thinking_budget(self) -> int | None:
        if self.thinking_budget is not None:
            return self.thinking_budget
        return LOW_EFFORT_TOKENS if self.reasoning_effort in ("minimal", "low") else None


# -- tools and formats ----------------------------------------------------------------------


def _tools(tools: Sequence[Tool], choice: str | NamedTool | None) -> dict[str, Any]:
    """``none`` takes the tools out of the prompt too: a model that sees them calls them."""
    names = [tool.function.name for tool in tools]
    for place, name in enumerate(names):
        if not TOOL_NAME.fullmatch(name):
            raise ApiError(
                400,
                f"Invalid 'tools[{place}].function.name': string does not match pattern. Expected "
                f"a string that matches the pattern '{TOOL_NAME.pattern}'.",
            )
    if len(set(names)) < len(names):
        raise ApiError(400, "Tool names must be unique.")
    if not tools or choice == "none":
        return {}
    options: dict[str, Any] = {"tools": [_tool(tool.function) for tool in tools]}
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise ApiError(
                400,
                f"Invalid value for 'tool_call': no function named '{name}' was specified in the "
                "'tools' parameter.",
            )
        options["must_call"] = name
    elif choice == "required":
        options["must_call"] = True
    return options


def _tool(function: Function) -> dict[str, Any]:
    told = {
        "name": function.name,
        "description": function.description or "",
        "parameters": function.parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": told}


def _constraint(form: ResponseFormat | None) -> Constraint | None:
    match form:
        case ResponseFormat(type="json_object"):
            return Constraint("json_object")
        case ResponseFormat(type="json_schema"):
            if form.json_schema is None:
                raise misfit("response_format", "missing field `json_schema`")
            return Constraint("json_schema", form.json_schema.schema_)
        case ResponseFormat(type="regex"):
            if form.regex is None:
                raise misfit("response_format", "missing field `regex`")
            return Constraint("regex", form.regex)
    return None
