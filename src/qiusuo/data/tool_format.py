"""How a model's own template writes calls of tools.

No format is looked up by a model's name: the template is asked to write calls, and what it puts
before, inside, between and behind them is the frame that the model was taught. The engine reads
such calls (engine/tool_calls.py) and forces them (engine/forced_calls.py); a model whose template
does not tell it of its tools is told in the same frame (tool_text.py).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qiusuo.data.chat_template import Message, render_chat
from qiusuo.data.errors import DataError
from qiusuo.data.vocabularies import TOOL_TOKENS

CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, *_OUTPUTS, SEPARATOR = TOOL_TOKENS
OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolFormat(StrEnum):
    DEEPSEEK = "deepseek"  # V3, R1 and V3.1
    HERMES = "hermes"  # Hermes, Qwen2.5 and Qwen3


MARKS = {  # that the first call of a turn begins with, and the last ends with: the outermost first
    ToolFormat.DEEPSEEK: ((CALLS_BEGIN, CALL_BEGIN), (CALLS_END, CALL_END)),
    ToolFormat.HERMES: ((OPEN,), (CLOSE,)),
}
PROBE: Message = {"role": "user", "content": "?"}
NAME, NAMES = "probe", ("first_probe", "second_probe")
ARGUMENTS = json.dumps({"probe": 1})
TOOL = {
    "type": "function",
    "function": {
        "name": "other",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}
WRITTEN = {
    ToolFormat.DEEPSEEK: rf"{CALL_BEGIN}(function{SEPARATOR})?{NAME}({SEPARATOR}|\n)",
    ToolFormat.HERMES: rf'{OPEN}\s*{{\s*"name":\s*"{NAME}"',
}


@dataclass(frozen=True)
class Frame:
    """What a template writes around calls: ``opening`` NAME ``naming`` ARGUMENTS, then ``between``
    and the next NAME, or ``closing``. Of ``between``, ``gap`` is what belongs to neither call; of
    ``closing``, ``end`` what closes the calls and not the last of them."""

    opening: str
    naming: str
    between: str
    closing: str
    gap: str
    end: str


@functools.lru_cache(maxsize=32)
def format_written(template: str) -> ToolFormat | None:
    """None if this template writes no calls, or in another way.

    It is asked with a call, not searched for marks: many formats share them, and a vocabulary may
    have marks that the model was never taught to use."""
    text = _calling(template, [NAME], "{}")
    return next((form for form, call in WRITTEN.items() if re.search(call, text)), None)


@functools.lru_cache(maxsize=32)
def frame_written(template: str) -> Frame | None:
    """None where there is none of a known format."""
    form = format_written(template)
    text = _calling(template, NAMES, ARGUMENTS)
    if form is None or text.count(ARGUMENTS) != len(NAMES):
        return None
    first, second = (text.index(name) for name in NAMES)
    arguments = text.index(ARGUMENTS, first)
    behind, last = arguments + len(ARGUMENTS), text.index(ARGUMENTS, second) + len(ARGUMENTS)
    begins, ends = MARKS[form]
    start = next((place for mark in begins if (place := text.rfind(mark, 0, first)) >= 0), None)
    stop = next((place + len(mark) for mark in ends if (place := text.find(mark, last)) >= 0), None)
    if start is None or stop is None:  # calls that never end are of no format
        return None
    between, closing = text[behind:second], text[last:stop]
    return Frame(
        opening=text[start:first],
        naming=text[first + len(NAMES[0]) : arguments],
        between=between,
        closing=closing,
        gap=between.partition(ends[-1])[2].rpartition(begins[-1])[0],
        end=closing.partition(ends[-1])[2],
    )


def _calling(template: str, names: Sequence[str], arguments: str) -> str:
    """What the template writes for these calls, nothing where it refuses them."""
    calls: list[Mapping[str, Any]] = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}
        for name in names
    ]
    turns: list[Message] = [PROBE, {"role": "assistant", "tool_calls": calls}]
    try:
        return render_chat(
            template,
            turns,
            bos_token="",
            eos_token="",
            add_generation_prompt=False,
            tools=[TOOL],
        )
    except DataError:
        return ""
