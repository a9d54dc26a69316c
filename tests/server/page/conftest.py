"""A real server with the page's routes on a port of its own, and keys to ask it with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from qiusuo.server.api.errors import answer_errors
from qiusuo.server.house import House
from qiusuo.server.page import chats, console, models, studio
from qiusuo.server.settings import Settings

PATIENCE = 30.0  # seconds until a test that hangs fails


@dataclass
class Served:
    """``client`` asks as whoever sits at this machine; ``during`` runs something in its loop."""

    house: House
    client: httpx.Client
    app: FastAPI
    loop: asyncio.AbstractEventLoop

    def key(self, name: str, account: str = "main", **limits: object) -> httpx.Client:
        """A client with a new key."""
        _, secret = self.house.keys.make(name, account, **limits)
        return self.with_secret(secret)

    def with_secret(self, secret: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {secret}"}
        return httpx.Client(base_url=self.client.base_url, headers=headers, timeout=PATIENCE)

    def during(self, work: object) -> object:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)


def page_app(house: House) -> FastAPI:
    app = FastAPI()
    app.state.house = house
    answer_errors(app)
    for part in (models, chats, studio, console):
        app.include_router(part.router)
    return app


@contextmanager
def served(settings: Settings) -> Iterator[Served]:
    house = House.open(settings)
    app = page_app(house)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5)
    )
    began = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        began.set()
        await serving
        await house.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert began.wait(PATIENCE)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            yield Served(house, client, app, loops[0])
    finally:
        house.desk.closing = True  # what the server's own shutdown does first
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        database=tmp_path / "server.sqlite3", runs=tmp_path / "runs", recipes=tmp_path / "recipes"
    )


@pytest.fixture
def page(settings: Settings) -> Iterator[Served]:
    with served(settings) as one:
        yield one


@pytest.fixture
def serve() -> Callable[[Settings], object]:
    """To serve, end, and serve again."""
    return served
