"""What a model is told of its tools where its own template tells it nothing.

The templates of V3, R1, V3.1 and the distils write calls, and take no notice of ``tools``: who uses
them is meant to put these into the system message. The words for that are those of DeepSeek-V3.1's
model card, with the call in the frame that the model's own template writes. Whether a template
takes notice is asked of the template: a prompt with a tool in it is then another prompt.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qiusuo.data.chat_template import Message, render_chat
from qiusuo.data.errors import DataError
from qiusuo.data.tool_format import PROBE, TOOL, Frame, frame_written

BEFORE = "\n\n"  # between the system message's own words and these
SYSTEM: Message = {"role": "system", "content": "!"}
NAME, ARGUMENTS = "tool_call_name", "tool_call_arguments"
CHAINED = {"": "without separators or spaces", "\n": "with one line end between them"}


@functools.lru_cache(maxsize=32)
def frame_untold(template: str) -> Frame | None:
    """How to call, where this template writes calls and leaves its tools out; else None."""
    frame = frame_written(template)
    return frame if frame is not None and _leaves_out(template) else None


def _leaves_out(template: str) -> bool:
    """With and without a system message: some show the tools in one only."""
    rendered = False
    for turns in ([PROBE], [SYSTEM, PROBE]):
        try:
            texts = {
                render_chat(template, turns, bos_token="", eos_token="", tools=tools)
                for tools in (None, [TOOL])
            }
        except DataError:  # one that knows no system message, or no such tool
            continue
        rendered = True
        if len(texts) > 1:
            return False
    return rendered


def with_tool_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], frame: Frame
) -> list[Message]:
    """The conversation with the tools at the end of its last system message, which is the one that
    every template shows, or in a new one. `DataError` for a tool that cannot be told of."""
    told = tool_text(tools, frame)
    places = [place for place, one in enumerate(messages) if one["role"] == "system"]
    if not places:
        return [{"role": "system", "content": told}, *messages]
    changed = list(messages)
    system = messages[places[-1]]
    content = system.get("content")
    if content and not isinstance(content, str):
        content = [*content, {"type": "text", "text": BEFORE + told}]
    else:
        content = content + BEFORE + told if content else told
    changed[places[-1]] = {**system, "content": content}
    return changed


def tool_text(tools: Sequence[Mapping[str, Any]], frame: Frame) -> str:
    """The words of the model card of DeepSeek-V3.1 for these tools."""
    call = frame.closing.removesuffix(frame.end)
    chained = CHAINED.get(frame.gap, f"with {json.dumps(frame.gap)} between them")
    return (
        "## Tools\nYou have access to the following tools:\n\n"
        + "".join(map(_described, tools))
        + "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        + f"{frame.opening}{NAME}{frame.naming}{ARGUMENTS}{call}"
        + f"{{additional_tool_calls}}{frame.end}\n\n"
        + "Where:\n"
        + f"- `{NAME}` must be an exact match to one of the available tools\n"
        + f"- `{ARGUMENTS}` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        + f"- For multiple tool calls, chain them directly {chained}"
    )


def _described(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise DataError(
            "a tool must be a mapping such as {'type': 'function', 'function': {'name': ..., "
            f"'description': ..., 'parameters': ...}}}}, not {tool!r:.80}"
        )
    try:
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"tool {name!r}: its parameters cannot be written as JSON: {error}"
        ) from error
    description = function.get("description") or ""
    return f"### {name}\nDescription: {description}\n\nParameters: {parameters}\n\n"
