"""The chat, as a person at a browser has it: a real server, a real Chromium."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import qiusuo
from tests.server.page import chat_server
from tests.server.page.browser import browser
from tests.server.page.chat_server import CHINESE, OPENING, PARIS, SKY, STORY, WEATHER, Pace
from tests.server.page.site import PATIENCE, serving

# Seconds that a pass of the model takes longer: for what is done while it writes, so slow that a
# loaded machine comes in time; and for watching the answer grow.
SLOW, STEADY = 0.1, 0.01
PROJECT = Path(qiusuo.__file__).parents[2]
ANSWERED = ".answer:last-of-type .figures"
# Of the branches in view, the last answer's text.
LAST = ".answer >> nth=-1"


class Process:
    """A server process of its own in a folder; it may be killed and started again."""

    def __init__(self, folder: Path, weights: Path) -> None:
        self.folder, self.weights = folder, weights
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://localhost:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float) -> Process:
        """Each pass of its model takes so much longer."""
        command = [sys.executable, "-m", chat_server.__name__, str(self.folder), str(self.port)]
        command += [str(self.weights), str(seconds)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log)
        transport = httpx.HTTPTransport(retries=0)
        with httpx.Client(transport=transport, timeout=PATIENCE) as client:
            while True:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                try:
                    client.get(self.address + "/health")
                    return self
                except httpx.ConnectError:
                    try:  # a pause that ends at once where the process dies
                        self.process.wait(0.05)
                    except subprocess.TimeoutExpired:
                        continue

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(PATIENCE)


@dataclass(frozen=True)
class Talking:
    """A server on a thread, and how fast its model writes."""

    address: str
    pace: Pace


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    # One for all workers of xdist.
    return chat_server.learnt(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@contextmanager
def talking(folder: Path, weights: Path) -> Iterator[Talking]:
    pace = Pace()
    furnish = partial(chat_server.furnish, weights=weights, pace=pace)
    with serving(chat_server.settings_in(folder), furnish) as address:
        yield Talking(address, pace)


@pytest.fixture(scope="module")
def server(chromium, weights, tmp_path_factory) -> Iterator[Talking]:
    with talking(tmp_path_factory.mktemp("served"), weights) as one:
        yield one


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def visit(chromium) -> Iterator[Callable[..., Any]]:
    """Opens a page in a browser of its own; complaints of the page fail the test in the end."""
    contexts, complaints = [], []

    def open_page(address: str, ready: str = "#composer", **how: Any) -> Any:
        context = chromium.new_context(
            **({"viewport": {"width": 1280, "height": 800}, "locale": "en-US"} | how)
        )
        context.set_default_timeout(PATIENCE * 1000)
        # The tiny model knows its lines as the likeliest words.
        context.add_init_script("localStorage['qiusuo.settings'] ??= '{\"temperature\": 0}'")
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: "Content Security Policy" in said.text and complaints.append(said.text),
        )
        page.goto(address)
        page.wait_for_selector(ready)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page: Any, text: str) -> None:
    page.fill("#composer", text)
    page.keyboard.press("Enter")


def whole(page: Any) -> None:
    """Until the answer in view has ended and is kept."""
    page.wait_for_selector(ANSWERED)
    page.wait_for_selector(".answer[aria-busy=true]", state="detached")


def without_thinking(page: Any) -> None:
    page.click(".think-switch[aria-pressed=true]")


# -- answers ------------------------------------------------------------------------------------


def test_an_answer_comes_with_its_thought_and_stays(server, visit):
    page = visit(server.address)
    with server.pace.of(SLOW):
        ask(page, SKY)
        page.wait_for_selector(".thought.running >> text=Rayleigh scattering")
        page.wait_for_selector(".thought.running .thought-switch >> text=Thinking")
    whole(page)
    assert re.match(r"Thought for [\d.]+ s", page.inner_text(".thought-switch"))
    page.wait_for_selector(".thought-text", state="detached")  # nobody opened it, so it has closed
    assert page.inner_text(".answer h2") == "Because air scatters blue most"
    assert page.locator(".answer .formula .katex").count() == 1
    assert page.locator(".answer p .katex").count() == 2
    assert page.locator(".answer tbody tr").count() == 3
    assert page.locator(".answer code .hljs-keyword").count() >= 2
    assert "It costs $5 and not $10" in page.inner_text(".answer blockquote")
    figures = page.inner_text(".figures")
    assert "of them thought" in figures
    assert "tokens/s" in figures
    before = page.inner_text(".answer .markdown")
    page.reload()
    whole(page)
    assert page.inner_text(".answer .markdown") == before
    assert page.inner_text(".figures") == figures
    page.click(".thought-switch")
    assert "Rayleigh scattering" in page.inner_text(".thought-text")


def test_words_sent_before_the_models_are_known_are_not_lost(server, visit):
    page = visit(server.address + "/studio", ready="text=Studio")
    held, sent, known = [], [], False

    def hold(route: Any) -> None:
        if known:
            route.continue_()
        else:
            held.append(route)

    page.route("**/api/models", hold)
    page.on("request", lambda asked: asked.method == "POST" and sent.append(asked.url))
    page.goto(server.address)
    ask(page, CHINESE)
    assert page.input_value("#composer") == CHINESE
    assert sent == []
    known = True
    for route in held:
        route.continue_()
    whole(page)
    assert page.inner_text(".question .words") == CHINESE
    assert page.input_value("#composer") == ""
    assert len([url for url in sent if url.endswith("/v1/chat/completions")]) == 1


def test_an_opened_thought_stays_open(server, visit):
    page = visit(server.address)
    with server.pace.of(SLOW):
        ask(page, CHINESE)
        page.wait_for_selector(".thought.running")
        page.click(".thought-switch")
        page.wait_for_selector(".thought-text", state="detached")
        page.click(".thought-switch")
        page.wait_for_selector(".thought.running .thought-text")
    whole(page)
    assert "离骚" in page.inner_text(".thought-text")


WATCH = r"""() => {
    const seen = (window.seen = { errors: 0, headings: new Set(), raw: [] });
    const look = () => {
        const answer = document.querySelector('.answer');
        if (!answer) return;
        seen.errors += answer.querySelectorAll('.katex-error').length;
        const heading = answer.querySelector('h2');
        if (heading?.textContent.endsWith('most')) seen.headings.add(heading);
        for (const one of answer.querySelectorAll('p, td')) {
            const source = /\*\*|\\\[|\\frac/.test(one.textContent);
            if (source && !one.querySelector('.unfinished, .katex')) seen.raw.push(one.textContent);
        }
    };
    const all = { subtree: true, childList: true, characterData: true };
    new MutationObserver(look).observe(document.body, all);
}"""


def test_a_formula_that_is_coming_breaks_nothing(server, visit):
    """Every state of the page while the answer grows: no half of a formula or mark is shown, and
    what was finished is not drawn again."""
    page = visit(server.address)
    without_thinking(page)
    page.evaluate(WATCH)
    with server.pace.of(STEADY):
        ask(page, SKY)
        whole(page)
    seen = page.evaluate("() => ({ ...window.seen, headings: window.seen.headings.size })")
    assert seen == {"errors": 0, "headings": 1, "raw": []}


def test_the_thought_can_be_ended(server, visit):
    page = visit(server.address)
    with server.pace.of(SLOW):
        ask(page, SKY)
        page.wait_for_selector(".thought.running >> text=Rayleigh")
        page.click("text=Answer now")
        page.wait_for_selector(".answer > .markdown")
        page.keyboard.press("Escape")  # the model has not learnt what to say after half a thought
    whole(page)
    page.click(".thought-switch")
    assert "keep it short" not in page.inner_text(".thought-text")


def test_a_stopped_answer_is_kept_and_can_go_on(server, visit):
    page = visit(server.address)
    without_thinking(page)
    with server.pace.of(SLOW):
        ask(page, SKY)
        page.wait_for_selector(".answer p >> text=all colours")
        page.keyboard.press("Escape")
        whole(page)
    assert "Stopped." in page.inner_text(LAST)
    begun = page.inner_text(".answer h2")
    page.reload()
    whole(page)
    page.click("text=Go on")
    page.wait_for_selector(".answer blockquote")
    whole(page)
    assert page.inner_text(".answer h2") == begun
    assert page.locator(".answer").count() == 1


def test_branches(server, visit):
    page = visit(server.address)
    without_thinking(page)
    ask(page, "Hello")
    page.wait_for_selector("text=Good day, friend!")
    whole(page)
    page.keyboard.press("ArrowUp")  # in the empty composer
    page.fill(".editor textarea", "Hello there")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Good day to you too!")
    whole(page)
    assert page.inner_text(".question .branches") == "2/2"
    page.click(".question [aria-label='Previous version']")
    page.wait_for_selector("text=Good day, friend!")
    page.click("[aria-label='Answer anew']")
    page.wait_for_selector(".answer .branches >> text=2/2")
    whole(page)
    page.reload()
    whole(page)
    assert page.inner_text(".question .words") == "Hello"
    assert page.inner_text(".answer .branches") == "2/2"
    page.click(".question [aria-label='Next version']")
    page.wait_for_selector("text=Good day to you too!")


def test_what_a_model_writes_cannot_act(server, visit):
    page = visit(server.address)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    without_thinking(page)
    ask(page, "Attack")
    whole(page)
    page.reload()
    whole(page)
    assert page.title() == "Attack · Qiusuo"
    assert page.locator(".answer img, .answer script, .answer [onclick]").count() == 0
    links = page.eval_on_selector_all(".answer .markdown a", "all => all.map(a => [a.href, a.rel])")
    assert [href for href, _ in links] == ["http://127.0.0.1:9/spy.png", "https://example.org/"]
    assert all("noopener" in rel for _, rel in links)
    assert all(url.startswith(server.address) for url in asked)


def test_a_tool_is_called_and_answered(server, visit):
    page = visit(server.address)
    page.click("[aria-label=Settings]")
    page.fill(".settings textarea.mono", json.dumps([WEATHER]))
    page.keyboard.press("Escape")
    ask(page, PARIS)
    whole(page)
    page.fill(".call form input", "sunny")
    assert '"city": "Paris"' in page.inner_text(".call pre")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=It is sunny.")
    whole(page)
    page.reload()
    page.wait_for_selector("text=It is sunny.")
    assert "Result of get_weather" in page.inner_text(".result")


def test_a_model_of_text_goes_on_with_an_opening(server, visit):
    page = visit(server.address)
    page.click(".picker-button")
    page.click("[role=option] >> text=teller")
    assert page.query_selector(".think-switch") is None
    ask(page, OPENING)
    whole(page)
    assert page.inner_text(".continued").strip() == STORY.strip()


# -- the composer and the list --------------------------------------------------------------------


def test_enter_that_ends_a_composition_does_not_send(server, visit):
    page = visit(server.address)
    without_thinking(page)
    page.fill("#composer", "Hello")
    page.eval_on_selector(
        "#composer",
        """box => {
            const enter = { key: 'Enter', bubbles: true, cancelable: true };
            const press = more =>
                box.dispatchEvent(new KeyboardEvent('keydown', { ...enter, ...more }));
            press({ isComposing: true });
            press({ keyCode: 229 });
        }""",
    )
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#composer") == "Hello\n"
    assert page.locator(".question").count() == 0
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Good day, friend!")


def test_files_go_along_in_fences(server, visit):
    page = visit(server.address)
    without_thinking(page)
    page.set_input_files(
        "input[type=file]",
        [
            {"name": "notes.md", "mimeType": "text/plain", "buffer": b"a\n```\nb\n```\n"},
            {"name": "large.txt", "mimeType": "text/plain", "buffer": b"x" * 300_000},
            {"name": "photo.txt", "mimeType": "text/plain", "buffer": b"\xff\xd8\x00"},
        ],
    )
    page.wait_for_selector("text=photo.txt is not a text file.")
    page.wait_for_selector("text=large.txt is larger than 256 KB.")
    assert page.locator(".file-chip").count() == 1
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Look")
    content = asked.value.post_data_json["messages"][0]["content"]
    assert content == "File: notes.md\n````\na\n```\nb\n```\n````\n\nLook"
    page.keyboard.press("Escape")
    whole(page)
    page.reload()
    page.click(".question summary >> text=notes.md")
    assert "```" in page.inner_text(".question .file pre")


def test_conversations_are_found_renamed_saved_and_deleted(server, visit):
    page = visit(server.address)
    without_thinking(page)
    ask(page, "Hello")
    whole(page)
    row = page.locator(".conversation.here")
    row.hover()
    row.locator(".menu button").first.click()
    page.click("text=Rename")
    page.fill(".naming input", "上下求索 notes")
    page.keyboard.press("Enter")
    page.wait_for_selector(".conversation >> text=上下求索 notes")
    page.keyboard.press("Control+k")
    page.keyboard.type("下求")
    page.locator(".conversation").nth(1).wait_for(state="detached")
    row.hover()
    row.locator(".menu button").first.click()
    with page.expect_download() as saved:
        page.click("text=Save as Markdown")
    assert saved.value.suggested_filename == "上下求索 notes.md"
    assert "Good day, friend!" in Path(saved.value.path()).read_text()
    row.locator(".menu button").first.click()
    page.click("[role=menuitem] >> text=Delete")
    page.click("dialog .danger")
    page.wait_for_selector("text=Nothing found.")
    page.wait_for_selector(".greeting")
    assert page.url == server.address + "/"


def test_on_a_phone_in_chinese_and_dark(server, visit):
    page = visit(
        server.address,
        viewport={"width": 360, "height": 740},
        locale="zh-CN",
        color_scheme="dark",
        is_mobile=True,
        has_touch=True,
    )
    assert page.inner_text(".greeting h1") == "今天想探索什么？"
    assert page.get_attribute("html", "data-theme") == "dark"
    page.fill("#composer", CHINESE)
    page.click("[aria-label=发送]")
    whole(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.click("[aria-label=设置]")
    page.fill("dialog textarea >> nth=0", "你是一位诗人。")  # in sight, or it could not be filled
    page.click("dialog [aria-label=关闭]")
    page.click("[aria-label=显示对话列表]")
    page.click(".side.open .new-chat")
    page.wait_for_selector(".greeting")
    page.click("[aria-label='Switch to English']")
    page.wait_for_selector("text=What shall we find out?")


# -- when things go wrong -------------------------------------------------------------------------


def test_a_killed_server_takes_nothing_along(chromium, weights, tmp_path, visit):
    server = Process(tmp_path, weights).start(SLOW)
    try:
        page = visit(server.address)
        without_thinking(page)
        ask(page, SKY)
        page.wait_for_selector(".answer p >> text=all colours")
        server.end(signal.SIGKILL)
        page.wait_for_selector(".answer .trouble >> text=The connection broke.")
        page.wait_for_selector("text=This answer is not saved yet.")
        written = page.inner_text(".answer .markdown")
        page.fill("#composer", "Hello")
        page.click(".new-chat")
        ask(page, "Hello")
        page.wait_for_selector(".composer .trouble >> text=The server does not answer.")
        assert page.input_value("#composer") == "Hello"
        page.go_back()
        server.start(0)
        page.click("text=Save")
        page.wait_for_selector("text=This answer is not saved yet.", state="detached")
        page.reload()
        page.wait_for_selector(".answer .markdown")
        assert page.inner_text(".answer .markdown") == written
        page.click("text=Go on")
        page.wait_for_selector(".answer blockquote")
    finally:
        server.end()


def test_a_key_is_asked_for(chromium, weights, tmp_path, visit):
    with talking(tmp_path, weights) as server:
        made = httpx.post(
            server.address + "/api/console/keys",
            json={"name": "me", "account": "main", "admin": True},
        )
        assert made.status_code == 201, made.text
        secret = re.search(r"sk-\w{40,}", made.text)[0]
        page = visit(server.address)
        page.fill("dialog input", "sk-wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The server does not know this key.")
        page.fill("dialog input", secret)
        page.keyboard.press("Enter")
        page.wait_for_selector(".picker-button")
        page.wait_for_selector("dialog", state="detached")
        assert secret not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()
        page.wait_for_selector(".picker-button")


# -- the build ------------------------------------------------------------------------------------


def test_the_built_page_is_of_these_sources():
    sources = PROJECT / "web"
    if not sources.is_dir():
        pytest.skip("the sources of the page are not part of an installed package")
    named = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.js"]
    paths = [*named, *(str(one.relative_to(sources)) for one in sources.glob("src/**/*.*"))]
    mark = hashlib.sha256()
    for path in sorted(path.replace("\\", "/") for path in paths):
        mark.update(path.encode() + b"\0" + (sources / path).read_bytes() + b"\0")
    static = Path(qiusuo.__file__).parent / "server" / "static"
    built = (static / "sources.sha256").read_text().strip()
    assert built == mark.hexdigest(), "the page is stale: npm ci && npm run build in web/"
