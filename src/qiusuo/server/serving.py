"""`qiusuo serve`: from names of models to a server that people can use, and to its orderly end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress

import uvicorn
import uvloop
from rich.console import Console

from qiusuo.checkpoint.open import find_model
from qiusuo.server.api.auth import is_loopback
from qiusuo.server.api.errors import ApiError
from qiusuo.server.app import create_app
from qiusuo.server.failure import ServerError
from qiusuo.server.house import House
from qiusuo.server.settings import Settings

log = logging.getLogger("qiusuo.server")


class Server(uvicorn.Server):
    """Asked to stop, it lets the answers under way end, and after ``drain_seconds`` ends them with
    a proper last word. Meanwhile it listens on: new questions and /health are told 503, and the
    page can still keep what it got. A second Ctrl-C ends at once."""

    def __init__(self, house: House) -> None:
        self.house = house
        settings = house.settings
        super().__init__(
            uvicorn.Config(
                create_app(house),
                host=settings.host,
                port=settings.port,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=10,  # for last bytes: shutdown() has waited for answers
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = asyncio.create_task(self.house.desk.drain(self.house.settings.drain_seconds))
        while not drain.done() and not self.force_exit:
            await asyncio.wait((drain,), timeout=0.1)
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
        await super().shutdown(sockets)


def check_bind(settings: Settings, keys_exist: bool) -> None:
    """ServerError for an address that others can reach while nobody needs a key."""
    if not keys_exist and not is_loopback(settings.host):
        raise ServerError(
            f"{settings.host} can be reached from other machines and no API key was made: make one "
            "with `qiusuo keys make NAME`, or serve 127.0.0.1"
        )


def serve(settings: Settings, models: Sequence[str], names: Sequence[str] = ()) -> None:
    """Serve until asked to stop. The page is up at once; models come one after another.
    CheckpointError for a model that is not there, ServerError for an address that cannot be."""
    for model in models:
        find_model(model)  # before anything is made
    console = Console(stderr=True, highlight=False)
    with bound(settings) as listening:
        house = House.open(settings)
        try:
            check_bind(settings, house.keys.any())
        except ServerError:
            house.shut()
            raise
        with suppress(KeyboardInterrupt):  # raised anew once all has ended
            uvloop.run(_run(house, listening, models, names, console))


def bound(settings: Settings) -> socket.socket:
    """A socket that listens there. ServerError, with a remedy, where that cannot be."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen()  # whoever reads the address may call at once, and only has to wait
    except OSError as error:
        listening.close()
        raise ServerError(
            f"{settings.host}:{settings.port} cannot be used ({error.strerror}): give another "
            "with --port, or 0 for any that is free"
        ) from error
    return listening


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    shown = "localhost" if is_loopback(host) else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


async def _run(
    house: House,
    listening: socket.socket,
    models: Sequence[str],
    names: Sequence[str],
    console: Console,
) -> None:
    server = Server(house)
    address = address_of(listening)
    console.print(f"Qiusuo serves {address}  (the API: {address}/v1, its description: /docs)")
    wanted = [
        house.registry.announce(model, names[place] if place < len(names) else None)
        for place, model in enumerate(models)
    ]
    loading = asyncio.create_task(_bring(house, wanted, console))
    try:
        await server.serve(sockets=[listening])
    finally:
        loading.cancel()


async def _bring(house: House, wanted: Sequence[str], console: Console) -> None:
    for name in wanted:
        console.print(f"Loading {name} ...")
        try:
            served = await house.registry.bring(name)
        except ApiError as error:
            console.print(error.message, style="red", markup=False)  # it may quote a path
        else:
            console.print(f"{name} is ready; {served.lm.describe()}", markup=False)
