"""Runs over HTTP: listed, read, watched while they are written, started, stopped and resumed."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from qiusuo.runs.folder import RunFolder
from qiusuo.runs.lock import writer_of
from qiusuo.runs.log import RunLog
from qiusuo.server.page import trainings
from qiusuo.server.page.growing import GrowingFile
from qiusuo.server.page.run_log import MOST_LOADS, MOST_POINTS, Glance, LogIndex
from qiusuo.server.settings import Settings
from tests.runs.conftest import make_rl_run, make_run
from tests.server.page.conftest import PATIENCE, Served
from tests.server.page.test_conversations import ok, refused
from tests.training import lives

LONG = 120.0  # seconds for a training to begin or to end, on a busy machine

RECIPE = {
    "name": "poems",
    "stages": [{"kind": "pretrain", "steps": 50, "samples": {"prompts": ["《", "春"]}}],
}


def until(look: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What ``look`` says as soon as that is something."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return seen


def step(number: int, **more: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": number, "stage": "pretrain", "loss": 5.0 - number / 100}
    return record | {"seconds": number * 0.5} | more


@contextmanager
def listening(page: Served, run: str, **after: int) -> Iterator[queue.Queue[tuple[str, Any, str]]]:
    """A live stream, read in a thread: (event, data, id)."""
    heard: queue.Queue[tuple[str, Any, str]] = queue.Queue()
    with page.client.stream("GET", f"/api/runs/{run}/live", params=after) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"

        def read() -> None:
            event: dict[str, str] = {}
            try:
                for line in answer.iter_lines():
                    if line and not line.startswith(":"):
                        name, _, value = line.partition(": ")
                        event[name] = value
                    elif event:
                        data = json.loads(event["data"])
                        heard.put((event["event"], data, event.get("id", "")))
                        event = {}
            except httpx.HTTPError:
                pass
            heard.put(("end", None, ""))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield heard
        finally:  # as a page that is closed
            wire = answer.extensions["network_stream"].get_extra_info("socket")
            with suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)
    reader.join(PATIENCE)
    assert not reader.is_alive()


def hear(heard: queue.Queue[tuple[str, Any, str]], kind: str) -> tuple[Any, str]:
    """The next event of this kind."""
    while True:
        event, data, place = heard.get(timeout=LONG)
        assert event == kind or event in {"state", "record"}, event
        if event == kind:
            return data, place


# -- the list -----------------------------------------------------------------------------------


def test_runs_are_listed_with_what_their_folders_say(page: Served, settings: Settings) -> None:
    assert ok(page.client.get("/api/runs")) == []
    make_run(settings.runs / "done", steps=60)
    (settings.runs / "done" / "model").mkdir()
    (settings.runs / "done" / "model" / "config.json").write_text("{}")
    (settings.runs / "no-run").mkdir()
    (settings.runs / ".hidden").mkdir()
    (settings.runs / ".hidden" / "recipe.toml").write_text('name = "x"')
    with RunFolder.create(settings.runs / "begun", RECIPE) as folder:
        with folder.open_log() as log:
            for number in range(1, 21):
                log.append(step(number))
            log.append({"kind": "validation", "step": 10, "loss": 4.0})
            log.append({"kind": "validation", "step": 15, "loss": float("nan")})
            log.append({"kind": "validation", "step": 20, "loss": 4.5})
        folder.set_status("running", stage="pretrain", step=18, steps=50)
        begun, done = ok(page.client.get("/api/runs"))
        assert begun["id"] == begun["name"] == "begun"
        assert (begun["recipe"], begun["state"], begun["stage"]) == ("poems", "running", "pretrain")
        assert (begun["step"], begun["steps"], begun["progress"]) == (20, 50, 0.4)
        assert begun["loss"] == pytest.approx(4.8)
        assert begun["best"] == 4.0
        assert 14 < begun["eta_seconds"] <= 15.0  # 30 steps of half a second
        assert (begun["model"], begun["report"], begun["served_as"]) == (False, False, None)
        assert (done["state"], done["progress"], done["model"]) == ("finished", 1.0, True)
        assert done["name"].startswith("Poems 27M")
        assert abs(begun["started"] - time.time()) < 100
    [killed] = [run for run in ok(page.client.get("/api/runs")) if run["id"] == "begun"]
    assert killed["state"] == "killed"  # it says running, and no process is
    assert killed["eta_seconds"] is None
    details = ok(page.client.get("/api/runs/done"))
    assert details["summary"]["Parameters"] == 27_262_976
    assert [stage["kind"] for stage in details["stages"]] == ["pretrain", "sft"]
    assert details["recipe"]["model"]["hidden_size"] == 384
    assert details["environment"]["qiusuo"] == "0.1.0"


def test_what_a_run_says_of_its_state(page: Served, settings: Settings) -> None:
    def state() -> str:
        return ok(page.client.get("/api/runs/one"))["state"]

    path = settings.runs / "one"
    with RunFolder.create(path, RECIPE) as folder:
        assert state() == "starting"
        folder.set_status("failed", stage="pretrain", step=3, steps=50, error="the disk is full")
        assert state() == "failed"  # though its process still draws the report
        assert ok(page.client.get("/api/runs/one"))["error"] == "the disk is full"
    folder = RunFolder.open(path)
    os.utime(path / ".lock", (time.time() + 5, time.time() + 5))  # resumed some seconds later
    assert state() == "starting"
    folder.close()
    assert state() == "failed"
    (path / "status.json").unlink()
    assert state() == "killed"


def test_a_damaged_run_hides_no_other(page: Served, settings: Settings) -> None:
    make_run(settings.runs / "good", steps=20)
    bad = make_run(settings.runs / "bad", steps=20)
    (bad / "recipe.toml").write_text("= no toml")
    (bad / "status.json").write_text("[]")
    (bad / "environment.json").write_text("{")
    (bad / "summary.json").write_text('{"x": NaN}')
    (bad / "log.jsonl").write_bytes(
        b'no json\n{"kind": "step", "step": 7}\n[]\n{"step": 1}\n\xff\n'
    )
    assert {run["id"] for run in ok(page.client.get("/api/runs"))} == {"good", "bad"}
    assert ok(page.client.get("/api/runs/bad"))["step"] == 7
    assert ok(page.client.get("/api/runs/bad/records"))["records"] == [{"kind": "step", "step": 7}]


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", ".", "a%2Fb", "%2Fetc", ".hidden", "%00", "no", "n" * 300]
)
def test_a_name_does_not_leave_the_folder(page: Served, settings: Settings, name: str) -> None:
    make_run(settings.runs / ".hidden", steps=5)
    make_run(settings.runs.parent / "outside", steps=5)
    for path in ("/records", "/rollouts", "/live", "/report", "/stop", "/resume", "/serve"):
        method = "POST" if path in {"/stop", "/resume", "/serve"} else "GET"
        asked = http.client.HTTPConnection(page.client.base_url.netloc.decode())  # takes any path
        asked.request(method, f"/api/runs/{name}{path}")
        assert asked.getresponse().status == 404, path
        asked.close()


def test_a_report_can_do_nothing(page: Served, settings: Settings) -> None:
    run = make_run(settings.runs / "done", steps=5)
    assert "drawn when" in refused(page.client.get("/api/runs/done/report"), 404)
    (run / "report.html").write_text("<h1>求索</h1>", encoding="utf-8")
    answer = page.client.get("/api/runs/done/report")
    assert answer.text == "<h1>求索</h1>"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox;")
    assert "script" not in policy
    assert "default-src 'none'" in policy


# -- records ------------------------------------------------------------------------------------


def test_records_are_thinned_and_lose_no_extreme(page: Served, settings: Settings) -> None:
    steps, spikes = 9000, {1234: 99.0, 7000: -7.0, 4321: float("nan")}
    with RunFolder.create(settings.runs / "long", RECIPE) as folder, folder.open_log() as log:
        log.append({"kind": "event", "text": "it begins"})
        for number in range(1, steps + 1):
            loss = spikes.get(number, 5 + (number % 17) / 10)
            more = {"grad_norm": 50.0 if number == 6543 else 1.0, "lr": 1e-3}
            if number % 10 == 0:
                more["expert_load"] = [[1.0] * 8] * 4
            log.append(step(number, **more) | {"loss": loss})
            if number % 3000 == 0:
                log.append({"kind": "validation", "step": number, "loss": 4.0})
    told = ok(page.client.get("/api/runs/long/records", params={"kind": "step"}))
    numbers = [record["step"] for record in told["records"]]
    assert numbers == sorted(set(numbers))
    assert MOST_POINTS <= len(numbers) <= MOST_POINTS + MOST_LOADS + 100
    assert {1, steps, 1234, 7000, 4321, 6543} <= set(numbers)
    assert next(r["loss"] for r in told["records"] if r["step"] == 4321) == "NaN"
    loads = [r["step"] for r in told["records"] if "expert_load" in r]
    assert len(loads) == MOST_LOADS
    assert (loads[0], loads[-1]) == (10, steps)
    whole = ok(page.client.get("/api/runs/long/records"))
    kinds = [record["kind"] for record in whole["records"]]
    assert kinds[0] == "event"
    assert kinds.count("validation") == 3
    assert whole["next"] == (settings.runs / "long" / "log.jsonl").stat().st_size
    tenth = ok(page.client.get("/api/runs/long/records", params={"kind": "step", "every": 1000}))
    curve = [r["step"] for r in tenth["records"] if "expert_load" not in r]
    assert curve == [*range(1, steps, 1000)]
    with RunLog(settings.runs / "long" / "log.jsonl") as log:
        log.append(step(steps + 1))
    more = ok(page.client.get("/api/runs/long/records", params={"after": whole["next"]}))
    assert [record["step"] for record in more["records"]] == [steps + 1]
    nothing = ok(page.client.get("/api/runs/long/records", params={"after": more["next"]}))
    assert nothing == {"records": [], "next": more["next"]}
    for params in ({"after": -1}, {"every": 0}, {"kind": "../x"}):
        refused(page.client.get("/api/runs/long/records", params=params), 422)


def test_samples_come_from_their_own_file(page: Served, settings: Settings) -> None:
    make_run(settings.runs / "done", steps=60)
    told = ok(page.client.get("/api/runs/done/records", params={"kind": "sample"}))
    assert told["next"] == (settings.runs / "done" / "samples.jsonl").stat().st_size
    assert len(told["records"]) == 12
    assert told["records"][-1]["continuation"].startswith(" I will search")


def test_rollouts_are_paged(page: Served, settings: Settings) -> None:
    run = make_rl_run(settings.runs / "rl", kept=10)
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]

    def asked(**params: Any) -> dict[str, Any]:
        return ok(page.client.get("/api/runs/rl/rollouts", params=params))

    latest = asked()
    assert latest["steps"] == [205, 400]
    assert [one["step"] for one in latest["rollouts"]] == [400] * 10
    assert latest["next"] is None
    seen, told = [], asked(first=0, worth="wrong", task="chains/5", most=7)
    while True:
        seen += told["rollouts"]
        if told["next"] is None:
            break
        told = asked(worth="wrong", task="chains/5", most=7, start=told["next"])
    wanted = [one for one in lines if not one["reward"] and one["difficulty"] == 5]
    assert [one["response"] for one in wanted] == [
        f"<think>{one['thought']}</think>{one['text']}"
        if one["answer"]
        else f"<think>{one['thought']}"
        for one in seen
    ]
    assert not any(one["right"] for one in seen)
    assert {one["step"] for one in asked(first=206, last=215)["rollouts"]} == {210, 215}
    make_run(settings.runs / "none", steps=5)
    nothing = {"rollouts": [], "next": None, "steps": None}
    assert ok(page.client.get("/api/runs/none/rollouts")) == nothing
    for params in ({"worth": "odd"}, {"most": 0}, {"most": 201}, {"start": -1}):
        refused(page.client.get("/api/runs/rl/rollouts", params=params), 422)
    (run / "rollouts.jsonl").write_text("no json\n")
    assert "at byte 0" in refused(page.client.get("/api/runs/rl/rollouts"), 409)


def test_a_stage_of_reinforcement_is_listed_by_its_reward(page: Served, settings: Settings) -> None:
    make_rl_run(settings.runs / "rl")
    [told] = ok(page.client.get("/api/runs"))
    assert told["loss"] is None
    assert 0.8 < told["reward"] < 1
    with RunLog(settings.runs / "rl" / "log.jsonl") as log:
        log.append(step(401) | {"stage": "sft"})  # what comes after has a loss again
    [told] = ok(page.client.get("/api/runs"))
    assert told["reward"] is None
    assert told["loss"] == pytest.approx(0.99)
    records = ok(page.client.get("/api/runs/rl/records", params={"kind": "rollout"}))["records"]
    assert [record["step"] for record in records] == list(range(201, 401))
    assert records[0]["by_task"].keys() == {"chains/4", "chains/5", "chains/10", "parity/24"}


def test_no_byte_is_read_twice(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    glance, index = Glance(path), LogIndex(path)
    glance.refresh()
    assert index.records() == ([], 0)  # there is no file yet
    with RunLog(path) as log:
        log.append(step(1))
        log.append(step(2))
        glance.refresh()
        assert len(index.records()[0]) == 2
        with path.open("r+b") as file:  # were it read again, it would be missed
            file.write(b"x" * (path.stat().st_size - 1))
        log.append(step(3))
        glance.refresh()
        assert (glance.first["step"], glance.last["step"]) == (1, 3)
        records, end = index.records()
        assert end == path.stat().st_size
        assert [r["step"] for r in records] == [3]  # what stands in the first two places is none
        path.unlink()
        path.write_bytes(b'{"kind": "step", "step": 9}\n')  # another file of the same name
        glance.refresh()
        assert glance.first["step"] == glance.last["step"] == 9
        assert [r["step"] for r in index.records()[0]] == [9]


def test_a_line_longer_than_a_look(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"a" * 1000 + b"\nb\nc")
    file = GrowingFile(path)
    assert file.chunk(most=10) == (0, b"a" * 1000 + b"\nb\n") or file.end == 1001
    rest = b"".join(chunk[1] for chunk in iter(lambda: file.chunk(most=10), None))
    assert rest in {b"", b"b\n"}
    assert file.end == 1003  # "c" is no whole line yet


# -- live ---------------------------------------------------------------------------------------


def test_a_run_is_watched_while_it_is_written(page: Served, settings: Settings) -> None:
    with RunFolder.create(settings.runs / "live", RECIPE) as folder:
        log, samples = folder.open_log(), folder.open_samples()
        log.append(step(1))
        log.append(step(2))
        first = ok(page.client.get("/api/runs/live/records", params={"every": 1}))
        log.append(step(3))
        with listening(page, "live", after=first["next"]) as heard:
            assert hear(heard, "record")[0] == step(3)
            assert hear(heard, "state")[0]["step"] == 3
            with folder.log_path.open("ab", buffering=0) as file:
                file.write(b'{"kind": "step", "st')
                sample = {"kind": "sample", "step": 3, "prompt": "《", "continuation": "春\n夜》"}
                samples.append(sample)
                assert hear(heard, "record")[0] == sample  # and nothing of the half line
                file.write(b'ep": 4}\n')
            record, place = hear(heard, "record")
            assert record == {"kind": "step", "step": 4}
            folder.set_status("interrupted", stage="pretrain", step=4, steps=50)
            state = hear(heard, "state")[0]
            while state["state"] != "interrupted":
                state = hear(heard, "state")[0]
        log.append(step(5))
        byte, samples_byte = map(int, place.split("-"))
        assert samples_byte == folder.samples_path.stat().st_size
        # A stream that broke goes on where it was, and ends in nothing lost or doubled.
        with listening(page, "live", after=byte, samples_after=0) as heard:
            both = [hear(heard, "record")[0] for _ in range(2)]
            assert both == [step(5), sample]
            assert log.truncate_after(2) == 3  # resumed from an earlier checkpoint
            hear(heard, "reset")
            assert [hear(heard, "record")[0]["step"] for _ in range(2)] == [1, 2]
        log.close()
        samples.close()


def test_watching_costs_one_task_and_ends_with_the_last_reader(
    page: Served, settings: Settings
) -> None:
    make_run(settings.runs / "done", steps=5)

    def watched() -> Any:
        return page.app.state.page.watches.watched["done"]

    with listening(page, "done") as one, listening(page, "done") as two:
        assert hear(one, "state")[0] == hear(two, "state")[0]
        first = watched()
        assert len(first.readers) == 2
        assert not first.task.done()
    until(first.task.done)
    assert not first.readers
    with listening(page, "done", after=0) as again:
        assert hear(again, "record")[0]["text"] == "training begins"
        assert watched() is not first
        page.house.desk.closing = True  # the server is asked to end
        while again.get(timeout=PATIENCE)[0] != "end":
            pass


# -- starting and stopping ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"recipe": "../seconds"}, 404),
        ({"recipe": "/etc/passwd"}, 404),
        ({"recipe": "no such"}, 404),
        ({"recipe": "seconds", "name": "../x"}, 400),
        ({"recipe": "seconds", "name": "/tmp/x"}, 400),
        ({"recipe": "seconds", "name": ".x"}, 400),
        ({"recipe": "seconds", "name": "a\u0000b"}, 400),
        ({"recipe": "seconds", "name": "taken"}, 409),
        ({"recipe": "seconds", "set": {"tokenizer.path": "/etc"}}, 422),
        ({"recipe": "seconds", "set": {"stages.pretrain.data.corpora.0.source": "/x"}}, 422),
        ({"recipe": "seconds", "set": {"a b": 1}}, 422),
        ({"recipe": "seconds", "set": {"--fresh": 1}}, 422),
        ({"recipe": "seconds", "set": {"seed=1 #": 1}}, 422),
        ({"recipe": "seconds", "set": {"model": {"hidden_size": 8}}}, 422),
        ({"recipe": "seconds", "run": "/tmp"}, 422),
    ],
)
def test_nothing_is_started_that_reaches_elsewhere(
    page: Served,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    body: dict[str, Any],
    status: int,
) -> None:
    def never(*words: Any) -> None:
        raise AssertionError(words)

    monkeypatch.setattr(trainings, "_process", never)
    (settings.runs / "taken").mkdir(parents=True)
    refused(page.client.post("/api/runs", json=body), status)


def test_only_an_administrator_starts_and_stops(page: Served, settings: Settings) -> None:
    make_run(settings.runs / "done", steps=5)
    guest = page.key("guest")
    assert len(ok(guest.get("/api/runs"))) == 1
    for path in ("/api/runs", "/api/runs/done/stop", "/api/runs/done/resume"):
        body = {"recipe": "seconds"}
        refused(guest.post(path, json=body), 403)
        refused(page.client.post(path, json=body), 401)
    refused(guest.post("/api/runs/done/serve"), 403)


def test_a_setting_is_written_as_the_recipe_reads_it() -> None:
    import tomllib

    values = [True, 3, 0.5, 'a "quoted"\nline', ["《春夜》", "x=1"], "1"]
    for value in values:
        key, _, text = trainings._setting("stages.pretrain.x", value).partition("=")
        assert key == "stages.pretrain.x"
        assert tomllib.loads(f"v = {text}")["v"] == value


def test_recipes(page: Served, settings: Settings) -> None:
    settings.recipes.mkdir()
    own = 'name = "own"\ndescription = "ours"\n[[stages]]\nminutes = 2\n[[stages]]\nminutes = 3\n'
    (settings.recipes / "own.toml").write_text(own)
    (settings.recipes / "broken.toml").write_text("= x")
    told = {recipe["name"]: recipe for recipe in ok(page.client.get("/api/recipes"))}
    assert told["own"]["minutes"] == 5
    assert told["quickstart"]["minutes"] is None  # some of its stages go by steps
    assert told["seconds"]["minutes"] is None
    assert "broken" not in told


# -- real trainings -----------------------------------------------------------------------------


@pytest.fixture
def tiny(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A recipe of the firm's own that takes a second. What it started is gone afterwards."""
    monkeypatch.setenv("QIUSUO_HOME", str(settings.runs.parent / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings.recipes.mkdir()
    corpus = lives.write_corpus(settings.recipes / "road.jsonl")
    lives.write_recipe(settings.recipes / "tiny.toml", lives.recipe_table(corpus))
    yield "tiny"
    for lock in settings.runs.glob("*/.lock"):
        if (process := writer_of(lock.parent)) is not None:
            os.kill(process, signal.SIGKILL)


ENDLESS = {
    "stages.pretrain.steps": 1_000_000,
    "stages.pretrain.checkpoint_steps": 100_000,
    "stages.pretrain.validation_steps": 0,
}


def test_a_training_is_started_watched_and_stopped(
    page: Served, settings: Settings, tiny: str
) -> None:
    wrong = {"recipe": tiny, "set": {"stages.pretrain.stepz": 5}, "name": "one"}
    told = refused(page.client.post("/api/runs", json=wrong), 400)
    assert "stepz" in told
    assert "did you mean 'steps'" in told
    assert not (settings.runs / "one").exists()  # the name is free again
    body = {"recipe": tiny, "set": ENDLESS, "name": "one"}
    begun = ok(page.client.post("/api/runs", json=body))
    assert begun["id"] == "one"
    assert begun["state"] in {"starting", "running"}
    refused(page.client.post("/api/runs/one/resume"), 409)
    with listening(page, "one", after=0) as heard:
        while hear(heard, "record")[0].get("step", 0) < 3:
            pass
        assert "stopping" in ok(page.client.post("/api/runs/one/stop"))
        state = hear(heard, "state")[0]
        while state["state"] != "interrupted":
            state = hear(heard, "state")[0]
    until(lambda: page.app.state.page.trainings.process_of("one") is None, LONG)
    details = ok(page.client.get("/api/runs/one"))
    assert details["recipe"]["stages"][0]["steps"] == 1_000_000
    assert "Stopped and saved" in details["console"]
    assert list((settings.runs / "one" / "checkpoints").iterdir())
    assert [entry.name for entry in settings.runs.iterdir() if entry.name == "one"] == ["one"]
    assert "not being trained" in refused(page.client.post("/api/runs/one/stop"), 409)


@pytest.mark.long
def test_a_training_outlives_the_server_and_is_found_again(
    settings: Settings, tiny: str, serve: Callable[..., Any]
) -> None:
    with serve(settings) as page:
        body = {"recipe": tiny, "set": ENDLESS, "name": "one"}
        ok(page.client.post("/api/runs", json=body))
        until(lambda: ok(page.client.get("/api/runs/one"))["state"] == "running")
        process = page.app.state.page.trainings.process_of("one")
    with serve(settings) as page:
        before = ok(page.client.get("/api/runs/one"))
        assert before["state"] == "running"
        with listening(page, "one") as heard:
            assert hear(heard, "record")[0]["step"] > 0
        ok(page.client.post("/api/runs/one/stop"))
        until(lambda: ok(page.client.get("/api/runs/one"))["state"] == "interrupted")
        until(lambda: page.app.state.page.trainings.process_of("one") is None, LONG)
        resumed = ok(page.client.post("/api/runs/one/resume"))
        assert resumed["state"] in {"starting", "running"}
        later = until(lambda: page.app.state.page.trainings.process_of("one"))
        assert later != process
        with listening(page, "one") as heard:
            assert hear(heard, "record")[0]["step"] > before["step"]
        os.kill(later, signal.SIGKILL)
        until(lambda: ok(page.client.get("/api/runs/one"))["state"] == "killed")
        refused(page.client.post("/api/runs/one/stop"), 409)


@pytest.mark.long
def test_a_finished_run_is_served_with_what_it_can_do(page: Served, tiny: str) -> None:
    """A recipe of the package, by its name."""
    body = {"recipe": "seconds", "set": {"stages.pretrain.precision": "float32"}}
    assert ok(page.client.post("/api/runs", json=body))["id"] == "seconds"
    assert "no finished model" in refused(page.client.post("/api/runs/seconds/serve"), 409)
    until(lambda: ok(page.client.get("/api/runs/seconds"))["state"] == "finished", LONG)
    until(lambda: page.app.state.page.trainings.process_of("seconds") is None, LONG)
    assert "nothing left" in refused(page.client.post("/api/runs/seconds/resume"), 409)
    assert ok(page.client.post("/api/runs/seconds/serve")) == {"id": "seconds"}
    assert ok(page.client.post("/api/runs/seconds/serve")) == {"id": "seconds"}  # not again
    assert ok(page.client.get("/api/runs/seconds"))["served_as"] == "seconds"
    [model] = ok(page.client.get("/api/models"))
    assert (model["id"], model["kind"], model["examples"]) == ("seconds", "text", ["《"])
    assert model["parameters"] > 10_000
    [engine] = ok(page.client.get("/api/console/engine"))
    assert (engine["state"], engine["running"], engine["drafting"]) == ("serving", 0, "mtp")
    again = ok(page.client.post("/api/runs", json=body))
    assert again["id"] == "seconds-2"
    until(lambda: page.app.state.page.trainings.process_of("seconds-2") is None, LONG)


def test_a_process_number_that_is_anothers_is_left_alone(page: Served, settings: Settings) -> None:
    """A lock file left by a kill may name a process that is another program by now."""
    make_run(settings.runs / "old", steps=5)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        (settings.runs / "old" / ".lock").write_text(str(bystander.pid))
        refused(page.client.post("/api/runs/old/stop"), 409)
        assert bystander.poll() is None
        bystander.communicate(b"\n")
    assert bystander.returncode == 0
