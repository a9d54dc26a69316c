"""The conversion of chat requests against DeepSeek's own package."""

import json
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from qiusuo.engine.constraint import Constraint
from qiusuo.server.api.chat_request import LOW_EFFORT_TOKENS, ChatRequest
from qiusuo.server.api.errors import ApiError
from qiusuo.server.settings import Settings
from tests.server.api.recipe import MODEL, RefusedError, converted

USER = {"role": "user", "content": "hi"}
JSON = {"role": "user", "content": "in json"}
PREFIX = {"role": "assistant", "content": "s", "prefix": True}
THINKER = SimpleNamespace(thinks=True)
PLAIN = {"thinking": {"type": "disabled"}}


def tool(name: str = "f", **more) -> dict:
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
    function = {"name": name, "description": "d", "parameters": parameters}
    return {"type": "function", "function": function | more}


def call(identity: str, name: str = "f", arguments: str = "{}") -> dict:
    return {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def calls(*ids: str, **more) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": [call(i) for i in ids], **more}


def result(identity: str) -> dict:
    return {"role": "tool", "tool_call_id": identity, "content": f"of {identity}"}


def ours(body: dict):
    """Through the same JSON that a client would send."""
    try:
        request = ChatRequest.model_validate_json(json.dumps(body))
        return request.question(THINKER, Settings())
    except ValidationError:
        raise RefusedError(None, "") from None
    except ApiError as error:
        status = None if error.status == 422 else error.status
        raise RefusedError(status, json.dumps(error.body, separators=(",", ":"))) from None


def outcome(convert, body: dict):
    try:
        return convert(body)
    except RefusedError as refused:
        return refused


def both(**body):
    body = {"model": MODEL, "messages": [USER]} | body
    return outcome(ours, body), outcome(converted, body)


def assert_refused(outcome, status: int | None) -> None:
    assert isinstance(outcome, RefusedError), outcome
    assert outcome.status == status


REFUSED = [
    dict(messages=[]),
    dict(temperature=3),
    dict(temperature=-0.1),
    dict(top_p=0),
    dict(top_p=1.1),
    dict(n=0),
    dict(stop=["a"] * 17),
    dict(stop=""),
    dict(stop=["a", ""]),
    dict(max_tokens=0),
    dict(max_tokens=65_537),
    dict(logprobs=True, top_logprobs=21),
    dict(top_logprobs=3),
    dict(presence_penalty=2.5),
    dict(frequency_penalty=-3),
    dict(seed=1 << 63),
    dict(tools=[tool("a b")]),
    dict(tools=[tool(), tool()]),
    dict(tools=[tool()], tool_choice={"type": "function", "function": {"name": "g"}}, **PLAIN),
    dict(stream_options={"include_usage": True}),
    dict(messages=[USER, PREFIX, USER]),
    dict(messages=[USER, PREFIX], tools=[tool()]),
    dict(messages=[USER, PREFIX], tools=[tool()], tool_choice="none"),
    dict(messages=[JSON, PREFIX], tools=[tool()], response_format={"type": "json_object"}),
    dict(messages=[JSON, PREFIX], response_format={"type": "json_object"}, **PLAIN),
    dict(messages=[USER, PREFIX], tools=[tool()], top_logprobs=3),
    dict(messages=[USER, PREFIX], tools=[tool(), tool()]),
    dict(messages=[PREFIX, USER], tools=[tool()]),
    dict(messages=[USER, {"role": "assistant", "content": None}]),
    dict(messages=[USER, {"role": "assistant"}, USER]),
    dict(messages=[USER, {"role": "assistant", "content": "x", "tool_calls": []}]),
    dict(messages=[USER, calls("1")]),
    dict(messages=[USER, calls("1", "2"), result("2")]),
    dict(messages=[USER, calls("1", "2"), result("2"), USER]),
    dict(messages=[USER, calls("1"), result("9")]),
    dict(messages=[USER, result("9")]),
    dict(messages=[USER, calls("1"), result("1"), result("1")]),
]
WRONG_TYPES = [
    dict(messages="x"),
    dict(messages=[{"role": "zz", "content": "s"}]),
    dict(messages=[{"content": "s"}]),
    dict(messages=[{"role": "user"}]),
    dict(messages=[{"role": "user", "content": None}]),
    dict(messages=[{"role": "user", "content": 3}]),
    dict(messages=[{"role": "user", "content": [{"type": "text"}]}]),
    dict(messages=[USER, {"role": "tool", "content": "r"}]),
    dict(response_format={"type": "json_schema"}),
    dict(response_format={"type": "regex"}),
    dict(messages=[{"role": "user", "content": ["a"]}]),
    dict(messages=[USER, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}]),
    dict(model=3),
    dict(temperature="1"),
    dict(top_p=[1]),
    dict(stop=3),
    dict(max_tokens=-1),
    dict(max_tokens=1.5),
    dict(max_tokens="7"),
    dict(seed=-1),
    dict(seed="1"),
    dict(thinking={"type": "x"}),
    dict(thinking="x"),
    dict(reasoning_effort="zzz"),
    dict(response_format={"type": "x"}),
    dict(response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
    dict(tools="x"),
    dict(tools=[{"type": "x"}]),
    dict(tools=[{"type": "function", "function": {}}]),
    dict(tools=[tool()], tool_choice="zz"),
    dict(stream="x"),
    dict(stream=1),
]


@pytest.mark.parametrize("body", REFUSED, ids=str)
def test_what_is_out_of_range_is_refused_in_the_same_words(body: dict) -> None:
    mine, theirs = both(**body)
    assert_refused(theirs, 400)
    assert_refused(mine, 400)
    expected = json.loads(theirs.message)
    if "n" in body:  # of which they allow one
        expected["error"]["message"] = "Invalid n value, the valid range of n is [1, 16]"
    assert json.loads(mine.message) == expected


@pytest.mark.parametrize("body", WRONG_TYPES, ids=str)
def test_wrong_types_are_refused_by_both(body: dict) -> None:
    mine, theirs = both(**body)
    assert_refused(theirs, None)
    assert_refused(mine, None)


ACCEPTED = [
    {},
    dict(temperature=0.7, top_p=0.9, **PLAIN),
    dict(temperature=0, **PLAIN),
    dict(max_tokens=5),
    dict(max_tokens=3, max_completion_tokens=5),
    dict(stop="a"),
    dict(stop=["a", "b"]),
    dict(stop=[]),
    dict(stop=None),
    dict(logprobs=True),
    dict(logprobs=True, top_logprobs=3),
    dict(logprobs=False),
    dict(seed=(1 << 63) - 1),
    dict(thinking={"type": "enabled"}),
    dict(thinking={"type": "adaptive"}),
    dict(thinking=None),
    PLAIN,
    dict(reasoning_effort="none"),
    dict(reasoning_effort="low"),
    dict(reasoning_effort="max"),
    dict(tools=[]),
    dict(tools=[tool()]),
    dict(tools=[tool(), tool("g")], tool_choice="auto"),
    dict(tools=[tool()], tool_choice="none"),
    dict(tools=[tool()], tool_choice="required", **PLAIN),
    dict(tools=[tool()], tool_choice={"type": "function", "function": {"name": "f"}}, **PLAIN),
    dict(tool_choice="required", **PLAIN),
    dict(unknown=3, parallel_tool_calls=True, user="x", user_id="y", logit_bias={"1": 5}),
    dict(messages=[{"role": "system", "content": "s"}, USER]),
    dict(messages=[{"role": "system", "content": "s"}]),
    dict(messages=[{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]),
    dict(messages=[{"role": "user", "content": []}]),
    dict(messages=[USER, {"role": "assistant", "content": "s"}]),
    dict(messages=[USER, PREFIX]),
    dict(messages=[USER, PREFIX], tools=[]),
    dict(messages=[USER, PREFIX], response_format={"type": "text"}),
    dict(messages=[USER, PREFIX], response_format={"type": "regex", "regex": "a+"}),
    dict(
        messages=[
            USER,
            {"role": "assistant", "content": "s", "prefix": True, "reasoning_content": "r"},
        ]
    ),
    dict(messages=[{"role": "user", "content": "u", "prefix": True}]),
    dict(messages=[USER, calls("1"), result("1")]),
    dict(messages=[USER, calls("1", "2", reasoning_content="r"), result("1"), result("2")]),
    dict(messages=[USER, calls("1"), result("1"), {"role": "assistant", "content": "a"}, USER]),
    dict(response_format={"type": "text"}),
    dict(response_format={"type": "regex", "regex": "a+"}),
    dict(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "object"}},
        }
    ),
]


@pytest.mark.parametrize("body", ACCEPTED, ids=str)
def test_what_is_accepted_comes_out_the_same(body: dict) -> None:
    mine, theirs = both(**body)
    assert not isinstance(theirs, RefusedError), theirs
    assert not isinstance(mine, RefusedError), mine
    options, inference, conversation = (
        mine.options,
        theirs.inference_options,
        theirs.conversation,
    )
    assert options["thinking"] == conversation.thinking_mode
    assert options["max_tokens"] == (inference.max_tokens or Settings().most_tokens)
    assert list(options["stop"]) == theirs.parsing_options.stop_sequences
    assert options.get("seed") == inference.seed
    expected = (inference.top_logprobs or 0) if inference.logprobs else None
    assert options.get("logprobs") == expected
    if not conversation.thinking_mode:
        # Without one, that of the model, or 1, at the desk.
        assert options.get("temperature", 1.0) == pytest.approx(inference.temperature)
        assert options.get("top_p", 1.0) == pytest.approx(inference.top_p)
    assert_same_tools(options, conversation, inference)
    assert_same_messages(mine.messages, conversation.messages)
    constraint = options.get("constraint")
    assert ("text" if constraint is None else constraint.kind) == conversation.response_format


def assert_same_tools(options, conversation, inference) -> None:
    told = [one["function"]["name"] for one in options.get("tools", [])]
    assert told == [one.name for one in conversation.tools]
    forced = inference.output_constraint and inference.output_constraint.kind
    assert bool(options.get("must_call")) == (forced == "tool_call_required")


def assert_same_messages(mine, theirs) -> None:
    assert [one["role"] for one in mine] == [one.role for one in theirs]
    for message, expected in zip(mine, theirs, strict=True):
        assert message["content"] == expected.content
        assert message.get("reasoning_content", "") == (expected.reasoning_content or "")
        assert bool(message.get("prefix")) == expected.prefix
        assert message.get("tool_call_id") == expected.tool_call_id
        given = [
            (one["id"], one["function"]["name"], one["function"]["arguments"])
            for one in message.get("tool_calls", [])
        ]
        assert given == [(c.id, c.name, c.arguments) for c in expected.tool_calls or []]


# -- where this server goes further ---------------------------------------------------------


def asked(**body):
    return ours({"model": "m", "messages": [USER]} | body)


def test_results_stand_in_the_order_of_their_calls() -> None:
    question = asked(messages=[USER, calls("1", "2"), result("2"), result("1")])
    assert [one.get("tool_call_id") for one in question.messages[2:]] == ["1", "2"]


def test_a_developer_is_a_system_and_reasoning_is_reasoning_content() -> None:
    messages = [
        {"role": "developer", "content": "d"},
        USER,
        {"role": "assistant", "content": "x", "reasoning": "r"},
        USER,
    ]
    question = asked(messages=messages)
    assert question.messages[0] == {"role": "system", "content": "d"}
    assert question.messages[2]["reasoning_content"] == "r"


def test_max_completion_tokens_counts_where_max_tokens_is_not_given() -> None:
    assert asked(max_completion_tokens=5).options["max_tokens"] == 5
    assert asked(max_completion_tokens=5, max_tokens=3).options["max_tokens"] == 3


def test_little_effort_is_a_small_budget_and_a_budget_counts_more() -> None:
    assert asked(reasoning_effort="low").options["thinking_budget"] == LOW_EFFORT_TOKENS
    assert asked(reasoning_effort="minimal").options["thinking_budget"] == LOW_EFFORT_TOKENS
    assert "thinking_budget" not in asked(reasoning_effort="high").options
    both = asked(reasoning_effort="low", thinking_budget=7)
    assert both.options["thinking_budget"] == 7


def test_the_old_names_stand_for_thinking_and_for_not() -> None:
    assert asked(model="deepseek-reasoner").options["thinking"]
    assert not asked(model="deepseek-chat").options["thinking"]
    assert asked(model="deepseek-chat", thinking={"type": "enabled"}).options["thinking"]


def test_a_tool_can_be_required_while_thinking() -> None:
    assert asked(tools=[tool()], tool_choice="required").options["must_call"] is True
    named = {"type": "function", "function": {"name": "f"}}
    assert asked(tools=[tool()], tool_choice=named).options["must_call"] == "f"


def test_json_needs_no_word_in_the_prompt() -> None:
    options = asked(response_format={"type": "json_object"}).options
    assert options["constraint"] == Constraint("json_object")


def test_the_last_turn_is_continued_where_it_is_a_prefix() -> None:
    last = {"role": "assistant", "content": "x", "prefix": True}
    assert asked(messages=[USER, last]).options["continue_last"] is True
    assert "continue_last" not in asked().options


def test_a_turn_after_calls_is_continued_too() -> None:
    """DeepSeek's refuses it, though there are no tools to call any more."""
    question = asked(messages=[USER, calls("1"), result("1"), PREFIX])
    assert question.options["continue_last"] is True


def test_users_are_kept_apart() -> None:
    assert asked(user="a").user == "a"
    assert asked(user="a", user_id="b").user == "b"
    with pytest.raises(RefusedError) as refused:
        asked(user_id="字" * 171)
    assert "512 bytes" in refused.value.message


def test_pictures_are_refused_by_their_place() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    parts = [{"type": "text", "text": "what is this?"}, picture]
    with pytest.raises(RefusedError) as refused:
        asked(messages=[{"role": "user", "content": parts}])
    assert refused.value.status == 400
    assert "messages[0].content[1]" in refused.value.message
    assert "image_url" in refused.value.message


def test_extensions_reach_the_engine() -> None:
    options = asked(top_k=5, min_p=0.1, repetition_penalty=1.1, logit_bias={"7": -100}).options
    assert (options["top_k"], options["min_p"], options["repetition_penalty"]) == (5, 0.1, 1.1)
    assert options["logit_bias"] == {7: -100}
    assert "top_k" not in asked(top_k=-1).options
    with pytest.raises(RefusedError):
        asked(logit_bias={"x": 1})
