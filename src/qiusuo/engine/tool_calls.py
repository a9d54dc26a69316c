"""Which way a model writes calls of tools, and the parser that reads it while it comes."""

from __future__ import annotations

import re
from enum import StrEnum

from qiusuo.data.chat_template import Message, render_chat
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.deepseek_calls import CALL_BEGIN, SEPARATOR, DeepSeekCalls
from qiusuo.engine.hermes_calls import OPEN, HermesCalls


class ToolFormat(StrEnum):
    DEEPSEEK = "deepseek"  # V3, R1 and V3.1; see deepseek_calls.py
    HERMES = "hermes"  # Hermes, Qwen2.5 and Qwen3; see hermes_calls.py

    def parser(self) -> DeepSeekCalls | HermesCalls:
        return DeepSeekCalls() if self is ToolFormat.DEEPSEEK else HermesCalls()


NAME = "probe"
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "0", "type": "function", "function": {"name": NAME, "arguments": "{}"}}
        ],
    },
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "other",
            "description": "",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
WRITTEN = {
    ToolFormat.DEEPSEEK: rf"{CALL_BEGIN}(function{SEPARATOR})?{NAME}({SEPARATOR}|\n)",
    ToolFormat.HERMES: rf'{OPEN}\s*{{\s*"name":\s*"{NAME}"',
}


def format_of(tokenizer: Tokenizer) -> ToolFormat | None:
    """How this model's own template writes a call; None if it writes none, or in another way.

    The template is asked with a call, not searched for marks: many formats share them, and a
    vocabulary may have marks that the model was never taught to use."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = render_chat(
            tokenizer.chat_template,
            PROBE,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
            add_generation_prompt=False,
            tools=TOOLS,
        )
    except DataError:
        return None
    return next((form for form, call in WRITTEN.items() if re.search(call, text)), None)
