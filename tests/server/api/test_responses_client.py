"""`client.responses` of the `openai` package, unmodified, against a real server process."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.server.api.processes import ServerProcess
from tests.server.api.talkers import talker
from tests.server.api.test_responses_events import TOOL

GREETING, THOUGHT = "Good day, 求索 friend!", "Someone greets me."
PLAIN = {"reasoning": {"effort": "none"}}


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("server")
    talker().save(place / "talker")
    with ServerProcess(place / "talker", place / "server.sqlite3") as server:
        assert server.address is not None
        yield server.address


@pytest.fixture
def responses(address) -> Iterator[Any]:
    with openai.OpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client.responses


def ask(responses, asked="Hello", **more) -> Any:
    return responses.create(model="talker", input=asked, temperature=0, **more)


def test_an_answer(responses) -> None:
    told = ask(responses)
    assert told.output_text == GREETING
    assert told.output[0].content[0].text == THOUGHT
    assert told._request_id == told.id.removeprefix("resp_")
    Response.model_validate(told.model_dump(), strict=True)
    assert ask(responses, **PLAIN).output_text == GREETING


def test_events_have_the_packages_own_types(responses) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    made = list(ask(responses, "Weather in Paris?", tools=[TOOL], stream=True))
    for event in made:
        assert type(adapter.validate_python(event.model_dump(by_alias=True))) is type(event)
    assert made[-1].type == "response.completed"


def test_the_streaming_helper(responses) -> None:
    pieces: dict[str, str] = {}
    with responses.stream(
        model="talker", input="Weather in Paris?", temperature=0, tools=[TOOL]
    ) as stream:
        for event in stream:
            if event.type.endswith(".delta"):
                pieces[event.type] = pieces.get(event.type, "") + event.delta
                if event.type == "response.output_text.delta":
                    assert event.snapshot == pieces[event.type]
        final = stream.get_final_response()
    assert pieces == {
        "response.reasoning_text.delta": "I must look.",
        "response.output_text.delta": "Let me see.",
        "response.function_call_arguments.delta": '{"city": "Paris"}',
    }
    assert final.output[2].name == "get_weather"
    assert final.usage.output_tokens > 0


@pytest.mark.parametrize("sealed", [False, True])
def test_a_loop_of_tools(responses, sealed: bool) -> None:
    """The output goes back as it came; some clients keep a thought only as it was sealed."""
    talk: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
    include = ["reasoning.encrypted_content"] if sealed else []
    told = ask(responses, talk, tools=[TOOL], include=include)
    talk += [one.to_dict() for one in told.output if one.type != "message"]
    if sealed:
        del talk[1]["content"]
    call = told.output[-1]
    assert json.loads(call.arguments) == {"city": "Paris"}
    talk.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    assert ask(responses, talk, tools=[TOOL], **PLAIN).output_text == "It is sunny."


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    strong: bool


def test_a_pydantic_model_is_filled_in(responses) -> None:
    told = responses.parse(
        model="talker", input="Hello", temperature=0, max_output_tokens=300, text_format=Mood
    )
    assert isinstance(told.output_parsed, Mood)
    with responses.stream(
        model="talker", input="Hello", temperature=0, max_output_tokens=300, text_format=Mood
    ) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Mood)


def test_an_answer_that_is_cut_off(responses) -> None:
    told = ask(responses, max_output_tokens=3)
    assert told.status == "incomplete"
    assert told.incomplete_details.reason == "max_output_tokens"
    *_, last = ask(responses, max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


def test_many_at_once(address) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:

            async def one(stream: bool) -> str:
                asked = ask(client.responses, stream=stream, **PLAIN)
                if not stream:
                    return (await asked).output_text
                kind = "response.output_text.delta"
                return "".join([one.delta async for one in await asked if one.type == kind])

            return await asyncio.gather(*(one(bool(i % 2)) for i in range(8)))

    assert asyncio.run(main()) == [GREETING] * 8


def test_errors_are_of_the_packages_own_classes(responses) -> None:
    with pytest.raises(openai.BadRequestError, match="keeps no responses") as refused:
        ask(responses, previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError, match="Model Not Exist"):
        responses.create(model="nobody", input="Hello")
    with pytest.raises(openai.UnprocessableEntityError, match=r"input\[0\]"):
        ask(responses, [3])


def test_a_stream_that_is_closed_frees_its_place(responses) -> None:
    stream = ask(responses, stream=True, tools=[TOOL])
    next(iter(stream))
    stream.close()
    assert ask(responses, **PLAIN).output_text == GREETING
