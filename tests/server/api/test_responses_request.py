"""What a body of /responses asks for, against DeepSeek's own package."""

import json

import deepseek_recipe
import pytest

from qiusuo.server.api.chat_messages import engine_messages
from qiusuo.server.api.errors import ApiError
from qiusuo.server.api.responses_items import sealed
from qiusuo.server.api.responses_request import ResponsesRequest
from tests.server.api import recipe
from tests.server.api.test_responses_events import TOOL, recipe_options


def message(role: str, *texts: str, kind: str = "input_text") -> dict:
    return {"role": role, "content": [{"type": kind, "text": text} for text in texts]}


def said(*texts: str) -> dict:
    return {"type": "message", "status": "completed", "id": "msg_1"} | message(
        "assistant", *texts, kind="output_text"
    )


def thought(*texts: str) -> dict:
    content = [{"type": "reasoning_text", "text": text} for text in texts]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content}


def called(identity: str, city: str = "Paris") -> dict:
    arguments = json.dumps({"city": city})
    return {
        "type": "function_call",
        "call_id": identity,
        "name": "get_weather",
        "arguments": arguments,
    }


def output(identity: str, text: str | list) -> dict:
    return {"type": "function_call_output", "call_id": identity, "output": text}


USER = {"role": "user", "content": "hi"}
INPUTS = {
    "text": "hi",
    "empty text": "",
    "parts": [message("user", "a", "b")],
    "a system message": [{"role": "system", "content": "s"}, USER],
    "an old answer": [USER, said("a"), {"role": "user", "content": "more"}],
    "an old answer with its thought": [USER, thought("th"), said("a"), USER],
    "thoughts": [USER, thought("A", "B"), thought("C"), said("a"), USER],
    "several texts": [USER, said("a", "b"), {"role": "assistant", "content": "c"}, USER],
    "calls, results in another order": [
        USER,
        thought("th"),
        said("a"),
        called("1"),
        called("2", "Rome"),
        output("2", "rainy"),
        output("1", [{"type": "input_text", "text": "sunny"}]),
    ],
    "one call after another": [
        USER, thought("x"), called("1"), output("1", "o"), thought("y"), called("2"),
        output("2", "p"),
    ],
}  # fmt: skip


def ours(**body) -> list[dict]:
    request = ResponsesRequest.model_validate({"model": recipe.MODEL} | body)
    messages = engine_messages(request.chat().messages)
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
        for one in messages
    ]


def theirs(**body) -> list[dict]:
    text = json.dumps({"model": recipe.MODEL} | body)
    asked = deepseek_recipe.ResponsesRequest(text).convert(recipe_options())
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


@pytest.mark.parametrize("case", INPUTS)
def test_items_become_messages_as_in_deepseeks_package(case: str) -> None:
    body = {"input": INPUTS[case], "tools": [TOOL]}
    assert ours(**body) == theirs(**body)
    assert ours(**body, instructions="I") == theirs(**body, instructions="I")


def test_instructions_alone() -> None:
    assert [one["role"] for one in ours(instructions="I")] == ["system"]


REFUSED = {
    "nothing": {},
    "no items": {"input": []},
    "a call without a result": {"input": [USER, called("1")]},
    "a result without a call": {"input": [USER, output("1", "o")]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_those_of_deepseeks_package(case: str) -> None:
    with pytest.raises(ApiError) as refused:
        ours(**REFUSED[case])
    with pytest.raises(deepseek_recipe.ConversionError) as wanted:
        theirs(**REFUSED[case])
    told = json.loads(wanted.value.body)["error"]["message"]
    assert (refused.value.status, refused.value.message) == (wanted.value.status_code, told)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: this server keeps no"),
        ({"conversation": "conv_1"}, "conversation: this server keeps no"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt: this server keeps no"),
        ({"background": True}, "background: this server keeps no"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "type 'item_reference'"),
        ({"input": [message("user", "x", kind="input_image")]}, "input[0].content[0]: the models"),
        ({"input": [USER, {"role": "user", "content": [{"type": "input_text"}]}]},
         "input[1].content[0]: missing field `text`"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0]: custom tools"),
        ({"tools": [{"type": "function"}]}, "tools[0]: missing field `name`"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "missing field `schema`"),
    ],
)  # fmt: skip
def test_refusals_say_what_would_do(body: dict, why: str) -> None:
    with pytest.raises(ApiError) as refused:
        ours(**{"input": "hi"} | body)
    assert why in refused.value.message
    assert refused.value.status in (400, 422)


def test_a_sealed_thought_is_read_where_there_is_no_other() -> None:
    def thought_of(**item) -> str | None:
        reasoning = {"type": "reasoning", "summary": []} | item
        return ours(input=[USER, reasoning, said("a"), USER])[1]["thought"]

    assert thought_of(encrypted_content=sealed("hm")) == "hm"
    assert (
        thought_of(encrypted_content=sealed("hm"), content=thought("clear")["content"]) == "clear"
    )
    assert thought_of(encrypted_content="another server's") is None
    assert thought_of() is None


def test_the_rest_of_a_body() -> None:
    schema = {"type": "object"}
    asked = ResponsesRequest.model_validate(
        {
            "model": "m",
            "input": "hi",
            "max_output_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.25,
            "top_logprobs": 3,
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}},
            "tools": [TOOL, {"type": "web_search"}],
            "tool_choice": {"type": "function", "name": "get_weather"},
            "safety_identifier": "me",
            "user": "you",
            "store": True,
        }
    ).chat()
    assert (asked.max_tokens, asked.temperature, asked.top_p) == (7, 0.5, 0.25)
    assert (asked.logprobs, asked.top_logprobs) == (True, 3)
    assert asked.reasoning_effort == "low"
    assert asked.response_format.json_schema.schema_ == schema
    assert [tool.function.name for tool in asked.tools] == ["get_weather"]
    assert asked.tool_choice.function.name == "get_weather"
    assert asked.asked_for == "me"
