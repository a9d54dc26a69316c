"""A house with a tiny model that talks, and clients of its application."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from qiusuo.server.app import create_app
from qiusuo.server.house import House
from qiusuo.server.settings import Settings
from tests.server.api.talkers import talker

PATIENCE = 60.0  # seconds until a test that hangs fails; nothing waits for it otherwise

Client = httpx.AsyncClient
Visit = Callable[[Client], Awaitable[Any]]


class Place:
    """A house, its application, and one event loop for a test's visit."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.app = create_app(house)

    def visit(self, visit: Visit, **headers: str) -> Any:
        async def main() -> Any:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost", headers=headers
            ) as client:
                told = await visit(client)
            await self.settled()
            return told

        return asyncio.run(asyncio.wait_for(main(), PATIENCE))

    async def settled(self) -> None:
        """Until no request is left, and its place in the engine is free."""
        while self.house.desk.jobs:
            await asyncio.sleep(0.001)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        async def visit(client: Client) -> httpx.Response:
            if isinstance(body, str | bytes):
                kind = {"content-type": "application/json"}
                return await client.post(path, content=body, headers=kind)
            return await client.post(path, json=body)

        return self.visit(visit, **headers)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.visit(lambda client: client.get(path), **headers)

    def chat(self, messages: list[dict], **more: Any) -> httpx.Response:
        body = {"model": "talker", "messages": messages, "temperature": 0} | more
        return self.post("/v1/chat/completions", body)

    def complete(self, prompt: Any, **more: Any) -> httpx.Response:
        body = {"model": "talker", "prompt": prompt, "temperature": 0} | more
        return self.post("/v1/completions", body)


def told(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


def streamed(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [one for one in response.text.split("\n\n") if one]
    assert frames[-1] == "data: [DONE]"
    data = [one.removeprefix("data: ") for one in frames[:-1] if not one.startswith(":")]
    return [json.loads(one) for one in data]


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(database=tmp_path / "server.sqlite3", runs=tmp_path / "runs")


@pytest.fixture
def place(settings) -> Iterator[Place]:
    house = House.open(settings)
    house.registry.adopt("talker", talker())
    yield Place(house)
    asyncio.run(house.close())
