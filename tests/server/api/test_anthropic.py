"""POST /anthropic/v1/messages on a model that thinks, answers and calls."""

import asyncio
import dataclasses
import json

import httpx
import pytest

from qiusuo.engine.request import EngineError
from qiusuo.server.house import House
from tests.server.api.conftest import PATIENCE, Place, told
from tests.server.api.talkers import HELLO, PARIS, WEATHER, talker, tokenizer, user
from tests.server.api.test_anthropic_events import TOOL
from tests.server.api.test_streaming import Raw, assert_free, gate_of, usage_rows

GREETING, THOUGHT = "Good day, 求索 friend!", "Someone greets me."
PLAIN = {"thinking": {"type": "disabled"}}
PATH = "/anthropic/v1/messages"


def ask(place: Place, messages=HELLO, **more) -> httpx.Response:
    body = {"model": "talker", "max_tokens": 300, "messages": messages, "temperature": 0}
    return place.post(PATH, body | more)


def events(response: httpx.Response) -> list[dict]:
    """Of a stream, each under its own name."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    made = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
    return made


def test_a_thought_and_an_answer(place: Place) -> None:
    answer = ask(place)
    body = told(answer)
    thought, text = body["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", THOUGHT)
    assert text == {"type": "text", "text": GREETING}
    assert (body["role"], body["model"], body["stop_reason"]) == ("assistant", "talker", "end_turn")
    usage = body["usage"]
    prompt = len(tokenizer().apply_chat_template(HELLO, thinking=True))
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt
    assert body["id"] == "msg_" + answer.headers["request-id"]
    assert told(ask(place, **PLAIN))["content"] == [text]


def test_what_is_told_of_tokens_is_what_is_settled(place: Place) -> None:
    usage = told(ask(place))["usage"]
    [row] = usage_rows(place)
    assert (row["endpoint"], row["output"]) == ("anthropic", usage["output_tokens"])
    assert row["miss"] == usage["input_tokens"]
    assert row["hit"] == usage["cache_read_input_tokens"]


def test_a_stream_comes_to_what_is_told_at_once(place: Place) -> None:
    whole = told(ask(place, PARIS, tools=[TOOL]))
    made = events(ask(place, PARIS, tools=[TOOL], stream=True))
    assert made[0]["message"]["content"] == []
    assert (made[-2]["type"], made[-1]["type"]) == ("message_delta", "message_stop")
    assert made[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"
    names = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}
    texts: dict[int, str] = {}
    for one in made:
        if one["type"] == "content_block_delta" and one["delta"]["type"] in names:
            piece = one["delta"][names[one["delta"]["type"]]]
            texts[one["index"]] = texts.get(one["index"], "") + piece
    thought, text, use = whole["content"]
    assert texts == {0: thought["thinking"], 1: text["text"], 2: '{"city": "Paris"}'}
    assert (use["name"], use["input"]) == ("get_weather", {"city": "Paris"})
    starts = [one["content_block"]["type"] for one in made if one["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use"]


def test_a_loop_of_tools(place: Place) -> None:
    content = told(ask(place, PARIS, tools=[TOOL]))["content"]
    result = {"type": "tool_result", "tool_use_id": content[2]["id"], "content": "sunny"}
    content.pop(1)  # the model was taught to call without words
    back = [
        *PARIS,
        {"role": "assistant", "content": content},
        {"role": "user", "content": [result]},
    ]
    body = told(ask(place, back, tools=[TOOL], **PLAIN))
    assert body["content"] == [{"type": "text", "text": "It is sunny."}]


def test_a_thought_has_a_budget(place: Place) -> None:
    thinking = {"type": "enabled", "budget_tokens": 3}
    thought = told(ask(place, thinking=thinking))["content"][0]["thinking"]
    assert 0 < len(thought) < len(THOUGHT)
    assert THOUGHT.startswith(thought)


def test_why_an_answer_ended(place: Place) -> None:
    body = told(ask(place, max_tokens=3, **PLAIN))
    assert (body["stop_reason"], body["usage"]["output_tokens"]) == ("max_tokens", 3)
    body = told(ask(place, stop_sequences=["never", "索 fr"], **PLAIN))
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "索 fr")
    assert body["content"] == [{"type": "text", "text": "Good day, 求"}]
    made = events(ask(place, stop_sequences=["索 fr"], stream=True, **PLAIN))
    assert made[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "索 fr"}
    body = told(ask(place, stop_sequences=["greets"]))  # of the thought
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)


def test_a_call_can_be_forced_and_forbidden(place: Place) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        body = told(ask(place, tools=[TOOL], tool_choice=choice, **PLAIN))
        assert body["content"][0]["type"] == "tool_use"
    body = told(ask(place, PARIS, tools=[TOOL], tool_choice={"type": "none"}, **PLAIN))
    assert body["content"] == [{"type": "text", "text": "I cannot know."}]


def test_an_answer_that_was_begun_is_gone_on_with(place: Place) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Good day, "}]
    assert told(ask(place, begun, **PLAIN))["content"][0]["text"] == "求索 friend!"


def test_a_schema_holds_for_the_answer(place: Place) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "schema": schema}}
    body = told(ask(place, output_config=form, **PLAIN))
    assert json.loads(body["content"][0]["text"])["mood"] in ("good", "bad")


def test_tokens_are_counted_as_they_are_read(place: Place) -> None:
    for asked in ({}, {"tools": [TOOL]}, {"system": "s"}, PLAIN, {"tool_choice": {"type": "none"}}):
        counted = place.post(f"{PATH}/count_tokens", {"model": "talker", "messages": PARIS} | asked)
        usage = told(ask(place, PARIS, **asked))["usage"]
        read = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert told(counted) == {"input_tokens": read}
    long = [user("Hello " * 4000)]  # more than can be answered
    counted = place.post(f"{PATH}/count_tokens", {"model": "talker", "messages": long})
    assert told(counted)["input_tokens"] > 4000


def test_names(place: Place) -> None:
    house = place.house
    assert told(ask(place, model="claude-sonnet-4-5", **PLAIN))["model"] == "talker"
    assert len(told(ask(place, model="deepseek-chat"))["content"]) == 1
    house.registry.adopt("other", talker())
    assert told(ask(place, model="claude-3", **PLAIN))["model"] == "talker"
    _, secret = house.keys.make("a", "a", models=("other",))
    house.ledger.top_up("a", 10**12, token="a test")
    body = {"model": "claude-3", "max_tokens": 9, "messages": HELLO}
    assert told(place.post(PATH, body, **{"x-api-key": secret}))["model"] == "other"
    refused = place.post(PATH, body | {"model": "talker"}, **{"x-api-key": secret})
    assert refused.status_code == 400


def test_people_share_no_beginnings(place: Place) -> None:
    def cached(person: str) -> int:
        usage = told(ask(place, PARIS, tools=[TOOL], metadata={"user_id": person}))["usage"]
        return usage["cache_read_input_tokens"]

    cached("a")
    assert cached("b") == 0
    assert cached("a") > 0


@pytest.mark.parametrize(
    ("body", "status", "kind", "why"),
    [
        ({"model": "gpt-5"}, 400, "invalid_request_error", "Model Not Exist"),
        ({"max_tokens": None}, 422, "invalid_request_error", "max_tokens: "),
        ({"max_tokens": 0}, 400, "invalid_request_error", "valid range of max_tokens"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "empty string"),
        ({"messages": 3}, 422, "invalid_request_error", "messages: "),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 422,
         "invalid_request_error", "messages[0].content[0].text: Field required"),
        ({"tools": [WEATHER]}, 422, "invalid_request_error", "tools[0].name: Field required"),
        ({"tools": [TOOL | {"name": "\ud800"}]}, 422, "invalid_request_error", "Unicode"),
    ],
)  # fmt: skip
def test_refusals(place: Place, body: dict, status: int, kind: str, why: str) -> None:
    asked = {"model": "talker", "max_tokens": 9, "messages": HELLO} | body
    refused = place.post(PATH, json.dumps(asked))
    assert refused.status_code == status
    assert refused.json()["type"] == "error"
    error = refused.json()["error"]
    assert error["type"] == kind
    assert why in error["message"]


def test_a_conversation_kept_here_is_refused_as_clients_understand(place: Place) -> None:
    refused = ask(place, thread={"type": "create"})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["details"]["error_code"] == "thread_unsupported_request"


def test_who_asks_without_a_key(place: Place) -> None:
    place.house.keys.make("a", "a")
    refused = ask(place)
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error"


def waiting(place: Place, body: dict) -> Raw:
    return Raw(place, {"max_tokens": 300, "messages": HELLO} | body, PATH)


def test_a_stream_that_waits_says_ping(settings) -> None:
    house = House.open(dataclasses.replace(settings, keep_alive_seconds=0.005))
    house.registry.adopt("talker", talker())
    place = Place(house)
    gate = gate_of(place)
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    async def main() -> bytes:
        client = waiting(place, {"stream": True})
        await client.until(lambda: client.body.count(ping) >= 3)
        assert client.body.startswith(b"event: message_start\n")
        gate.open()
        await client.task
        await place.settled()
        return client.body

    body = asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert b"keep-alive" not in body
    assert body.endswith(b'data: {"type":"message_stop"}\n\n')
    asyncio.run(house.close())


def test_whoever_leaves_pays_for_what_was_made(place: Place) -> None:
    gate = gate_of(place)

    async def main() -> None:
        client = waiting(place, {"stream": True})
        await gate.steps(4)
        await client.until(lambda: b"text_delta" in client.body)
        client.leave()
        await asyncio.sleep(0)
        gate.open()
        await client.task
        await place.settled()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    [row] = usage_rows(place)
    assert row["finish"] == "cancelled"
    assert_free(place)


def test_an_engine_that_fails_ends_the_stream_with_an_error(place: Place) -> None:
    gate = gate_of(place)

    async def main() -> bytes:
        client = waiting(place, {"stream": True})
        await gate.steps(4)
        await client.until(lambda: b"text_delta" in client.body)

        def fail() -> None:
            raise EngineError("the weights are gone")

        gate.real_step = fail
        gate.open()
        await client.task
        await place.settled()
        return client.body

    body = asyncio.run(asyncio.wait_for(main(), PATIENCE))
    name, data = body.decode().removesuffix("\n\n").split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "overloaded_error"
