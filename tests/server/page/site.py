"""The server of `qiusuo serve` in a folder of its own, and a browser that visits it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from qiusuo.engine.limits import Limits
from qiusuo.server.house import House
from qiusuo.server.serving import Server, address_of, bound
from qiusuo.server.settings import Settings

PATIENCE = 60.0  # seconds until a test that hangs fails
PHONE = {"viewport": {"width": 360, "height": 740}, "locale": "zh-CN"}


@dataclass(frozen=True)
class Site:
    address: str
    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def database(self) -> Path:
        return self.folder / "server.sqlite3"


def _nothing(house: House) -> None:
    pass


@contextmanager
def serving(settings: Settings, furnish: Callable[[House], None] = _nothing) -> Iterator[str]:
    """The address of a whole server, up to its sockets and streams as `qiusuo serve` has it. It
    runs on a thread, since a process of its own would import for seconds what is here already.
    ``furnish`` is called in its loop before anybody is let in."""
    listening = bound(settings)
    servers: list[Server] = []
    begun = threading.Event()

    async def run() -> None:
        try:
            house = House.open(settings)
            furnish(house)
            servers.append(Server(house))
        finally:
            begun.set()
        await servers[0].serve(sockets=[listening])

    thread = threading.Thread(target=uvloop.run, args=(run(),))
    thread.start()
    try:
        assert begun.wait(PATIENCE)
        assert servers, "the server did not begin: its thread has said why"
        yield address_of(listening)
    finally:
        if servers:
            servers[0].should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A server that shows the runs in ``folder``/runs."""
    (folder / "runs").mkdir(exist_ok=True)
    settings = Settings(
        port=0,
        database=folder / "server.sqlite3",
        runs=folder / "runs",
        recipes=folder / "recipes",
        drain_seconds=1,
        limits=Limits(cache_bytes=20 << 20),
    )
    with serving(settings) as address:
        yield Site(address, folder)


@contextmanager
def visits(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages, each in a browser of its own; complaints of a page fail the test in the end."""
    contexts, complaints = [], []

    def visit(address: str, **how: Any) -> Any:
        context = chromium.new_context(
            **({"viewport": {"width": 1280, "height": 900}, "locale": "en-US"} | how)
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
        page.on("console", lambda said: _is_complaint(said) and complaints.append(said.text))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not complaints, complaints


def _is_complaint(said: Any) -> bool:
    """The page's policy has refused something; in a report's frame it is there to do so."""
    framed = said.location.get("url") == "about:srcdoc"
    return "Content Security Policy" in said.text and not framed


def too_wide(page: Any) -> list[str]:
    """What reaches beyond the page's right edge and cannot be scrolled to within its own box."""
    return page.evaluate(
        """() => {
            const wide = [];
            for (const node of document.querySelectorAll("#page *")) {
                const style = getComputedStyle(node);
                if (!node.getClientRects().length || style.position === "absolute") continue;
                let scrolls = false;
                for (let up = node.parentElement; up; up = up.parentElement)
                    scrolls ||= /auto|hidden|scroll/.test(getComputedStyle(up).overflowX)
                        && !up.matches(".page, html, body");
                if (!scrolls && node.getBoundingClientRect().right > innerWidth + 1)
                    wide.push(node.outerHTML.slice(0, 120));
            }
            return wide;
        }"""
    )
