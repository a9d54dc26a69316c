"""`qiusuo serve` in a folder of its own, and a browser that visits it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

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


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A server process that shows the runs in ``folder``/runs."""
    (folder / "runs").mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = Site(f"http://localhost:{port}", folder)
    words = ["serve", "--port", str(port), "--runs", str(one.runs)]
    words += ["--database", str(one.database), "--cache-gb", "0.02"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "qiusuo", *words], cwd=folder, stdout=log, stderr=log
        )
    try:
        _wait(one, process)
        yield one
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()


def _wait(one: Site, process: subprocess.Popen[bytes]) -> None:
    with httpx.Client(timeout=PATIENCE) as client:
        while True:
            assert process.poll() is None, (one.folder / "server.log").read_text()
            try:
                client.get(one.address + "/health")
                return
            except httpx.ConnectError:
                try:  # a pause that ends at once where the process dies
                    process.wait(0.05)
                except subprocess.TimeoutExpired:
                    continue


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
