"""`make run`: the page comes up first, the training is watched there, and then one talks with what
was trained.

The server and the training are two processes: this one serves, and a child lives the recipe in the
same terminal (`qiusuo quickstart --no-page`). So the page answers while all cores train, and a
fault of one does not end the other. Ctrl-C is passed on: the child saves where it stands.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import uvloop
from rich.console import Console

from qiusuo.data.cache import show_bytes
from qiusuo.data.catalogue import find_entry
from qiusuo.data.hub_reference import model_folder
from qiusuo.runs.folder import RunFolder, read_status
from qiusuo.server.api.errors import ApiError
from qiusuo.server.failure import ServerError
from qiusuo.server.house import House
from qiusuo.server.serving import Server, address_of, bound
from qiusuo.server.settings import Settings

COMPANION = "smollm2"  # a model that converses, small enough for any machine


def quickstart_with_page(path: Path, words: Sequence[str], settings: Settings) -> bool:
    """Serve the page, and train at ``path`` what ``words`` (of the command line) say, unless that
    is done. Returns when it is stopped; False if that was before the training had ended."""
    console = Console(highlight=False)
    if path.exists() and any(path.iterdir()):
        RunFolder.open(path, lock=False)  # refuses what is no run
    house = House.open(replace(settings, runs=path.parent))
    for end in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the training is ended with us
        signal.signal(end, signal.default_int_handler)
    with _listen(settings) as listening:
        address = address_of(listening)
        console.print(f"[bold]Qiusuo[/bold]  {address}  (Ctrl-C stops)")
        child = None
        if not _finished(path):
            console.print(f"Watch the training from its first step: {address}/studio/{path.name}\n")
            child = subprocess.Popen(
                [sys.executable, "-m", "qiusuo", "quickstart", "--no-page", *words],
                process_group=0,  # a Ctrl-C typed here reaches it once, through us
            )
        try:
            with suppress(KeyboardInterrupt):  # raised anew once all has ended
                uvloop.run(_run(house, Server(house), listening, child, path, console))
        finally:
            if child is not None:
                _end(child)
    return child is None or child.returncode == 0


def _finished(path: Path) -> bool:
    return bool(read_status(path).get("state") == "finished")


def _listen(settings: Settings) -> socket.socket:
    """The usual port, or any other if that is taken."""
    try:
        return bound(settings)
    except ServerError:
        return bound(replace(settings, port=0))


def _end(child: subprocess.Popen[bytes]) -> None:
    """It saves first, and we wait for that; Ctrl-C once more ends both."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGINT)
    try:
        child.wait()
    except KeyboardInterrupt:
        child.kill()
        child.wait()


async def _run(
    house: House,
    server: Server,
    listening: socket.socket,
    child: subprocess.Popen[bytes] | None,
    path: Path,
    console: Console,
) -> None:
    bringing = asyncio.create_task(_bring(house, child, path, address_of(listening), console))
    try:
        await server.serve(sockets=[listening])
    finally:
        bringing.cancel()


async def _bring(
    house: House,
    child: subprocess.Popen[bytes] | None,
    path: Path,
    address: str,
    console: Console,
) -> None:
    """The trained model once it is there, and one to converse with if it was ever pulled: nothing
    is fetched that nobody asked for."""
    if child is not None:
        while child.poll() is None:
            await asyncio.sleep(0.2)
        if child.returncode > 0:
            console.print(f"The training has ended with an error; the page stays at {address}")
    if _finished(path):
        with suppress(ApiError):
            await house.registry.add(path)
            console.print(f"{path.name} is there to write with: {address}", highlight=False)
    folder = model_folder(COMPANION)
    if not (folder / "config.json").is_file():
        size = show_bytes(find_entry(COMPANION).bytes)
        console.print(f"`qiusuo pull {COMPANION}` fetches a small model to talk with ({size})")
        return
    try:
        await house.registry.add(folder, COMPANION)
    except ApiError as error:
        console.print(f"{COMPANION} cannot be served: {error}", markup=False)
    else:
        console.print(f"{COMPANION} is there to talk with: {address}")
