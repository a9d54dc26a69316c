"""What a client hears while it waits, and what happens when it leaves. The engine makes as many
steps as a test lets it, so nothing here depends on time."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable

import pytest

from qiusuo.engine.request import EngineError
from qiusuo.server.house import House
from tests.engine.test_running import Gate
from tests.server.api.conftest import PATIENCE, Place
from tests.server.api.talkers import HELLO, talker

KEEP_ALIVE = b": keep-alive\n\n"


class Raw:
    """A client below HTTP: what it is sent, and when it goes."""

    def __init__(self, place: Place, body: dict, path: str = "/chat/completions") -> None:
        asked = {"model": "talker", "temperature": 0, "thinking": {"type": "disabled"}} | body
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False
        self._changed = asyncio.Condition()
        self._left = asyncio.Event()
        self._asked = [{"type": "http.request", "body": json.dumps(asked).encode()}]
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
        }
        self.task = asyncio.create_task(place.app(self.scope, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    async def until(self, what: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(what)

    async def _receive(self) -> dict:
        if self._asked:
            return self._asked.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        async with self._changed:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                self.body += message.get("body", b"")
                self.ended = not message.get("more_body", False)
            self._changed.notify_all()


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@pytest.fixture
def hasty(settings):
    """A house that says it is alive all the time."""
    house = House.open(dataclasses.replace(settings, keep_alive_seconds=0.005))
    house.registry.adopt("talker", talker())
    yield Place(house)
    asyncio.run(house.close())


def gate_of(place: Place) -> Gate:
    return Gate(place.house.registry.get("talker").lm.engine)


def usage_rows(place: Place) -> list[dict]:
    with place.house.database.read() as connection:
        return [dict(row) for row in connection.execute("SELECT * FROM usage")]


def assert_free(place: Place) -> None:
    engine = place.house.registry.get("talker").lm.engine
    assert engine.idle
    assert engine.pool.available == engine.pool.count


def test_a_stream_that_waits_is_kept_alive(hasty: Place) -> None:
    gate = gate_of(hasty)

    async def main() -> None:
        client = Raw(hasty, {"messages": HELLO, "stream": True})
        await client.until(lambda: client.body.count(KEEP_ALIVE) >= 3)
        assert client.status == 200
        assert client.body == KEEP_ALIVE * (len(client.body) // len(KEEP_ALIVE))
        gate.open()
        await client.task
        frames = client.body.replace(KEEP_ALIVE, b"").decode()
        assert frames.startswith("data: {")
        assert frames.endswith("data: [DONE]\n\n")
        for frame in frames.split("\n\n")[:-2]:
            json.loads(frame.removeprefix("data: "))

    run(main)


def test_a_body_that_waits_has_blank_lines_before_it(hasty: Place) -> None:
    gate = gate_of(hasty)

    async def main() -> None:
        client = Raw(hasty, {"messages": HELLO})
        await client.until(lambda: client.body.count(b"\n") >= 3)
        assert client.body.strip() == b""
        gate.open()
        await client.task
        assert "content-length" not in client.headers
        assert json.loads(client.body)["choices"][0]["finish_reason"] == "stop"

    run(main)


def test_a_quick_body_has_its_length(place: Place) -> None:
    response = place.chat(HELLO)
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["x-request-id"] == response.json()["id"]


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_billed_what_was_made(place: Place, stream: bool) -> None:
    gate = gate_of(place)

    async def main() -> None:
        client = Raw(place, {"messages": HELLO, "stream": stream, "ignore_eos": True})
        await gate.steps(4)
        if stream:
            await client.until(lambda: b'"content"' in client.body)
        client.leave()
        await asyncio.sleep(0)
        gate.open()
        await client.task
        await place.settled()

    run(main)
    [row] = usage_rows(place)
    assert 3 <= row["output"] <= 10  # and not the thousand that it asked for
    assert row["finish"] == "cancelled"
    assert_free(place)
    place.house.ledger.check()


def test_who_leaves_while_it_waits_frees_its_place(place: Place) -> None:
    """The engine is held: nothing is ever sent to it before it goes."""
    gate = gate_of(place)

    async def main() -> None:
        client = Raw(place, {"messages": HELLO, "stream": True})
        await client.until(lambda: client.status is not None)
        client.leave()
        await asyncio.sleep(0)
        gate.open()
        await client.task
        await place.settled()
        assert client.body == b""

    run(main)
    assert_free(place)


def test_an_error_after_the_beginning_is_the_last_frame(place: Place) -> None:
    gate = gate_of(place)

    def fail() -> None:
        raise EngineError("the engine broke")

    async def main() -> None:
        client = Raw(place, {"messages": HELLO, "stream": True})
        await gate.steps(4)
        await client.until(lambda: b'"content"' in client.body)
        gate.real_step = fail
        gate.open()
        await client.task
        assert client.status == 200
        assert b"[DONE]" not in client.body
        last = client.body.decode().rstrip("\n").split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable_error"

    run(main)


def test_an_error_before_it_is_a_status(place: Place) -> None:
    gate = gate_of(place)

    def fail() -> None:
        raise EngineError("the engine broke")

    async def main() -> None:
        client = Raw(place, {"messages": HELLO})
        gate.real_step = fail
        gate.open()
        await client.task
        assert client.status == 503
        assert json.loads(client.body)["error"]["type"] == "service_unavailable_error"

    run(main)


def test_completions_of_several_prompts_leave_together(place: Place) -> None:
    gate = gate_of(place)

    async def main() -> None:
        body = {"prompt": ["Once upon", "Once"], "stream": True, "ignore_eos": True}
        client = Raw(place, body | {"max_tokens": 500}, "/completions")
        while b'"text"' not in client.body:  # the second prompt is let in between two steps
            await gate.steps(1)
        client.leave()
        await asyncio.sleep(0)
        gate.open()
        await client.task
        await place.settled()

    run(main)
    assert [row["finish"] for row in usage_rows(place)] == ["cancelled"] * 2
    assert_free(place)


def test_what_is_counted_is_counted_once(place: Place) -> None:
    usage = place.chat(HELLO, stream=True).text
    tokens = json.loads(usage.split("\n\n")[-3].removeprefix("data: "))["usage"]
    counted = place.get("/metrics").text
    line = 'qiusuo_tokens_total{kind="output",model="talker"} '
    [value] = [one.removeprefix(line) for one in counted.splitlines() if one.startswith(line)]
    assert float(value) == tokens["completion_tokens"]


def test_no_more_are_let_in_than_may_wait_however_they_come(settings) -> None:
    house = House.open(dataclasses.replace(settings, most_waiting=2))
    house.registry.adopt("talker", talker())
    place = Place(house)
    gate = gate_of(place)

    async def main() -> None:
        clients = [Raw(place, {"messages": HELLO, "stream": True}) for _ in range(5)]
        refused = [one for one in clients if one.status == 503]
        while len(refused) < 3:  # the other two are at the gate
            await asyncio.sleep(0.001)
            refused = [one for one in clients if one.status == 503]
        gate.open()
        await asyncio.gather(*(one.task for one in clients))
        assert sorted(one.status for one in clients) == [200, 200, 503, 503, 503]
        late = Raw(place, {"messages": HELLO})
        await late.task
        assert late.status == 200

    try:
        run(main)
    finally:
        asyncio.run(house.close())


def test_who_reads_no_further_is_settled_when_the_server_ends(place: Place) -> None:
    gate = gate_of(place)

    async def main() -> None:
        client = Raw(place, {"messages": HELLO, "stream": True, "ignore_eos": True})
        await gate.steps(4)
        await client.until(lambda: b"data: " in client.body)
        async with client._changed:  # it takes nothing more
            gate.open()
            await place.house.desk.drain(0.0)
            assert [row["finish"] for row in usage_rows(place)] == ["cancelled"]
        client.leave()
        await client.task
        assert client.status == 200

    run(main)
    assert_free(place)
    place.house.ledger.check()


def test_what_could_not_be_booked_is_booked_later_and_is_no_fault_of_others(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, seen = place.house.ledger, []
    settle = ledger.settle

    def fail_for_the_first(request, used):
        seen.append(request)
        if broken and request == seen[0]:
            raise OSError("no space left")
        return settle(request, used)

    monkeypatch.setattr(ledger, "settle", fail_for_the_first)
    broken = True
    assert place.chat(HELLO).status_code == 500
    assert usage_rows(place) == []
    assert place.chat(HELLO).status_code == 200
    assert [row["request"] for row in usage_rows(place)] == [seen[-2]]
    broken = False
    assert place.chat(HELLO).status_code == 200
    rows = usage_rows(place)
    assert len(rows) == 3
    assert seen[0] in {row["request"] for row in rows}
    counted = place.get("/metrics").text
    line = 'qiusuo_tokens_total{kind="output",model="talker"} '
    [value] = [one.removeprefix(line) for one in counted.splitlines() if one.startswith(line)]
    assert float(value) == sum(row["output"] for row in rows)
