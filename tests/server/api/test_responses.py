"""POST /responses on a model that thinks, answers and calls."""

import asyncio
import json

import httpx
import pytest

from qiusuo.engine.request import EngineError
from qiusuo.server.api.responses_items import unsealed
from tests.server.api.conftest import PATIENCE, Place, told
from tests.server.api.talkers import HELLO, WEATHER, tokenizer
from tests.server.api.test_streaming import Raw, gate_of, usage_rows

TOOL = {"type": "function", **WEATHER["function"]}
GREETING, THOUGHT = "Good day, 求索 friend!", "Someone greets me."
PLAIN = {"reasoning": {"effort": "none"}}


def ask(place: Place, asked="Hello", path: str = "/v1/responses", **more) -> httpx.Response:
    return place.post(path, {"model": "talker", "input": asked, "temperature": 0} | more)


def events(response: httpx.Response) -> list[dict]:
    """Of a stream: each under its own name, and none behind the last."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    made = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
    return made


def without_names(response: dict) -> dict:
    """Without what is another in every response."""
    text = json.dumps(response).replace(response["id"].removeprefix("resp_"), "")
    changing = ("created_at", "completed_at", "usage")
    told = {name: value for name, value in json.loads(text).items() if name not in changing}
    for item in told["output"]:
        if "call_id" in item:
            item["call_id"] = item["call_id"][:8]
    return told


def test_a_thought_and_an_answer(place: Place) -> None:
    answer = ask(place)
    body = told(answer)
    thought, message = body["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": THOUGHT}]
    assert message["content"][0]["text"] == GREETING
    assert (body["status"], body["model"], body["store"]) == ("completed", "talker", False)
    usage = body["usage"]
    assert usage["input_tokens"] == len(tokenizer().apply_chat_template(HELLO, thinking=True))
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert body["id"] == "resp_" + answer.headers["x-request-id"]


def test_what_is_told_of_tokens_is_what_is_settled(place: Place) -> None:
    usage = told(ask(place))["usage"]
    [row] = usage_rows(place)
    assert (row["endpoint"], row["output"]) == ("responses", usage["output_tokens"])
    assert row["hit"] + row["miss"] == usage["input_tokens"]
    assert row["reasoning"] == usage["output_tokens_details"]["reasoning_tokens"]


@pytest.mark.parametrize("path", ["/responses", "/v1/responses", "/beta/responses"])
def test_without_a_thought(place: Place, path: str) -> None:
    [message] = told(ask(place, path=path, **PLAIN))["output"]
    assert message["content"][0]["text"] == GREETING


@pytest.mark.parametrize(
    "asked",
    [
        {},
        PLAIN,
        {"asked": "Weather in Paris?", "tools": [TOOL]},
        {"asked": "Weather in Paris and Rome?", "tools": [TOOL], **PLAIN},
        {"max_output_tokens": 5},
    ],
)
def test_a_stream_ends_with_what_is_told_at_once(place: Place, asked: dict) -> None:
    made = events(ask(place, **asked, stream=True))
    whole = told(ask(place, **asked))
    assert without_names(made[-1]["response"]) == without_names(whole)
    assert made[-1]["type"] == f"response.{whole['status']}"
    assert [one["sequence_number"] for one in made] == list(range(len(made)))


def test_an_answer_that_was_cut_off(place: Place) -> None:
    body = told(ask(place, max_output_tokens=3, **PLAIN))
    assert (body["status"], body["output"][0]["status"]) == ("incomplete", "incomplete")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["usage"]["output_tokens"] == 3


def test_a_loop_of_tools_with_sealed_thoughts(place: Place) -> None:
    """As clients do it that send no thought back but as it was sealed."""
    asked = {"role": "user", "content": "Weather in Paris?"}
    options = {"tools": [TOOL], "include": ["reasoning.encrypted_content"]}
    output = told(ask(place, [asked], **options))["output"]
    assert [one["type"] for one in output] == ["reasoning", "message", "function_call"]
    assert json.loads(output[2]["arguments"]) == {"city": "Paris"}
    seal = output[0]["encrypted_content"]
    assert unsealed(seal) == "I must look."
    back = [
        asked,
        {"type": "reasoning", "summary": [], "encrypted_content": seal},
        output[2],
        {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "sunny"},
    ]
    [message] = told(ask(place, back, **PLAIN, **options))["output"]
    assert message["content"][0]["text"] == "It is sunny."


def test_a_call_can_be_forced_and_forbidden(place: Place) -> None:
    named = {"type": "function", "name": "get_weather"}
    body = told(ask(place, tools=[TOOL], tool_choice=named, max_output_tokens=300, **PLAIN))
    [call] = body["output"]
    assert (call["type"], call["name"]) == ("function_call", "get_weather")
    assert body["tool_choice"] == named
    [message] = told(ask(place, "Weather in Paris?", tools=[TOOL], tool_choice="none", **PLAIN))[
        "output"
    ]
    assert message["content"][0]["text"] == "I cannot know."


def test_a_schema_holds_for_the_answer(place: Place) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "mood", "schema": schema}}
    body = told(ask(place, text=form, max_output_tokens=300))
    assert json.loads(body["output"][1]["content"][0]["text"])["mood"] in ("good", "bad")
    assert body["text"]["format"]["schema"] == schema


def test_logprobs(place: Place) -> None:
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, **PLAIN}
    [part] = told(ask(place, **options))["output"][0]["content"]
    assert b"".join(bytes(one["bytes"]) for one in part["logprobs"]).decode() == GREETING
    assert all(len(one["top_logprobs"]) == 2 for one in part["logprobs"])
    made = events(ask(place, stream=True, **options))
    deltas = [one for one in made if one["type"] == "response.output_text.delta"]
    told_again = [one for delta in deltas for one in delta["logprobs"]]
    for one, other in zip(told_again, part["logprobs"], strict=True):
        assert one["token"] == other["token"]
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


def test_the_cache_is_told_and_shared_by_one_person_only(place: Place) -> None:
    def cached(**more) -> int:
        asked = "Weather in Paris and Rome?"
        usage = told(ask(place, asked, tools=[TOOL], **more))["usage"]
        return usage["input_tokens_details"]["cached_tokens"]

    cached(user="a")
    assert cached(safety_identifier="b") == 0
    assert cached(user="a") > 0


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({"model": "nobody"}, 400, "Model Not Exist"),
        ({"temperature": 3}, 400, "valid range of temperature"),
        ({"max_output_tokens": 0}, 400, "valid range of max_tokens"),
        ({"top_logprobs": 21}, 400, "valid range of top_logprobs"),
        ({"previous_response_id": "resp_1"}, 400, "keeps no responses"),
        ({"tools": [TOOL, TOOL]}, 400, "unique"),
        ({"input": 3}, 422, "input: Input should be a valid list"),
        ({"input": [3]}, 422, "input[0]: "),
        ({"input": [{"type": "function_call"}]}, 422, "input[0].call_id: Field required"),
        ({"reasoning": {"effort": "much"}}, 422, "reasoning.effort: "),
        ({"metadata": {"a": "\ud800"}}, 422, "not valid Unicode"),
        ({"tools": [TOOL | {"parameters": {"a": float("nan")}}]}, 422, "NaN"),
    ],
)
def test_refusals(place: Place, body: dict, status: int, why: str) -> None:
    text = json.dumps({"model": "talker", "input": "Hello"} | body)
    refused = place.post("/v1/responses", text)
    assert refused.status_code == status
    assert why in refused.json()["error"]["message"]


def test_an_engine_that_fails_ends_the_stream_as_failed(place: Place) -> None:
    gate = gate_of(place)

    async def main() -> bytes:
        client = Raw(place, {"input": "Hello", "stream": True} | PLAIN, "/responses")
        await gate.steps(4)
        await client.until(lambda: b"output_text.delta" in client.body)

        def fail() -> None:
            raise EngineError("the weights are gone")

        gate.real_step = fail
        gate.open()
        await client.task
        await place.settled()
        return client.body

    body = asyncio.run(asyncio.wait_for(main(), PATIENCE))
    last = json.loads(body.decode().removesuffix("\n\n").rsplit("data: ", 1)[1])
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
