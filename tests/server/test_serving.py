"""`qiusuo serve` as a process: how it comes up, whom it refuses, how it ends, and what it bills
when clients or the server itself go away in the middle of an answer."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from qiusuo.server.database import Database
from qiusuo.server.keys import Keys
from qiusuo.server.ledger import Ledger
from qiusuo.server.money import UNITS
from qiusuo.server.prices import Price, PriceBook
from tests.server.api.talkers import HELLO, talker
from tests.server.gated_server import PATIENCE, GatedServer
from tests.server.page.browser import browser

MOST_BODY = 100_000
PRICE = Price(hit=20, miss=1000, output=4000)
GREETING = "Good day, 求索 friend!"
LONG = {"ignore_eos": True, "max_tokens": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "talker"
    talker().save(folder)
    return folder


@pytest.fixture(scope="module")
def broken(model) -> Path:
    """A model that is found but cannot be loaded."""
    folder = model.with_name("broken")
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


@pytest.fixture(scope="module")
def server(model, broken, tmp_path_factory) -> Iterator[GatedServer]:
    """Without keys, asked to serve a model that is broken and one that is not; at the gate before
    the first."""
    database = tmp_path_factory.mktemp("server") / "server.sqlite3"
    with GatedServer(database, broken, model, most_body=MOST_BODY) as process:
        yield process


@pytest.fixture(scope="module")
def loaded(server) -> GatedServer:
    """The same, once the one model is there."""
    server.let(2)
    ready(server)
    return server


def ready(server: GatedServer) -> None:
    wait_for(lambda: server.client().get("/health").json()["models"] == ["talker"])


def wait_for(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.01)


def question(**more: Any) -> dict[str, Any]:
    body = {"model": "talker", "messages": HELLO, "temperature": 0, "stream": True}
    return body | {"thinking": {"type": "disabled"}} | more


@contextmanager
def asked(server: GatedServer, secret: str = "", **more: Any) -> Iterator[httpx.Response]:
    """A stream that has begun; leaving it closes the connection."""
    with (
        server.client(secret) as client,
        client.stream("POST", "/v1/chat/completions", json=question(**more)) as response,
    ):
        assert response.status_code == 200, response.read()
        yield response


def rest(response: httpx.Response) -> list[Any]:
    """Chunks until the end; the last must be there."""
    frames = [one for one in response.read().decode().split("\n\n") if one]
    assert frames[-1] == "data: [DONE]"
    data = [one.removeprefix("data: ") for one in frames[:-1] if not one.startswith(":")]
    return [json.loads(one) for one in data]


def billed(database: Path, request: str | None = None) -> list[dict[str, Any]]:
    """Rows of usage as they stand in the file."""
    with closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute("SELECT * FROM usage ORDER BY request").fetchall()
    return [dict(row) for row in rows if request in (None, row["request"])]


def money(database: Path) -> dict[str, int]:
    """Of the firm, in a ledger that adds up."""
    opened = Database(database)
    ledger = Ledger(opened)
    try:
        ledger.check()
        balance = ledger.balance("firm")
        return {"total": balance.total, "reserved": balance.reserved}
    finally:
        ledger.close()
        opened.close()


# -- coming up ------------------------------------------------------------------------------


def test_page_and_health_are_up_before_a_model_is_loaded(server) -> None:
    server.at_gate()
    with server.client() as client:
        health = client.get("/health").json()
        assert health == {"status": "ok", "models": [], "loading": ["broken", "talker"]}
        assert "<script" in client.get("/").text
        assert client.get("/v1/models").json()["data"] == []
        early = client.post("/v1/chat/completions", json=question())
        assert early.status_code == 503
        assert "talker is being loaded" in early.json()["error"]["message"]


def test_a_model_that_cannot_be_loaded_leaves_the_others_and_says_why(loaded) -> None:
    with loaded.client() as client:
        assert client.get("/health").json()["loading"] == []
        [failed] = [one for one in client.get("/api/console/engine").json() if one.get("error")]
        refused = client.post("/v1/chat/completions", json=question(model="broken"))
    assert failed["id"] == "broken"
    assert "safetensors" in failed["error"]
    assert refused.status_code == 400
    told = " ".join(loaded.said.split())
    assert "cannot be served" in told
    assert "Traceback" not in told


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qiusuo", "serve", *words, "--database", str(folder / "db")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_other_machines_need_keys(tmp_path) -> None:
    ended = command("--host", "0.0.0.0", "--port", "0", folder=tmp_path)
    assert ended.returncode != 0
    assert "0.0.0.0 can be reached from other machines" in ended.stderr
    assert "qiusuo keys make" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken(tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        ended = command("--port", port, folder=tmp_path)
    assert ended.returncode != 0
    assert f"127.0.0.1:{port} cannot be used" in ended.stderr
    assert "--port" in ended.stderr.split("cannot be used")[1]
    assert "Traceback" not in ended.stderr


# -- who may ask, and how much --------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:80"},
        {"host": "localhost.evil.example"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},  # another program of this machine
    ],
    ids=lambda headers: "-".join(*headers.items()),
)
@pytest.mark.parametrize("path", ["/v1/models", "/api/me", "/api/console/keys", "/metrics"])
def test_an_open_server_answers_no_other_site(server, headers, path) -> None:
    with server.client() as client:
        refused = client.get(path, headers=headers)
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
        assert client.get(path).status_code == 200
        own = {"origin": str(server.address)}
        assert client.get(path, headers=own).status_code == 200


def test_a_body_that_is_too_large(server) -> None:
    body = json.dumps(question(messages=[{"role": "user", "content": "x" * MOST_BODY}])).encode()
    headers = {"content-type": "application/json"}
    with server.client() as client:
        for path in ("/v1/chat/completions", "/anthropic/v1/messages", "/api/conversations"):
            for content in (body, iter([body[:60_000], body[60_000:]])):  # the latter in chunks
                refused = client.post(path, content=content, headers=headers)
                assert refused.status_code == 413
                assert f"{MOST_BODY:,} bytes" in refused.json()["error"]["message"]


def test_docs_need_no_other_host(server) -> None:
    asked_for: list[str] = []
    complaints: list[str] = []
    with browser() as chromium:
        page = chromium.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("request", lambda request: asked_for.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.goto(f"{server.address}/docs")
        page.locator('[data-path="/v1/chat/completions"]').click()
        page.get_by_text("Request body").wait_for()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").wait_for()
    assert complaints == []
    others = [url for url in asked_for if not url.startswith((f"{server.address}/", "data:"))]
    assert others == []


# -- going away -----------------------------------------------------------------------------


def test_a_client_that_leaves_pays_for_the_tokens_drawn_and_no_more(loaded) -> None:
    """Each pass draws one token, so the passes that were let through are what is owed."""
    seen = 0
    for leaving_after in range(13):
        before = loaded.passes
        with asked(loaded, **LONG) as response:
            request = response.headers["x-request-id"]
            loaded.let(leaving_after)
            loaded.at_gate()  # all of them are drawn, and the next pass has begun
        loaded.let(1)
        while not (rows := billed(loaded.database, request)):
            if loaded.waiting:  # the server has not yet noticed
                loaded.let(1)
            time.sleep(0.005)
        [row] = rows
        drawn = loaded.passes - before
        assert row["output"] == drawn > leaving_after
        assert row["hit"] + row["miss"] > 0
        assert row["finish"] == "cancelled"
        seen += 1
    assert seen == len(billed(loaded.database)) == 13


def end(server: GatedServer, **more: Any) -> httpx.Response:
    """Ask it to stop; /health, once it has heard."""
    server.process.send_signal(signal.SIGTERM)
    with server.client() as client:
        wait_for(lambda: client.get("/health").status_code == 503)
        return client.post("/v1/chat/completions", json=question(**more))


def test_a_stream_is_finished_before_the_server_ends(model, tmp_path) -> None:
    with GatedServer(tmp_path / "db", model, drain_seconds=PATIENCE) as server:
        server.let(1)
        ready(server)
        with asked(server, stream_options={"include_usage": True}) as response:
            server.let(2)
            server.at_gate()
            refused = end(server)
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
            server.free()
            chunks = rest(response)
        server.process.wait(PATIENCE)
    assert "".join(one["choices"][0]["delta"]["content"] for one in chunks) == GREETING
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    [row] = billed(tmp_path / "db")
    assert row["output"] == chunks[-1]["usage"]["completion_tokens"]
    assert "Traceback" not in server.said


def test_a_stream_that_takes_too_long_to_end_gets_a_last_word(model, tmp_path) -> None:
    with GatedServer(tmp_path / "db", model, drain_seconds=0) as server:
        server.let(1)
        ready(server)
        with asked(server, **LONG) as response:
            server.let(3)
            server.at_gate()
            end(server)  # it was told to stop after the pass it is in
            server.let(1)
            chunks = rest(response)
        server.process.wait(PATIENCE)
    assert chunks[-1]["choices"][0]["finish_reason"] == "insufficient_system_resource"
    [row] = billed(tmp_path / "db")
    assert row["output"] == chunks[-1]["usage"]["completion_tokens"] == server.passes == 4
    assert "Traceback" not in server.said


def test_killed_in_the_middle_of_streams(model, tmp_path) -> None:
    path = tmp_path / "db"
    database = Database(path)
    ledger = Ledger(database)
    ledger.top_up("firm", UNITS, token="a test")
    PriceBook(database).set("talker", PRICE)
    _, secret = Keys(database).make("firm", "firm")
    ledger.close()
    database.close()
    with GatedServer(path, model) as server:
        server.let(1)
        ready(server)
        with server.client(secret) as client, server.client("sk-" + "wrong" * 10) as stranger:
            whole = ThreadPoolExecutor(1).submit(
                client.post, "/v1/chat/completions", json=question(stream=False)
            )
            while not whole.done():
                if server.waiting:
                    server.let(1)
                time.sleep(0.002)
            settled = billed(path)
            assert [row["output"] for row in settled] == [
                whole.result().json()["usage"]["completion_tokens"]
            ]
            assert stranger.get("/v1/models").status_code == 401
        with asked(server, secret, n=2, **LONG):
            server.let(5)
            server.at_gate()
            assert money(path)["reserved"] > 0
            server.kill()
    assert secret not in server.said
    assert "wrong" * 10 not in server.said
    left = UNITS - settled[0]["amount"]
    with GatedServer(path, model) as again:
        again.free()
        ready(again)
        assert billed(path) == settled
        assert money(path) == {"total": left, "reserved": 0}
        with asked(again, secret) as response:
            assert "".join(one["choices"][0]["delta"]["content"] for one in rest(response))
    rows = billed(path)
    assert len(rows) == 2
    assert money(path) == {"total": UNITS - sum(row["amount"] for row in rows), "reserved": 0}
    assert b"sk-" + secret[3:].encode() not in path.read_bytes()
