"""What a body of /anthropic/v1/messages asks for, against DeepSeek's own package."""

import json
import re

import deepseek_recipe
import pytest

from qiusuo.server.api.anthropic_request import MessagesRequest
from qiusuo.server.api.chat_messages import engine_messages
from qiusuo.server.api.errors import ApiError
from tests.server.api import recipe
from tests.server.api.test_anthropic_events import TOOL
from tests.server.api.test_responses_events import recipe_options


def user(*blocks: dict | str) -> dict:
    if len(blocks) == 1 and isinstance(blocks[0], str):
        return {"role": "user", "content": blocks[0]}
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: dict) -> dict:
    return {"role": "assistant", "content": list(blocks)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def thought(words: str) -> dict:
    return {"type": "thinking", "thinking": words, "signature": "anybody's"}


def use(identity: str, city: str = "Paris") -> dict:
    return {"type": "tool_use", "id": identity, "name": "get_weather", "input": {"city": city}}


def result(identity: str, content: str | list | None = None, **more) -> dict:
    told = {"type": "tool_result", "tool_use_id": identity} | more
    return told if content is None else told | {"content": content}


CASES = {
    "text": [user("hi")],
    "block": [user(text("hi"))],
    "two users": [user("a"), user("b")],
    "history": [user("a"), {"role": "assistant", "content": "b"}, user("c")],
    "blocks of an answer": [user("a"), assistant(thought("A"), thought("B"), text("q"), text("w")),
                            user("c")],
    "a call": [user("a"), assistant(use("1")), user(result("1", "sunny"))],
    "a result of nothing": [user("a"), assistant(use("1")), user(result("1"))],
    "calls in a loop": [
        user("a"),
        assistant(thought("th"), text("t"), use("1", "求"), use("2")),
        user(result("1", [text("x"), text("y")]), result("2", "z"), text("go on")),
        assistant(use("3")),
        user(result("3", "o")),
    ],
}  # fmt: skip


def ours(messages: list[dict], **more) -> list[dict]:
    body = {"model": recipe.MODEL, "max_tokens": 9, "messages": messages, "tools": [TOOL]} | more
    chat = MessagesRequest.model_validate(body).chat(recipe.MODEL)
    return [
        {
            "role": one["role"],
            "content": one["content"],
            "thought": one.get("reasoning_content") or None,
            "calls": [
                (call["id"], call["function"]["name"], call["function"]["arguments"])
                for call in one.get("tool_calls", [])
            ],
            "answers": one.get("tool_call_id"),
        }
        for one in engine_messages(chat.messages)
    ]


def theirs(messages: list[dict], **more) -> list[dict]:
    body = {"model": recipe.MODEL, "max_tokens": 9, "messages": messages, "tools": [TOOL]} | more
    asked = deepseek_recipe.MessagesRequest(json.dumps(body)).convert(recipe_options())
    return [
        {
            "role": one.role,
            "content": one.content,
            "thought": one.reasoning_content or None,
            "calls": [(call.id, call.name, call.arguments) for call in one.tool_calls or []],
            "answers": one.tool_call_id,
        }
        for one in asked.conversation.messages
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("system", [None, "s", [text("a"), text("b")]])
def test_blocks_become_messages_as_in_deepseeks_package(case: str, system: object) -> None:
    more = {} if system is None else {"system": system}
    assert ours(CASES[case], **more) == theirs(CASES[case], **more)


REFUSED = {
    "nothing": [],
    "no content": [user("a"), {"role": "user", "content": []}],
    "a call without a result": [user("a"), assistant(use("1"), use("2")), user(result("2", "x"))],
    "words instead of a result": [user("a"), assistant(use("1")), user("x")],
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_those_of_deepseeks_package(case: str) -> None:
    with pytest.raises(ApiError) as refused:
        ours(REFUSED[case])
    with pytest.raises(deepseek_recipe.ConversionError) as wanted:
        theirs(REFUSED[case])
    told = json.loads(wanted.value.body)["error"]["message"]
    assert refused.value.status == wanted.value.status_code
    assert plain(refused.value.message) == plain(told)


def plain(words: str) -> str:
    """Without the place, where that package counts from a call or from its result."""
    return re.sub(r"^messages\.[12]: ?", "", words)


@pytest.mark.parametrize(
    ("messages", "more", "why"),
    [
        ([user({"type": "image", "source": {}})], {}, "messages.0.content.0: the models here read"),
        ([user(result("1", "x"))], {}, "unexpected `messages.0: tool_use_id` found"),
        ([user("a"), assistant(use("1"))], {}, "without `tool_result` blocks immediately after: 1"),
        ([user("a"), assistant(use("1")), user(result("1", [{"type": "image"}]))], {},
         "`tool_result` 1.content.0: the models here read text only"),
        ([{"role": "system", "content": [result("1", "x")]}], {}, "has no `tool_result` blocks"),
        ([user(use("1"))], {}, "a message of the user's has no `tool_use` blocks"),
        ([user("a")], {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "server tools"),
        ([user("a")], {"tools": [{"name": "x"}]}, "tools[0]: missing field `input_schema`"),
        ([user("a")], {"tool_choice": {"type": "tool"}}, "tool_choice: missing field `name`"),
    ],
)  # fmt: skip
def test_refusals_say_what_would_do(messages: list[dict], more: dict, why: str) -> None:
    with pytest.raises(ApiError) as refused:
        ours(messages, **more)
    assert why in refused.value.message
    assert refused.value.status in (400, 422)


def test_wider_than_deepseeks_package() -> None:
    """Blocks of a user's words are one message, results may stand behind them, a failed tool is
    marked, another server's secret thoughts are passed over, and system messages may come late."""
    assert ours([user(text("a"), text("b"))])[0]["content"] == "a\n\nb"
    told = ours([user("a"), assistant(use("1")), user(text("so"), result("1", "x", is_error=True))])
    assert [one["content"] for one in told] == ["a", "", "Error: x", "so"]
    secret = {"type": "redacted_thinking", "data": "x"}
    told = ours([user("a"), assistant(secret, text("b")), {"role": "system", "content": "s"}])
    assert [(one["role"], one["content"]) for one in told] == [
        ("user", "a"), ("assistant", "b"), ("system", "s")
    ]  # fmt: skip


def test_the_assistants_last_message_is_gone_on_with() -> None:
    def prefix(*messages: dict) -> bool:
        body = {"model": "m", "max_tokens": 9, "messages": list(messages)}
        return bool(MessagesRequest.model_validate(body).chat("m").messages[-1].prefix)

    assert prefix(user("a"), assistant(text("b")))
    assert not prefix(user("a"), assistant(text("b")), user("c"))


def test_the_rest_of_a_body() -> None:
    schema = {"type": "object"}
    body = {
        "model": "claude-something",
        "max_tokens": 7,
        "messages": [user("hi")],
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "stop_sequences": ["x"],
        "metadata": {"user_id": "me"},
        "thinking": {"type": "enabled", "budget_tokens": 40},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": schema}},
        "tools": [TOOL | {"type": "custom"}],
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }
    asked = MessagesRequest.model_validate(body).chat("talker")
    assert (asked.model, asked.max_tokens, asked.asked_for) == ("talker", 7, "me")
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.5, 0.25, 3)
    assert asked.sampling()["stop"] == ("x",)
    assert (asked.thinking.type, asked.thinking_budget) == ("enabled", 40)
    assert asked.reasoning_effort == "low"
    assert asked.response_format.json_schema.schema_ == schema
    assert asked.tools[0].function.parameters == TOOL["input_schema"]
    assert asked.tool_choice.function.name == "get_weather"


@pytest.mark.parametrize(
    ("choice", "told"), [("auto", None), ("any", "required"), ("none", "none")]
)
def test_choices(choice: str, told: str | None) -> None:
    body = {"model": "m", "max_tokens": 9, "messages": [user("a")], "tool_choice": {"type": choice}}
    assert MessagesRequest.model_validate(body).chat("m").tool_choice == told
