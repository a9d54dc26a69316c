"""Questions nobody would ask: schemathesis makes them up from the server's own description, and no
operation may answer one with a 500.

Most of what a generator makes up is refused before the engine hears of it. So of three questions
two are good ones, in which some of the fields are made up; and where a path names something, it
mostly names what is there. What breaks servers is known, too: numbers too large, half a character,
a list hundreds deep; each stands once in many places of a good question.
"""

from __future__ import annotations

import functools
import itertools
import json
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
    if good is not None and draw(st.integers(0, 2)):
        given = case.body if isinstance(case.body, dict) else {}
        names = sorted(set(given) - {"model", "stream"})
        kept = draw(st.lists(st.sampled_from(names), max_size=2)) if names else []
        stream = draw(st.booleans())
        case.body = good | {name: given[name] for name in kept} | {"stream": stream}
    if good is not None and isinstance(case.body, dict):
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
        assert fuzzed.answers[f"POST {path}", 200] >= examples // 2, "too few reached the engine"
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


# -- good questions with one bad word -------------------------------------------------------


NASTY: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63 - 1, 2**63, 10**30, 1e-320, 1.5, 1e308),
    *(float("nan"), float("inf"), "", "\0", "\ud800", "x" * 5000, "１２", "../../etc/passwd"),
    *("NaN", "9" * 40, "-1", "0.0000000001", "(", "2026-02-30", [], ["\ud800"], [[1]], {}),
    *(
        {"\ud800": 1},
        {"type": "\0"},
        {"$ref": "#"},
        functools.reduce(lambda x, _: [x], range(300), []),
    ),
]
FUNCTION = {"name": "look", "description": "d", "parameters": {"type": "object"}, "strict": False}
COMMON = {
    "model": "talker", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1,
    "logit_bias": {"5": 1}, "seed": 1, "n": 1, "max_tokens": 2, "stop": ["zz"],
    "ignore_eos": False, "stream": True, "stream_options": {"include_usage": True},
    "user": "u", "user_id": "u", "qiusuo": True,
}  # fmt: skip
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
RICH: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": COMMON
    | {
        "messages": [
            {"role": "system", "content": "s", "name": "n"},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "told"},
        ],
        "thinking": {"type": "enabled"},
        "thinking_budget": 3,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logprobs": True,
        "top_logprobs": 2,
    },
    "POST /v1/chat/completions forced": {
        "model": "talker",
        "messages": HELLO,
        "max_tokens": 2,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
    },
    "POST /v1/chat/completions schema": {
        "model": "talker",
        "messages": HELLO,
        "max_tokens": 2,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "n",
                "schema": {"type": "object", "properties": {"a": {"enum": ["b"]}}},
            },
        },
    },
    "POST /v1/chat/completions regex": {
        "model": "talker",
        "messages": [*HELLO, {"role": "assistant", "content": "G", "prefix": True}],
        "max_tokens": 2,
        "response_format": {"type": "regex", "regex": "[ab]+"},
    },
    "POST /v1/completions": COMMON
    | {"prompt": [[5, 6], [7]], "echo": True, "logprobs": 2},
    "POST /v1/completions best": {
        "model": "talker",
        "prompt": "a",
        "best_of": 2,
        "n": 1,
        "logprobs": 2,
        "max_tokens": 2,
    },
    "POST /v1/completions suffix": COMMON | {"prompt": "a", "suffix": "b"},
    "POST /v1/responses": {
        "model": "talker",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "told"},
        ],
        "instructions": "i",
        "max_output_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "tools": [{"type": "function"} | FUNCTION],
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
        "metadata": {"a": "b"},
        "stream": True,
        "user": "u",
        "store": False,
    },
    "POST /anthropic/v1/messages": {
        "model": "talker",
        "max_tokens": 2,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": "Hello"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "tool_use", "id": "1", "name": "look", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": "c"}],
            },
        ],
        "tools": [{"name": "look", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop_sequences": ["zz"],
        "metadata": {"user_id": "u"},
        "stream": True,
    },
    "POST /api/conversations": {"title": "t", "model": "m", "system": "s", "settings": {"a": 1}},
    "PATCH /api/conversations/{conversation}": {"title": "t", "settings": {"a": 1}, "leaf": None},
    "POST /api/conversations/{conversation}/messages": {
        "parent": None, "role": "user", "content": "c", "reasoning_content": "r",
        "reasoning_seconds": 1.0, "model": "m", "usage": {"a": 1}, "cost": "1", "speed": {},
        "finish_reason": "stop", "attachments": [{"name": "n", "text": "t"}],
        "tool_calls": [{"id": "1", "name": "n", "arguments": "{}"}], "tool_call_id": "1",
    },
    "POST /api/console/keys": {
        "name": "n", "account": "a", "models": ["talker"], "rpm": 1, "tpm": 1, "concurrency": 1,
        "budget": "1", "admin": False,
    },
    "PATCH /api/console/keys/{key}": {
        "name": "n", "models": ["talker"], "rpm": 1, "tpm": 1, "concurrency": 1, "budget": "1",
    },
    "POST /api/console/accounts": {
        "account": "firm", "amount": "1", "granted": True, "note": "n", "token": "t", "open": True,
    },
    "PUT /api/console/prices": {
        "prices": [
            {
                "model": "other", "hit": "1", "miss": "1", "output": "1", "from": 1.0,
                "windows": [
                    {
                        "start": "09:00", "end": "10:00", "factor": "2", "timezone": "UTC",
                        "weekdays": ["mon"], "excluded": ["2026-01-01"],
                    }
                ],
            }
        ],
        "currency": "CNY",
    },
    "POST /api/models/load": {"source": "nothing", "name": "n"},
    "POST /api/runs": {"recipe": "nothing", "set": {"a": 1}, "name": "n"},
    "GET /api/conversations": {"q": "求索", "limit": 3, "before": 1.0},
    "GET /api/runs/{run}/records": {"kind": "step", "every": 1, "after": 0},
    "GET /api/console/usage": {
        "by": "day", "from": "2026-01-01", "to": "2026-12-31", "timezone": "UTC", "format": "csv",
    },
}  # fmt: skip


def spoilt(value: Any, turn: Iterator[int]) -> Iterator[Any]:
    """Copies in each of which one thing, however deep, is nasty: of the nasty things every fifth,
    another fifth for each place."""
    yield from NASTY[next(turn) % 5 :: 5]
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (value | {key: other} for other in spoilt(inner, turn))
            yield {name: one for name, one in value.items() if name != key}
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from (
                [*value[:place], other, *value[place + 1 :]] for other in spoilt(inner, turn)
            )


def test_half_a_character_is_told_back(fuzzed) -> None:
    """JSON can hold one, UTF-8 cannot, and the refusal wants to name it."""
    messages = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "\ud800", "content": "told"},
    ]
    answer = fuzzed.session.post(
        f"{fuzzed.address}/v1/chat/completions",
        json={"model": "talker", "messages": messages},
        timeout=PATIENCE,
    )
    assert answer.status_code == 400
    assert "ud800" in answer.json()["error"]["message"]


@pytest.mark.long
@pytest.mark.parametrize("label", RICH)
def test_one_bad_word_in_a_good_question(fuzzed, label, caplog) -> None:
    method, path = label.split()[:2]
    path = path.format(**fuzzed.known)
    headers = {"content-type": "application/json"}
    failures, statuses = [], Counter[int]()
    with caplog.at_level(logging.ERROR):
        for body in (RICH[label], *spoilt(RICH[label], itertools.count())):
            told: dict[str, Any] = {"data": json.dumps(body), "headers": headers}
            if method == "GET":
                if not isinstance(body, dict):
                    continue
                told = {
                    "params": {
                        key: str(one).encode("utf-8", "replace") for key, one in body.items()
                    }
                }
            address = f"{fuzzed.address}{path}"
            answer = fuzzed.session.request(method, address, timeout=PATIENCE, **told)
            statuses[answer.status_code] += 1
            if answer.status_code >= 500 or INTERNAL.encode() in answer.content:
                failures.append((answer.status_code, json.dumps(body)[:2000]))
    assert failures == []
    assert [record.getMessage() for record in caplog.records] == []
    refused = path in ("/api/models/load", "/api/runs")  # there is no such model, no such recipe
    assert statuses[200] + statuses[201] > 1 or refused
    fuzzed.house.ledger.check()
