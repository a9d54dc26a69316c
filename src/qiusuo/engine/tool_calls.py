"""Which way a model writes calls of tools, and the parser that reads it while it comes."""

from __future__ import annotations

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.tool_format import ToolFormat, format_written
from qiusuo.engine.deepseek_calls import DeepSeekCalls
from qiusuo.engine.hermes_calls import HermesCalls


def parser_of(form: ToolFormat) -> DeepSeekCalls | HermesCalls:
    return DeepSeekCalls() if form is ToolFormat.DEEPSEEK else HermesCalls()


def format_of(tokenizer: Tokenizer) -> ToolFormat | None:
    """How this model's own template writes a call; None if it writes none, or in another way."""
    template = tokenizer.chat_template
    return None if template is None else format_written(template)
