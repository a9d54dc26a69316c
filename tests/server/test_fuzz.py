"""Questions nobody would ask: schemathesis makes them up from the server's own description, and no
operation may answer one with a 500.

Most of what a generator makes up is refused before the engine hears of it. So of three questions two
are good ones, in which some of the fields are made up; and where a path names something, it
mostly names what is there.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from qiusuo.engine.limits import Limits
from qiusuo.server.api.errors import INTERNAL
from qiusuo.server.house import House
from qiusuo.server.prices import Price
from qiusuo.server.serving import Server, bound
from qiusuo.server.settings import Settings
from tests.runs.conftest import make_run
from tests.server.api.talkers import HELLO, TEXT, talker

PATIENCE = 60.0  # seconds until a test that hangs fails
MOST_TOKENS = 6  # of an answer: enough to be cut in the middle
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": TEXT[:20]},
    "/v1/responses": {"input": "Hello"},
    "/anthropic/v1/messages": {"messages": HELLO, "max_tokens": MOST_TOKENS},
    "/anthropic/v1/messages/count_tokens": {"messages": HELLO},
}


@dataclass
class Fuzzed:
    """A server with a model, a run, a conversation and a key; ``answers`` counts what it said."""

    house: House
    address: str
    session: requests.Session
    known: dict[str, str]
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Iterator[Fuzzed]:
    place = tmp_path_factory.mktemp("fuzzed")
    runs = place / "runs"
    make_run(runs / "poems", steps=20)
    house = House.open(
        Settings(
            port=0,
            database=place / "db",
            runs=runs,
            recipes=place,
            most_tokens=MOST_TOKENS,
            drain_seconds=0,
            limits=Limits(cache_bytes=8 << 20),
        )
    )
    house.registry.adopt("talker", talker())
    _, secret = house.keys.make("fuzz", "fuzz", admin=True)
    spare, _ = house.keys.make("spare", "fuzz")
    house.ledger.open_account("fuzz", open=True)
    house.prices.set("talker", Price(hit=20, miss=1000, output=4000))
    with bound(house.settings) as listening, requests.Session() as session:
        server = Server(house)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        address = f"http://localhost:{listening.getsockname()[1]}"
        session.headers["authorization"] = f"Bearer {secret}"
        try:
            talk = session.post(f"{address}/api/conversations", json={}, timeout=PATIENCE).json()
            path = f"{address}/api/conversations/{talk['id']}/messages"
            said = session.post(path, json={"role": "user"}, timeout=PATIENCE).json()
            known = {
                "name": "talker",
                "run": "poems",
                "conversation": talk["id"],
                "message": said["id"],
                "key": spare.id,
            }
            yield Fuzzed(house, address, session, known)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@st.composite
def questions(draw: Any, operation: Any, known: dict[str, str]) -> Case:
    has_input = operation.path_parameters or operation.query or operation.body
    modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if has_input else [])]
    case = draw(operation.as_strategy(generation_mode=draw(st.sampled_from(modes))))
    if case.method == "GET" or operation.path.startswith(("/api/conversations", "/api/console")):
        for name in set(case.path_parameters or {}) & set(known):
            if case.method != "DELETE" and draw(st.integers(0, 3)):
                case.path_parameters[name] = known[name]
    good = GOOD.get(operation.path)
    if good is not None and isinstance(case.body, dict):
        if draw(st.integers(0, 2)):
            names = sorted(set(case.body) - {"model", "stream"})
            kept = draw(st.lists(st.sampled_from(names), max_size=2)) if names else []
            stream = draw(st.booleans())
            case.body = good | {name: case.body[name] for name in kept} | {"stream": stream}
        case.body["model"] = "talker"
    return case


def fuzz(fuzzed: Fuzzed, operation: Any, examples: int) -> None:
    @settings(
        max_examples=examples,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=questions(operation, fuzzed.known))
    def answered(case: Case) -> None:
        told = case.as_transport_kwargs(base_url=fuzzed.address)
        with fuzzed.session.request(**told, stream=True, timeout=PATIENCE) as answer:
            endless = operation.path.endswith("/live") and answer.status_code == 200
            said = b"" if endless else answer.content
        fuzzed.answers[operation.label, answer.status_code] += 1
        assert answer.status_code < 500, said
        assert INTERNAL.encode() not in said  # nor in a stream that had begun
        if answer.status_code >= 400 and case.method != "HEAD":
            assert answer.json()["error"]["message"]

    answered()


def check(fuzzed: Fuzzed, examples: int, subtests: Any, caplog: Any) -> None:
    """Ask each operation so often; afterwards all is in order."""
    fuzzed.answers.clear()
    auth = {"authorization": fuzzed.session.headers["authorization"]}
    described = schemathesis.openapi.from_url(f"{fuzzed.address}/openapi.json", headers=auth)
    operations = [one.ok() for one in described.get_all_operations()]
    assert len(operations) >= 40
    with caplog.at_level(logging.ERROR):
        for operation in operations:
            with subtests.test(operation.label):
                fuzz(fuzzed, operation, examples * (4 if operation.path in GOOD else 1))
    for path in GOOD:
        assert fuzzed.answers[f"POST {path}", 200] >= examples, "too few reached the engine"
    assert [record.getMessage() for record in caplog.records] == []
    assert fuzzed.house.desk.jobs == {}
    fuzzed.house.ledger.check()
    with httpx.Client(base_url=fuzzed.address) as client:
        assert client.get("/health").json()["models"] == ["talker"]


def test_no_made_up_question_is_answered_with_a_500(fuzzed, subtests, caplog) -> None:
    check(fuzzed, 4, subtests, caplog)


@pytest.mark.long
def test_nor_are_many(fuzzed, subtests, caplog) -> None:
    check(fuzzed, 150, subtests, caplog)
