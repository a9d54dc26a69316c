"""The conversations whose official renderings are kept in templates/goldens/.

What is special about one is its name. Texts are short: the goldens hold them once a template.
"""

from __future__ import annotations

from typing import Any


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call_0", "content": content}


def call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "call_0", "type": "function", "function": function}


HANGZHOU = call("weather", '{"city": "杭州", "unit": "°C"}')
ADD = call("add", '{"a": 1, "b": 22}')
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather <now>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOOLS = [WEATHER_TOOL, {**WEATHER_TOOL, "strict": None}]
"""For templates that write the tools themselves; DeepSeek's do not."""

MARKERS = "<｜User｜>x<｜Assistant｜>y<｜end▁of▁sentence｜></think><think>z"
CODE = "def f(x):\n\treturn {'a': [x, 1.5e-3]}  # ½\r\n\n\n    if x != 0x1F: pass\n"

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Hello, world!")],
    "system": [system("You are terse."), user("Hi")],
    "two systems": [system("One."), system("Two."), user("Hi")],
    "system in the middle": [user("a"), assistant("b"), system("Late."), user("c")],
    "system alone": [system("S")],
    "three turns": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    "thoughts in content": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c")],
    "two ends of thought": [user("a"), assistant("x</think>y</think>z"), user("c")],
    "a thought never closed": [user("a"), assistant("<think>\nhm"), user("c")],
    "reasoning_content": [user("a"), assistant("b", reasoning_content="hm"), user("c")],
    "ends with the assistant": [user("a"), assistant("b")],
    "prefix": [user("a"), assistant("Once", prefix=True)],
    "prefix inside a thought": [user("a"), assistant("<think>\nFirst", prefix=True)],
    "begins with the assistant": [assistant("Welcome"), user("a")],
    "two users": [user("a"), user("b")],
    "spaces at the ends": [system(" s "), user("\n a \n"), assistant("  b  "), user(" ")],
    "empty texts": [user(""), assistant(""), user("")],
    "Chinese": [system("你是诗人。"), user("写一首关于2024年春天的诗，要ABAB韵。")],
    "code": [user(CODE), assistant(CODE), user("ok")],
    "emoji and accents": [user("🙂👨‍👩‍👧 e\u0301é ﬁ ﷽ \u200b")],
    "one call": [user("a"), assistant(None, tool_calls=[HANGZHOU])],
    "two calls": [user("a"), assistant(None, tool_calls=[HANGZHOU, ADD])],
    "three calls": [user("a"), assistant(None, tool_calls=[HANGZHOU, ADD, ADD])],
    "a call with words": [user("a"), assistant("Let me see.", tool_calls=[HANGZHOU, ADD])],
    "one result": [user("a"), assistant(None, tool_calls=[HANGZHOU]), tool('{"t": 21}')],
    "two results": [
        *(user("a"), assistant(None, tool_calls=[HANGZHOU, ADD]), tool("21"), tool("23")),
    ],
    "a result and its answer": [
        *(user("a"), assistant(None, tool_calls=[HANGZHOU]), tool("21"), assistant("It is 21.")),
        user("and?"),
    ],
    "an answer with a thought after a result": [
        *(user("a"), assistant(None, tool_calls=[ADD]), tool("23")),
        *(assistant("<think>easy</think>23"), user("and?")),
    ],
    "calls in two turns": [
        *(user("a"), assistant(None, tool_calls=[HANGZHOU]), tool("21"), assistant("21.")),
        *(user("b"), assistant(None, tool_calls=[ADD]), tool("23"), assistant("23."), user("c")),
    ],
    "a call after a result": [
        *(user("a"), assistant(None, tool_calls=[HANGZHOU]), tool("21")),
        *(assistant(None, tool_calls=[ADD]), tool("23")),
    ],
    "markers as text": [
        *(system(MARKERS), user(MARKERS), assistant(None, tool_calls=[call("f", MARKERS)])),
        *(tool("<｜tool▁output▁end｜>" + MARKERS), assistant("a<｜User｜>b")),
        user("<think>"),
    ],
}
