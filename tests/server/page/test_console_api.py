"""Keys, accounts, prices, usage and engines over HTTP, with the real ledger and a real engine."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qiusuo
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.limits import Limits
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.rollouts import RolloutLog
from qiusuo.server.ledger import Used
from qiusuo.server.page.models import ANY_CHAT, examples
from qiusuo.server.prices import Price
from qiusuo.server.registry import Registry
from tests.model.shapes import tiny_model
from tests.server.page.conftest import Served
from tests.server.page.test_conversations import ok, refused

TEXT = "路漫漫其修远兮，吾将上下而求索。"
ADMIN_ROUTES = [
    ("GET", "keys"),
    ("POST", "keys"),
    ("PATCH", "keys/x"),
    ("DELETE", "keys/x"),
    ("GET", "accounts"),
    ("POST", "accounts"),
    ("PUT", "prices"),
    ("GET", "engine"),
    ("GET", "engine/live"),
]


@pytest.fixture
def lm() -> Iterator[qiusuo.LanguageModel]:
    tokenizer = Tokenizer.train_characters([TEXT])
    sizes = dict(vocab_size=tokenizer.vocab_size, max_position_embeddings=128)
    model = tiny_model(0, eos_token_id=None, **sizes)
    with torch.inference_mode():
        yield qiusuo.LanguageModel(model, tokenizer, Limits(cache_bytes=1 << 20))


# -- who asks -----------------------------------------------------------------------------------


def test_me_without_and_with_keys(page: Served) -> None:
    me = ok(page.client.get("/api/me"))
    assert me == {
        "name": "local",
        "account": "local",
        "admin": True,
        "open": True,
        "currency": "CNY",
        "balance": None,
        "version": qiusuo.__version__,
    }
    boss = page.key("boss", admin=True)
    guest = page.key("guest", "team")
    refused(page.client.get("/api/me"), 401)
    refused(page.with_secret("sk-wrong").get("/api/me"), 401)
    ok(boss.post("/api/console/accounts", json={"account": "team", "amount": "0.02"}))
    me = ok(guest.get("/api/me"))
    assert (me["name"], me["account"], me["balance"]) == ("guest", "team", "0.02")
    assert (me["admin"], me["open"]) == (False, False)


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_what_is_for_administrators(page: Served, method: str, path: str) -> None:
    guest = page.key("guest")
    refused(guest.request(method, f"/api/console/{path}", json={"name": "x"}), 403)
    refused(page.client.request(method, f"/api/console/{path}", json={"name": "x"}), 401)


# -- keys ---------------------------------------------------------------------------------------


def test_a_key_is_made_used_changed_and_revoked(page: Served) -> None:
    assert "administrator" in refused(
        page.client.post("/api/console/keys", json={"name": "first"}), 400
    )
    made = ok(page.client.post("/api/console/keys", json={"name": "boss", "admin": True}))
    boss = page.with_secret(made["secret"])
    body = {"name": "bob", "account": "team", "models": ["m"], "rpm": 60, "budget": "1.5"}
    bob = ok(boss.post("/api/console/keys", json=body))
    assert bob["prefix"] == f"sk-...{bob['secret'][-4:]}"
    assert (bob["budget"], bob["spent"], bob["tpm"]) == ("1.50", "0.00", None)
    assert ok(page.with_secret(bob["secret"]).get("/api/me"))["account"] == "team"
    listed = boss.get("/api/console/keys")
    assert bob["secret"] not in listed.text
    assert [key["name"] for key in ok(listed)] == ["boss", "bob"]
    path = f"/api/console/keys/{bob['id']}"
    changed = ok(boss.patch(path, json={"models": None, "rpm": None, "budget": "0.000000001"}))
    assert (changed["models"], changed["rpm"]) == (None, None)
    assert (changed["name"], changed["budget"]) == ("bob", "0.000000001")
    for wrong, status in [
        ({"budget": "-1"}, 400),
        ({"budget": "1e99"}, 400),
        ({"budget": "0.0000000001"}, 400),
        ({"budget": 1.5}, 422),
        ({"rpm": 0}, 422),
        ({"name": ""}, 400),
        ({"account": "other"}, 422),
        ({"secret": "x"}, 422),
    ]:
        refused(boss.patch(path, json=wrong), status)
    assert boss.delete(path).status_code == 204
    refused(page.with_secret(bob["secret"]).get("/api/me"), 401)
    own = f"/api/console/keys/{made['id']}"
    assert "last administrator" in refused(boss.delete(own), 409)
    refused(boss.patch(own, json={"admin": False}), 409)
    refused(boss.patch("/api/console/keys/key-none", json={"rpm": 1}), 404)
    refused(boss.delete("/api/console/keys/key-none"), 404)


# -- money --------------------------------------------------------------------------------------


def test_accounts_are_topped_up_once(page: Served) -> None:
    def move(**body: Any) -> Any:
        return ok(page.client.post("/api/console/accounts", json={"account": "team"} | body))

    first = move(amount="10.000000001", token="bill 7", note="invoice 7")
    assert (first["topped_up"], first["moved"]) == ("10.000000001", True)
    again = move(amount="10.000000001", token="bill 7")
    assert (again["topped_up"], again["moved"]) == ("10.000000001", False)
    assert move(amount="2", granted=True)["total"] == "12.000000001"
    assert move(amount="-10")["topped_up"] == "0.000000001"
    refused(
        page.client.post("/api/console/accounts", json={"account": "team", "amount": "-1"}), 400
    )
    refused(page.client.post("/api/console/accounts", json={"account": "team"}), 400)
    assert move(open=True)["open"] is True
    names = {one["name"]: one for one in ok(page.client.get("/api/console/accounts"))}
    assert set(names) == {"local", "team"}
    assert names["team"]["total"] == "2.000000001"
    page.house.ledger.check()


def test_prices_are_exact_and_only_added_to(page: Served) -> None:
    window = {"start": "09:00", "end": "12:00", "excluded": ["2026-10-01"]}
    price = {"model": "m", "hit": "0.02", "miss": "1", "output": "2.5", "windows": [window]}
    later = {"model": "*", "hit": "0", "miss": "0", "output": "0", "from": 4102444800}
    body = {"currency": "CNY", "prices": [price, later]}
    told = ok(page.client.put("/api/console/prices", json=body))
    assert told == ok(page.client.get("/api/console/prices"))
    [listed] = told["prices"]
    shown = [listed[kind] for kind in ("hit", "miss", "output")]
    assert shown == ["0.02", "1.00", "2.50"]
    assert listed["windows"][0]["weekdays"] == ["mon", "tue", "wed", "thu", "fri"]
    assert listed["windows"][0]["excluded"] == ["2026-10-01"]
    assert [one["from"] for one in told["follow"]] == [4102444800]
    put_back = {key: value for key, value in listed.items() if key != "from"}
    ok(page.client.put("/api/console/prices", json={"prices": [put_back]}))
    assert len(page.house.prices.history("m")) == 1  # it holds already
    for wrong in (
        price | {"hit": "0.0001"},  # of a nano-unit
        price | {"miss": "-1"},
        price | {"windows": [window | {"end": "25:00"}]},
        price | {"windows": [window | {"factor": "1/0"}]},
        price | {"windows": [window | {"timezone": "Moon"}]},
    ):
        both = [price | {"hit": "5"}, wrong]
        refused(page.client.put("/api/console/prices", json={"prices": both}), 400)
    assert len(page.house.prices.history("m")) == 1  # all or none
    refused(page.client.put("/api/console/prices", json={"prices": [{"model": "m"}]}), 422)


def test_usage_as_json_and_csv(page: Served) -> None:
    keys, ledger = page.house.keys, page.house.ledger
    boss = page.key("boss", admin=True)
    bob, secret = keys.make("=bob()", "team")
    ledger.top_up("team", 10**12, token="t")
    price = Price(hit=20, miss=1000, output=2000)
    for number, key in enumerate([bob, bob, keys.list()[0]]):
        request = f"request {number}"
        account = key.account
        ledger.open_account(account, open=True)
        ledger.reserve(request, key, account, "m", 10**7, price)
        ledger.settle(request, Used("m", hit=100, miss=10, output=5, reasoning=2))
    cost = 100 * 20 + 10 * 1000 + 5 * 2000
    told = ok(boss.get("/api/console/usage", params={"by": "model"}))
    assert told["currency"] == "CNY"
    [row] = told["rows"]
    assert (row["group"], row["requests"], row["hit"], row["reasoning"]) == ("m", 3, 300, 6)
    assert row["amount"] == told["total"]["amount"] == f"0.0000{3 * cost // 1000}"
    own = ok(page.with_secret(secret).get("/api/console/usage", params={"by": "key"}))
    assert [row["group"] for row in own["rows"]] == [bob.id]  # a guest sees its own
    assert own["total"]["requests"] == 2
    params = {"by": "key", "format": "csv"}
    sheet = boss.get("/api/console/usage", params=params)
    assert sheet.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in sheet.headers["content-disposition"]
    lines = list(csv.reader(io.StringIO(sheet.text)))
    assert lines[0][:2] == ["key", "name"]
    assert {line[1] for line in lines[1:]} == {"boss", "'=bob()"}  # no formula
    days = ok(boss.get("/api/console/usage", params={"from": "2000-01-01", "to": "2000-12-31"}))
    assert days["rows"] == []
    refused(boss.get("/api/console/usage", params={"by": "account"}), 422)
    refused(boss.get("/api/console/usage", params={"from": "x"}), 422)
    refused(boss.get("/api/console/usage", params={"timezone": "Moon"}), 400)


# -- models and engines -------------------------------------------------------------------------


def test_a_run_is_asked_what_it_was_taught_and_no_small_talk(tmp_path: Path) -> None:
    def shown(name: str, **recipe: Any) -> list[str]:
        source = str(tmp_path / name / "model")
        RunFolder.create(
            tmp_path / name, {"name": name, "stages": [{"kind": "rl"}], **recipe}
        ).close()
        (tmp_path / name / "model").mkdir()
        with RolloutLog(tmp_path / name / "rollouts.jsonl") as log:
            for step, prompt, right in solved:
                told = {"task": "parity", "prompt": prompt, "response": "0", "right": right}
                log.append({"step": step, "stage": "rl", "reward": float(right), **told})
        return examples(SimpleNamespace(name=name, kind="chat", source=source))

    solved = [(1, "00=", True), (2, "0101=", True), (2, "10=", False), (2, "0101=", True)]
    solved.append((2, "11=", True))
    assert shown("solver") == ["0101=", "11="]
    solved = []
    assert shown("silent") == []
    assert shown("tuned", base="smollm2") == list(ANY_CHAT)  # which conversed before


def test_models_with_their_prices_and_examples(
    page: Served, lm: qiusuo.LanguageModel, tmp_path: Path
) -> None:
    stage = {"kind": "pretrain", "samples": {"prompts": ["路漫漫"]}}
    recipe = {"name": "poems", "stages": [stage]}
    RunFolder.create(page.house.settings.runs / "poems", recipe).close()
    registry: Registry = page.house.registry
    registry.adopt("poems", lm, str(page.house.settings.runs / "poems" / "model"))
    ok(
        page.client.put(
            "/api/console/prices",
            json={"prices": [{"model": "poems", "hit": "0.02", "miss": "1", "output": "2"}]},
        )
    )
    [model] = ok(page.client.get("/api/models"))
    assert (model["id"], model["kind"], model["examples"]) == ("poems", "text", ["路漫漫"])
    assert model["aliases"] == ["deepseek-chat", "deepseek-reasoner"]
    assert model["price"] == {"hit": "0.02", "miss": "1.00", "output": "2.00", "currency": "CNY"}
    assert model["parameters"] == sum(one.numel() for one in lm.model.parameters())
    assert model["context"] == lm.engine.capacity
    assert ok(page.client.get("/api/runs/poems"))["served_as"] == "poems"
    page.key("boss", admin=True)
    assert ok(page.key("guest", models=("other",)).get("/api/models")) == []


def test_engines_tell_what_they_did(page: Served, lm: qiusuo.LanguageModel) -> None:
    registry: Registry = page.house.registry
    served = registry.adopt("tiny", lm)
    before = ok(page.client.get("/api/console/engine"))
    assert before[0]["tokens_per_second"] is None  # a speed is between two looks

    async def ask() -> int:
        [answer] = await served.engine.complete(TEXT, max_tokens=9, ignore_eos=True)
        return len((await answer.message()).token_ids)

    assert page.during(ask()) == 9
    seen = []
    with page.client.stream("GET", "/api/console/engine/live") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                seen += json.loads(line.removeprefix("data: "))
            if len(seen) == 2:
                break
    assert [one["id"] for one in seen] == ["tiny", "tiny"]
    assert seen[0]["written_tokens"] == 9
    assert (seen[0]["running"], seen[0]["waiting"], seen[0]["state"]) == (0, 0, "serving")
    assert seen[0]["prompt_tokens"] == len(TEXT) + len(lm.needed_tokenizer().text_start)
    assert isinstance(seen[1]["tokens_per_second"], float)
    served.engine.stop()
    [failed] = ok(page.client.get("/api/console/engine"))
    assert (failed["state"], "does not run" in failed["error"]) == ("failed", True)
    served.engine.start()


def test_only_what_was_pulled_or_trained_is_loaded(
    page: Served, lm: qiusuo.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QIUSUO_HOME", str(tmp_path / "home"))
    lm.save(tmp_path / "elsewhere")
    for source in (str(tmp_path / "elsewhere"), "../elsewhere", "~/x", "smollm2", "tang-poems"):
        refused(page.client.post("/api/models/load", json={"source": source}), 400)
    lm.save(tmp_path / "home" / "models" / "smollm2")
    body = {"source": "smollm2", "name": "small"}
    answer = page.client.post("/api/models/load", json=body)
    assert (answer.status_code, answer.json()) == (202, {"id": "small"})
    while not (models := ok(page.client.get("/api/models"))):
        [engine] = ok(page.client.get("/api/console/engine"))
        assert engine["error"] is None
    assert models[0]["kind"] == "chat"
    assert "What is gravity?" in models[0]["examples"]
    refused(page.client.post("/api/models/load", json=body), 400)  # the name is taken
    refused(page.client.delete("/api/models/deepseek-chat"), 404)  # an alias is no model
    assert page.client.delete("/api/models/small").status_code == 204
    assert ok(page.client.get("/api/models")) == []
