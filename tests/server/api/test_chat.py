"""POST /chat/completions on a model that thinks, answers and calls."""

import json

import pytest

from tests.server.api.conftest import Place, streamed, told
from tests.server.api.talkers import (
    AFTER_BOTH,
    AFTER_PARIS,
    BOTH,
    HELLO,
    PARIS,
    WEATHER,
    tokenizer,
    user,
)

PLAIN = {"thinking": {"type": "disabled"}}
GREETING = "Good day, 求索 friend!"
THOUGHT = "Someone greets me."


def message(body: dict) -> dict:
    [choice] = body["choices"]
    return choice["message"]


def joined(chunks: list[dict], name: str, choice: int = 0) -> str:
    deltas = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice]
    return "".join(one["delta"].get(name) or "" for one in deltas)


def test_an_answer_and_a_thought_before_it(place: Place) -> None:
    body = told(place.chat(HELLO))
    assert message(body) == {
        "role": "assistant",
        "content": GREETING,
        "reasoning_content": THOUGHT,
    }
    [choice] = body["choices"]
    assert (choice["finish_reason"], choice["logprobs"], choice["index"]) == ("stop", None, 0)
    assert body["object"] == "chat.completion"
    assert body["model"] == "talker"
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(tokenizer().apply_chat_template(HELLO, thinking=True))
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert "qiusuo" not in body


def test_thinking_can_be_switched_off(place: Place) -> None:
    body = told(place.chat(HELLO, **PLAIN))
    assert message(body) == {"role": "assistant", "content": GREETING}
    assert "completion_tokens_details" not in body["usage"]
    assert message(told(place.chat(HELLO, model="deepseek-chat"))) == message(body)
    assert "reasoning_content" in message(told(place.chat(HELLO, model="deepseek-reasoner")))


def test_a_stream_says_the_same(place: Place) -> None:
    response = place.chat(HELLO, stream=True)
    chunks = streamed(response)
    whole = told(place.chat(HELLO))
    assert joined(chunks, "content") == GREETING
    assert joined(chunks, "reasoning_content") == THOUGHT
    assert chunks[0]["choices"][0]["delta"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "",
    }
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in chunks[:-1])
    kept = {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert {k: chunks[-1]["usage"][k] for k in kept} == {k: whole["usage"][k] for k in kept}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert response.headers["x-request-id"] == chunks[0]["id"]


def test_without_a_thought_no_delta_speaks_of_one(place: Place) -> None:
    chunks = streamed(place.chat(HELLO, stream=True, **PLAIN))
    assert joined(chunks, "content") == GREETING
    assert all("reasoning_content" not in one["choices"][0]["delta"] for one in chunks)


def test_usage_hits_and_cost(place: Place) -> None:
    messages = AFTER_PARIS
    told(place.chat(messages, tools=[WEATHER]))
    options = dict(stream=True, stream_options={"include_usage": True}, tools=[WEATHER])
    chunks = streamed(place.chat(messages, **options))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    usage = chunks[-1]["usage"]
    hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
    assert hit > 0
    assert hit + miss == usage["prompt_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": hit}
    more = chunks[-1]["qiusuo"]
    assert set(more) == {"cost", "currency", "seconds", "ttft", "tokens_per_second"}
    assert more["currency"] == "CNY"
    assert float(more["cost"]) >= 0
    assert more["seconds"] >= more["ttft"] > 0
    assert "qiusuo" in told(place.chat(HELLO, qiusuo=True))


def test_namespaces_share_no_beginnings(place: Place) -> None:
    def hit(**more) -> int:
        usage = told(place.chat(AFTER_PARIS, tools=[WEATHER], **more))["usage"]
        return usage["prompt_cache_hit_tokens"]

    hit(user="a")
    assert hit(user="b") == 0
    assert hit(user_id="a") > 0


# -- tools ----------------------------------------------------------------------------------


def test_a_call_after_a_thought(place: Place) -> None:
    body = told(place.chat(PARIS, tools=[WEATHER]))
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    said = message(body)
    assert (said["reasoning_content"], said["content"]) == ("I must look.", "Let me see.")
    [call] = said["tool_calls"]
    assert call["id"].startswith("call_00_")
    assert (call["type"], call["index"]) == ("function", 0)
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}


def test_calls_are_streamed_one_by_one(place: Place) -> None:
    chunks = streamed(place.chat(BOTH, tools=[WEATHER], stream=True, **PLAIN))
    calls: dict[int, dict] = {}
    for chunk in chunks:
        for piece in chunk["choices"][0]["delta"].get("tool_calls", []):
            known = calls.setdefault(piece["index"], {"arguments": ""})
            known |= {key: piece[key] for key in ("id", "type") if key in piece}
            known["name"] = piece["function"].get("name", known.get("name"))
            known["arguments"] += piece["function"]["arguments"]
    assert [call["id"][:8] for call in calls.values()] == ["call_00_", "call_01_"]
    assert [json.loads(call["arguments"]) for call in calls.values()] == [
        {"city": "Paris"},
        {"city": "Rome"},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_results_come_back_in_any_order(place: Place) -> None:
    turned = [*AFTER_BOTH[:-2], AFTER_BOTH[-1], AFTER_BOTH[-2]]
    for messages in (AFTER_BOTH, turned):
        body = told(place.chat(messages, tools=[WEATHER], **PLAIN))
        assert message(body)["content"] == "Sunny and rainy."


def test_a_tool_loop_as_a_client_goes_through_it(place: Place) -> None:
    first = message(told(place.chat(PARIS, tools=[WEATHER])))
    first["reasoning"] = first.pop("reasoning_content")  # another name for it
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "sunny"}
    body = told(place.chat([*PARIS, first, result], tools=[WEATHER], **PLAIN))
    assert message(body)["content"]


def test_none_takes_the_tools_out_of_the_prompt(place: Place) -> None:
    body = told(place.chat(PARIS, tools=[WEATHER], tool_choice="none", **PLAIN))
    assert message(body) == {"role": "assistant", "content": "I cannot know."}
    assert body["usage"]["prompt_tokens"] == len(tokenizer().apply_chat_template(PARIS))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": "get_weather"}])
@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_a_call_can_be_forced(place: Place, choice, thinking: str) -> None:
    if isinstance(choice, dict):
        choice = choice | {"function": {"name": choice["function"]}}
    body = told(
        place.chat(
            HELLO, tools=[WEATHER], tool_choice=choice, thinking={"type": thinking}, max_tokens=300
        )
    )
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    call = message(body)["tool_calls"][0]
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    assert isinstance(arguments["city"], str)


# -- forms and ends -------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_json_of_a_schema_after_the_thought(place: Place, thinking: str) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "count": {"type": "integer"}},
        "required": ["mood", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    body = told(
        place.chat(HELLO, response_format=form, thinking={"type": thinking}, max_tokens=300)
    )
    said = message(body)
    given = json.loads(said["content"])
    assert set(given) == {"mood", "count"}
    assert given["mood"] in ("good", "bad")
    assert isinstance(given["count"], int)
    assert (said.get("reasoning_content") == THOUGHT) == (thinking == "enabled")


def test_a_json_object_and_a_regex(place: Place) -> None:
    form = {"type": "json_object"}
    body = told(place.chat(HELLO, response_format=form, max_tokens=300, seed=1, **PLAIN))
    if body["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(message(body)["content"]), dict)
    form = {"type": "regex", "regex": "(yes|no)!"}
    body = told(place.chat(HELLO, response_format=form, **PLAIN))
    assert message(body)["content"] in ("yes!", "no!")


def test_a_schema_that_cannot_be_is_refused(place: Place) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = place.chat(HELLO, response_format=form)
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("stop", "before"), [("求索", "Good day, "), ([" day", "never"], "Good")], ids=str
)
def test_stop_strings_end_the_answer_before_them(place: Place, stop, before: str) -> None:
    body = told(place.chat(HELLO, stop=stop, **PLAIN))
    assert message(body)["content"] == before
    assert body["choices"][0]["finish_reason"] == "stop"


def test_length_is_told(place: Place) -> None:
    body = told(place.chat(HELLO, max_tokens=3, **PLAIN))
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    body = told(place.chat(HELLO, max_completion_tokens=2, **PLAIN))
    assert body["usage"]["completion_tokens"] == 2


def test_a_budget_ends_the_thought(place: Place) -> None:
    body = told(place.chat(HELLO, thinking_budget=2))
    assert len(message(body)["reasoning_content"]) < len(THOUGHT)
    assert body["choices"][0]["finish_reason"] == "stop"


def test_an_answer_can_be_begun_for_the_model(place: Place) -> None:
    begun = {"role": "assistant", "content": "Good day", "prefix": True}
    body = told(place.chat([*HELLO, begun], **PLAIN))
    assert message(body)["content"] == GREETING.removeprefix("Good day")
    thought = begun | {"content": "", "reasoning_content": "Someone"}
    body = told(place.chat([*HELLO, thought]))
    assert message(body)["reasoning_content"] == THOUGHT.removeprefix("Someone")
    assert message(body)["content"] == GREETING


def test_several_answers(place: Place) -> None:
    body = told(place.chat(HELLO, n=3, temperature=1, seed=4, **PLAIN))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    chunks = streamed(place.chat(HELLO, n=3, temperature=1, seed=4, stream=True, **PLAIN))
    for index, choice in enumerate(body["choices"]):
        assert joined(chunks, "content", index) == choice["message"]["content"]
    finishes = [one["choices"][0]["finish_reason"] for one in chunks]
    assert len([one for one in finishes if one]) == 3
    assert [chunk for chunk in chunks if "usage" in chunk] == [chunks[-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == body["usage"]["completion_tokens"]


def test_a_seed_repeats_and_its_absence_does_not(place: Place) -> None:
    def said(**more) -> str:
        hot = dict(temperature=2, max_tokens=24, **PLAIN)
        return message(told(place.chat(HELLO, **(hot | more))))["content"]

    assert said(seed=3) == said(seed=3)
    assert len({said() for _ in range(4)}) > 1


# -- log-probabilities ----------------------------------------------------------------------


def test_logprobs_of_thought_and_content(place: Place) -> None:
    body = told(place.chat(HELLO, logprobs=True, top_logprobs=2))
    lists = body["choices"][0]["logprobs"]
    for name, text in (("content", GREETING), ("reasoning_content", THOUGHT)):
        listed = lists[name]
        assert b"".join(bytes(one["bytes"]) for one in listed).decode() == text
        for one in listed:
            assert one["logprob"] <= 0
            assert len(one["top_logprobs"]) == 2
            assert one["top_logprobs"][0]["token"] == one["token"]  # greedy
    chunks = streamed(place.chat(HELLO, logprobs=True, top_logprobs=2, stream=True))
    for name, listed in lists.items():
        of = [(chunk["choices"][0]["logprobs"] or {}).get(name, []) for chunk in chunks]
        got = [one for several in of for one in several]
        assert [one["token"] for one in got] == [one["token"] for one in listed]
        expected = [one["logprob"] for one in listed]
        assert [one["logprob"] for one in got] == pytest.approx(expected, abs=1e-3)


def test_a_bias_forbids_a_token(place: Place) -> None:
    first = tokenizer().encode(GREETING)[0]
    body = told(place.chat(HELLO, logit_bias={str(first): -100}, max_tokens=4, **PLAIN))
    assert not message(body)["content"].startswith("Good")
    assert place.chat(HELLO, logit_bias={"99999": 1}).status_code == 400


# -- refusals -------------------------------------------------------------------------------


def test_an_unknown_model(place: Place) -> None:
    response = place.chat(HELLO, model="nobody")
    assert response.status_code == 400
    error = response.json()["error"]
    assert "Model Not Exist" in error["message"]
    assert "talker" in error["message"]


def test_what_the_context_cannot_hold(place: Place) -> None:
    response = place.chat([user("Hello " * 2000)])
    assert response.status_code == 400
    assert "1024" in response.json()["error"]["message"]


def test_every_prefix_of_the_address(place: Place) -> None:
    for prefix in ("", "/v1", "/beta"):
        body = {"model": "talker", "messages": HELLO, "temperature": 0} | PLAIN
        assert message(told(place.post(f"{prefix}/chat/completions", body)))["content"] == GREETING
