"""A loop of tools driven by a library of agents, unmodified, against a real server process: the
model calls twice at once, the library runs the tool and tells its results, the model answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.api.processes import ServerProcess
from tests.server.api.talkers import BOTH, WEATHER, talker

pytestmark = pytest.mark.long
agents = pytest.importorskip(
    "agents", reason="openai-agents is not installed: pip install openai-agents"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    place: Path = tmp_path_factory.mktemp("agent")
    talker().save(place / "talker")
    with ServerProcess(place / "talker", place / "db") as server:
        yield str(server.address)


def model(address: str, kind: str) -> Any:
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    if kind == "chat":
        return agents.OpenAIChatCompletionsModel("talker", client)
    return agents.OpenAIResponsesModel("talker", client)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_a_loop_of_tools(address, kind, stream) -> None:
    asked: list[str] = []

    async def get_weather(context: Any, arguments: str) -> str:
        asked.append(city := json.loads(arguments)["city"])
        return {"Paris": "sunny", "Rome": "rainy"}[city]

    function = WEATHER["function"]
    tool = agents.FunctionTool(
        name=function["name"],
        description=function["description"],
        params_json_schema=function["parameters"],
        on_invoke_tool=get_weather,
        strict_json_schema=False,
    )
    plain = {"thinking": {"type": "disabled"}} if kind == "chat" else None
    effort = None if kind == "chat" else {"effort": "none"}
    agent = agents.Agent(
        name="weather",
        tools=[tool],
        model=model(address, kind),
        model_settings=agents.ModelSettings(temperature=0, extra_body=plain, reasoning=effort),
    )
    quiet = agents.RunConfig(tracing_disabled=True)

    async def run() -> Any:
        question = BOTH[0]["content"]
        if not stream:
            return await agents.Runner.run(agent, question, run_config=quiet, max_turns=4)
        running = agents.Runner.run_streamed(agent, question, run_config=quiet, max_turns=4)
        pieces = [
            event.data.delta
            async for event in running.stream_events()
            if event.type == "raw_response_event"
            and event.data.type == "response.output_text.delta"
        ]
        assert "".join(pieces) == running.final_output
        return running

    ended = asyncio.run(run())
    assert asked == ["Paris", "Rome"]
    assert ended.final_output == "Sunny and rainy."
    usage = ended.context_wrapper.usage
    assert usage.requests == 2
    assert usage.output_tokens > 0
