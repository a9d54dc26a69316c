"""The `openai` package, unmodified, against a real server process."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from qiusuo.server.database import Database
from qiusuo.server.keys import Keys
from qiusuo.server.ledger import Ledger
from qiusuo.server.money import UNITS
from qiusuo.server.prices import Price, PriceBook
from tests.server.api.processes import ServerProcess
from tests.server.api.talkers import BOTH, HELLO, PARIS, TEXT, WEATHER, call, result, talker

GREETING = "Good day, 求索 friend!"
PLAIN = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A server with a price, and keys of an account with money and of one without."""
    place = tmp_path_factory.mktemp("server")
    talker().save(place / "talker")
    database = Database(place / "server.sqlite3")
    keys, ledger = Keys(database), Ledger(database)
    ledger.top_up("rich", 100 * UNITS, token="a test")
    PriceBook(database).set("talker", Price(hit=20, miss=1000, output=4000))
    secrets = SimpleNamespace(
        rich=keys.make("rich", "rich", admin=True)[1],
        poor=keys.make("poor", "poor")[1],
        slow=keys.make("slow", "rich", rpm=1)[1],
    )
    ledger.close()
    database.close()
    with ServerProcess(place / "talker", place / "server.sqlite3") as server:
        yield SimpleNamespace(address=server.address, **vars(secrets))


def client(served, key: str | None = None, **more) -> openai.OpenAI:
    secret = served.rich if key is None else key
    return openai.OpenAI(
        base_url=f"{served.address}/v1", api_key=secret, max_retries=0, timeout=60, **more
    )


def ask(served, messages=HELLO, key=None, **more):
    options = {"model": "talker", "temperature": 0, "extra_body": PLAIN} | more
    return client(served, key).chat.completions.create(messages=messages, **options)


def test_an_answer(served) -> None:
    told = ask(served)
    assert told.choices[0].message.content == GREETING
    assert told.choices[0].finish_reason == "stop"
    assert told.usage.total_tokens == told.usage.prompt_tokens + told.usage.completion_tokens
    assert told._request_id == told.id
    thoughtful = ask(served, extra_body={})
    assert thoughtful.choices[0].message.reasoning_content == "Someone greets me."
    assert thoughtful.usage.completion_tokens_details.reasoning_tokens > 0


def test_a_stream(served) -> None:
    options = {"include_usage": True}
    chunks = list(ask(served, stream=True, stream_options=options, extra_body={}))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == GREETING
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == "Someone greets me."
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens is not None
    assert chunks[-1].qiusuo["currency"] == "CNY"


def test_an_async_client_asks_for_many_at_once(served) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=served.address, api_key=served.rich, max_retries=0
        ) as several:

            async def one(stream: bool) -> str:
                asked = several.chat.completions.create(
                    model="talker",
                    messages=HELLO,
                    temperature=0,
                    stream=stream,
                    extra_body=PLAIN,
                )
                if not stream:
                    return (await asked).choices[0].message.content
                pieces = [chunk.choices[0].delta.content or "" async for chunk in await asked]
                return "".join(pieces)

            return await asyncio.gather(*(one(bool(i % 2)) for i in range(8)))

    assert asyncio.run(main()) == [GREETING] * 8


def test_tools(served) -> None:
    said = ask(served, PARIS, tools=[WEATHER], extra_body={}).choices[0]
    assert said.finish_reason == "tool_calls"
    [made] = said.message.tool_calls
    assert (made.function.name, made.function.arguments) == ("get_weather", '{"city": "Paris"}')
    messages = [
        *BOTH,
        {"role": "assistant", "content": "", "tool_calls": [call("1", "Paris"), call("2", "Rome")]},
        result("2", "rainy"),
        result("1", "sunny"),
    ]
    assert ask(served, messages, tools=[WEATHER]).choices[0].message.content == "Sunny and rainy."


def test_tools_through_the_streaming_helper(served) -> None:
    with client(served).chat.completions.stream(
        model="talker", messages=BOTH, temperature=0, tools=[WEATHER], extra_body=PLAIN
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    made = final.choices[0].message.tool_calls
    assert [one.function.arguments for one in made] == ['{"city": "Paris"}', '{"city": "Rome"}']


def test_a_forced_call(served) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    said = ask(served, tools=[WEATHER], tool_choice=choice, max_tokens=300).choices[0]
    assert said.message.tool_calls[0].function.name == "get_weather"


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    strong: bool


def test_a_pydantic_model_is_filled_in(served) -> None:
    told = client(served).chat.completions.parse(
        model="talker",
        messages=HELLO,
        temperature=0,
        max_tokens=300,
        response_format=Mood,
        extra_body={},
    )
    message = told.choices[0].message
    assert isinstance(message.parsed, Mood)
    assert message.reasoning_content == "Someone greets me."


def test_logprobs(served) -> None:
    listed = ask(served, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in listed).decode() == GREETING
    assert all(len(one.top_logprobs) == 3 for one in listed)


def test_completions(served) -> None:
    options = dict(model="talker", prompt="Once upon a time", temperature=0, max_tokens=200)
    told = client(served).completions.create(**options, logprobs=1, echo=True)
    assert told.choices[0].text == TEXT
    assert told.choices[0].logprobs.text_offset[0] == 0
    pieces = client(served).completions.create(**options, stream=True)
    assert "Once upon a time" + "".join(one.choices[0].text for one in pieces) == TEXT


def test_models(served) -> None:
    assert [model.id for model in client(served).models.list()] == ["talker"]
    assert client(served).models.retrieve("talker").owned_by == "qiusuo"


def test_what_it_costs_is_on_the_balance(served) -> None:
    def balance() -> float:
        headers = {"authorization": f"Bearer {served.rich}"}
        told = httpx.get(f"{served.address}/user/balance", headers=headers).json()
        assert told["is_available"]
        return float(told["balance_infos"][0]["total_balance"])

    before = balance()
    usage = ask(served).usage
    hit, miss = usage.prompt_cache_hit_tokens, usage.prompt_cache_miss_tokens
    cost = (hit * 20 + miss * 1000 + usage.completion_tokens * 4000) / 1e9
    assert before - balance() == pytest.approx(cost, abs=1e-12)


def test_errors_are_of_the_packages_own_classes(served) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(served, key="sk-nobody")
    with pytest.raises(openai.BadRequestError, match="Model Not Exist"):
        ask(served, model="nobody")
    with pytest.raises(openai.BadRequestError, match="valid range of temperature"):
        ask(served, temperature=3)
    with pytest.raises(openai.UnprocessableEntityError, match="Failed to deserialize"):
        ask(served, messages=[{"role": "user", "content": 3}])
    with pytest.raises(openai.NotFoundError):
        client(served).models.retrieve("nobody")
    with pytest.raises(openai.APIStatusError) as refused:
        ask(served, key=served.poor)
    assert refused.value.status_code == 402
    assert refused.value.body["message"] == "Insufficient Balance"
    ask(served, key=served.slow)
    with pytest.raises(openai.RateLimitError) as limited:
        ask(served, key=served.slow)
    assert int(limited.value.response.headers["retry-after"]) >= 1


def test_a_stream_that_is_closed_frees_its_place(served) -> None:
    def running() -> float:
        headers = {"authorization": f"Bearer {served.rich}"}
        text = httpx.get(f"{served.address}/metrics", headers=headers).text
        line = 'qiusuo_engine_running{model="talker"} '
        [value] = [one.removeprefix(line) for one in text.splitlines() if one.startswith(line)]
        return float(value)

    stream = ask(served, stream=True, max_tokens=900, extra_body=PLAIN | {"ignore_eos": True})
    next(iter(stream))
    stream.close()
    while running():
        continue
    assert ask(served).choices[0].message.content == GREETING
