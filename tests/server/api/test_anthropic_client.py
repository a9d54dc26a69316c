"""The `anthropic` package, unmodified, against a real server process."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from qiusuo.server.database import Database
from qiusuo.server.keys import Keys
from qiusuo.server.ledger import Ledger
from qiusuo.server.money import UNITS
from qiusuo.server.prices import Price, PriceBook
from tests.server.api.processes import ServerProcess
from tests.server.api.talkers import HELLO, PARIS, talker
from tests.server.api.test_anthropic_events import TOOL

GREETING, THOUGHT = "Good day, 求索 friend!", "Someone greets me."
PLAIN = {"type": "disabled"}
COLD = {"temperature": 0}  # the package has no argument for it any more


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A server with a price, and keys of an account with money and of one without."""
    place = tmp_path_factory.mktemp("server")
    talker().save(place / "talker")
    database = Database(place / "server.sqlite3")
    keys, ledger = Keys(database), Ledger(database)
    ledger.top_up("rich", 100 * UNITS, token="a test")
    PriceBook(database).set("talker", Price(hit=20, miss=1000, output=4000))
    rich, poor = keys.make("rich", "rich")[1], keys.make("poor", "poor")[1]
    slow = keys.make("slow", "rich", rpm=1)[1]
    ledger.close()
    database.close()
    with ServerProcess(place / "talker", place / "server.sqlite3") as server:
        yield SimpleNamespace(address=server.address, rich=rich, poor=poor, slow=slow)


def client(served, key: str | None = None) -> anthropic.Anthropic:
    """It sends its key as `x-api-key`."""
    return anthropic.Anthropic(
        base_url=f"{served.address}/anthropic",
        api_key=key or served.rich,
        max_retries=0,
        timeout=60,
    )


def options(**more) -> dict[str, Any]:
    """Any name of Claude's will do."""
    told = {"model": "claude-any", "max_tokens": 300, "messages": HELLO}
    return told | {"extra_body": COLD} | more


def ask(served, key: str | None = None, **more) -> Any:
    return client(served, key).messages.create(**options(**more))


def kinds(message: Message) -> list[str]:
    return [block.type for block in message.content]


def test_an_answer(served) -> None:
    told = ask(served)
    assert kinds(told) == ["thinking", "text"]
    assert (told.content[0].thinking, told.content[1].text) == (THOUGHT, GREETING)
    assert (told.stop_reason, told.model) == ("end_turn", "talker")
    assert told._request_id == told.id.removeprefix("msg_")
    Message.model_validate(told.model_dump(), strict=True)
    assert kinds(ask(served, thinking=PLAIN)) == ["text"]


def test_events_have_the_packages_own_types(served) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    made = list(ask(served, messages=PARIS, tools=[TOOL], stream=True))
    for event in made:
        assert type(adapter.validate_python(event.model_dump())) is type(event)
    assert made[-1].type == "message_stop"


def test_the_streaming_helper(served) -> None:
    pieces = {"thinking": "", "text": "", "input_json": ""}
    asked = options(messages=PARIS, tools=[TOOL])
    with client(served).messages.stream(**asked) as stream:
        for event in stream:
            if event.type in pieces:
                name = "partial_json" if event.type == "input_json" else event.type
                pieces[event.type] += getattr(event, name)
        final = stream.get_final_message()
    assert pieces == {
        "thinking": "I must look.",
        "text": "Let me see.",
        "input_json": '{"city": "Paris"}',
    }
    assert kinds(final) == ["thinking", "text", "tool_use"]
    assert final.content[0].signature
    assert final.content[2].input == {"city": "Paris"}
    assert final.stop_reason == "tool_use"
    whole = ask(served, messages=PARIS, tools=[TOOL])
    read = [one.usage.input_tokens + one.usage.cache_read_input_tokens for one in (final, whole)]
    assert read[0] == read[1]
    assert final.usage.cache_read_input_tokens is not None
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_text_alone(served) -> None:
    with client(served).messages.stream(**options(thinking=PLAIN)) as stream:
        assert "".join(stream.text_stream) == GREETING


def test_a_loop_of_tools(served) -> None:
    """The answer goes back as it came, but for words that the model was not taught to see."""
    told = ask(served, messages=PARIS, tools=[TOOL])
    use = told.content[-1]
    back = [block for block in told.content if block.type != "text"]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    talk = [
        *PARIS,
        {"role": "assistant", "content": back},
        {"role": "user", "content": [result]},
    ]
    told = ask(served, messages=talk, tools=[TOOL], thinking=PLAIN)
    assert told.content[0].text == "It is sunny."


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_runner(served, stream: bool) -> None:
    """The package's own loop. It first asks for a conversation that the server keeps, is told that
    there is none, and sends all of it from then on."""
    asked: list[str] = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """How the weather is

        Args:
            city: Where.
        """
        asked.append(city)
        return "sunny"

    runner = client(served).beta.messages.tool_runner(
        model="claude-x",
        max_tokens=300,
        messages=HELLO,
        tools=[get_weather],
        tool_choice={"type": "tool", "name": "get_weather"},
        thinking=PLAIN,
        extra_body=COLD,
        max_iterations=2,
        stream=stream,
    )
    made = [one.get_final_message() if stream else one for one in runner]
    assert [one.stop_reason for one in made] == ["tool_use"] * 2
    calls = [block.input["city"] for one in made for block in one.content]
    assert asked[0] == calls[0]


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    strong: bool


def test_a_pydantic_model_is_filled_in(served) -> None:
    told = client(served).messages.parse(**options(output_format=Mood))
    assert isinstance(told.parsed_output, Mood)


def test_why_an_answer_ended(served) -> None:
    assert ask(served, max_tokens=3).stop_reason == "max_tokens"
    told = ask(served, stop_sequences=["求索"], thinking=PLAIN)
    assert (told.stop_reason, told.stop_sequence) == ("stop_sequence", "求索")


def test_tokens_can_be_counted(served) -> None:
    asked = {"model": "claude-x", "messages": PARIS, "tools": [TOOL]}
    counted = client(served).messages.count_tokens(**asked).input_tokens
    usage = ask(served, **asked).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_many_at_once(served) -> None:
    async def main() -> list[str]:
        async with anthropic.AsyncAnthropic(
            base_url=f"{served.address}/anthropic", api_key=served.rich, max_retries=0
        ) as several:

            async def one(stream: bool) -> str:
                if not stream:
                    told = await several.messages.create(**options(thinking=PLAIN))
                    return told.content[0].text
                async with several.messages.stream(**options(thinking=PLAIN)) as streamed:
                    return "".join([piece async for piece in streamed.text_stream])

            return await asyncio.gather(*(one(bool(i % 2)) for i in range(8)))

    assert asyncio.run(main()) == [GREETING] * 8


def test_errors_are_of_the_packages_own_classes(served) -> None:
    with pytest.raises(anthropic.AuthenticationError) as refused:
        ask(served, key="sk-nobody")
    assert refused.value.body["error"]["type"] == "authentication_error"
    with pytest.raises(anthropic.BadRequestError, match="Model Not Exist"):
        ask(served, model="nobody")
    with pytest.raises(anthropic.UnprocessableEntityError, match="messages"):
        ask(served, messages=[{"role": "user", "content": 3}])
    with pytest.raises(anthropic.APIStatusError) as refused:
        ask(served, key=served.poor)
    assert refused.value.status_code == 402
    assert refused.value.body["error"]["type"] == "billing_error"
    ask(served, key=served.slow)
    with pytest.raises(anthropic.RateLimitError) as limited:
        ask(served, key=served.slow)
    assert int(limited.value.response.headers["retry-after"]) >= 1
