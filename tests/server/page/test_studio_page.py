"""Studio, as a person at a browser has it: a real server, real run folders, Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from qiusuo.runs.folder import RunFolder
from tests.runs.conftest import RECIPE, kept_rollout, make_rl_run, make_run, rollout_record
from tests.server.page.browser import browser
from tests.server.page.site import PHONE, Site, site, too_wide, visits

HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>alert(1)</script>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def place(chromium, tmp_path_factory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("studio")) as one:
        yield one


@pytest.fixture
def visit(chromium) -> Iterator[Callable[..., Any]]:
    with visits(chromium) as opener:
        yield opener


@pytest.fixture
def path(place, request) -> Path:
    """Where a test's run is; the name is the test's."""
    return place.runs / request.node.name.removeprefix("test_")


def begun(path: Path, steps: int = 100, **recipe: Any) -> RunFolder:
    run = RunFolder.create(path, RECIPE | recipe, version="0.1.0")
    run.set_status("running", stage="pretrain", step=0, steps=steps)
    return run


def step(number: int, **more: Any) -> dict[str, Any]:
    record = {"kind": "step", "stage": "pretrain", "step": number, "loss": 9 - number / 10}
    return record | {"tokens": number * 100, "seconds": number * 0.5} | more


def written(path: Path, *records: dict[str, Any], steps: int = 100) -> None:
    """An interrupted run with these records, of kinds that are not known yet too."""
    with begun(path, steps) as run:
        run.set_status("interrupted", stage="pretrain", step=len(records), steps=steps)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (path / "log.jsonl").write_text(lines, encoding="utf-8")


def chart(page: Any, title: str) -> Any:
    """The chart of this title."""
    return page.get_by_role("figure", name=title, exact=True)


def into_view(drawing: Any) -> None:
    """What nobody sees is not drawn."""
    drawing.evaluate("node => node.scrollIntoView({ block: 'nearest' })")


def value(page: Any, title: str, label: str | None) -> Any:
    """Where a chart's legend says the value of a line."""
    drawing = chart(page, title)
    into_view(drawing)
    keys = drawing.locator(".st-key")
    one = keys if label is None else keys.filter(has=page.get_by_text(label, exact=True))
    return one.locator("b")


def told(page: Any, title: str, label: str | None = None) -> str:
    return value(page, title, label).filter(has_text=re.compile(".")).inner_text()


def says(page: Any, title: str, wanted: str, label: str | None = None) -> None:
    """Until it says so."""
    value(page, title, label).filter(has_text=re.compile(f"^{re.escape(wanted)}$")).wait_for()


def until(page: Any, look: Callable[[], bool]) -> None:
    for _ in range(500):
        if look():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not come")


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


# -- one run, live ------------------------------------------------------------------------------


def test_a_run_is_watched_from_its_first_step_on(place, visit, path):
    with begun(path) as run, run.open_log() as log, run.open_samples() as samples:
        page = visit(f"{place.address}/studio")
        page.get_by_role("link", name=path.name).click()
        page.get_by_text("Waiting for the first step").wait_for()
        assert page.locator(".st-chart").count() == 0

        log.append(step(1))
        says(page, "Loss", "8.900")
        page.get_by_text("live", exact=True).wait_for()
        # What is drawn grows in place: marks set on its nodes outlive every new record.
        page.evaluate("document.querySelector('.uplot').mark = 'the same'")
        for number in range(2, 41):
            log.append(step(number, lr=0.001))
            run.set_status("running", stage="pretrain", step=number, steps=100)
        says(page, "Loss", "5.000")
        says(page, "Learning rate", "0.001")
        page.get_by_text("step 40 of 100").wait_for()
        assert page.evaluate("document.querySelector('.uplot').mark") == "the same"

        log.append({"kind": "validation", "step": 40, "loss": 5.25, "bits_per_character": 3.5})
        says(page, "Loss", "5.250", "validation")
        says(page, "Bits per character", "3.500")
        samples.append(
            {"kind": "sample", "step": 40, "prompt": "春", "continuation": "眠" + HOSTILE}
        )
        page.get_by_text("眠<img src=x").first.wait_for()
        run.set_status("interrupted", stage="pretrain", step=40, steps=100)
    page.locator("[data-state=interrupted]").wait_for()
    page.get_by_role("button", name="Resume").wait_for()
    assert page.locator(".st-sample img").count() == 0
    assert "hacked" not in page.title()


def test_a_resumed_run_takes_back_steps_and_the_page_with_it(place, visit, path):
    with begun(path) as run, run.open_log() as log:
        for number in range(1, 31):
            log.append(step(number))
        page = visit(f"{place.address}/studio/{path.name}")
        says(page, "Loss", "6.000")
        # What is drawn stays where it is, and what a person chose with it.
        page.evaluate("document.querySelector('.uplot').mark = 'the same'")
        page.get_by_label("Range").select_option("tenth")
        log.truncate_after(10)
        says(page, "Loss", "8.000")
        assert page.evaluate("document.querySelector('.uplot').mark") == "the same"
        assert page.get_by_label("Range").input_value() == "tenth"
        log.append(step(11, loss=7.5))
        says(page, "Loss", "7.500")


@pytest.mark.parametrize("count", [1, 5, 50, 20_000])
def test_any_length_of_log_is_drawn(place, visit, path, count):
    loads = [[[1.0, 1.0], [1.0, 1.0]]]
    records = [
        step(number, loss=2 + 6 / number, expert_load=loads[0], max_violation=[0.5, 0.25])
        for number in range(1, count + 1)
    ]
    written(path := path.with_name(f"length-{count}"), *records, steps=count)
    page = visit(f"{place.address}/studio/{path.name}")
    page.get_by_text(f"step {count:,} of {count:,}").wait_for()
    says(page, "Busiest expert above its share (MaxVio)", "0.2500", "MoE layer 2")
    blue = page.evaluate(
        """() => {
            const canvas = document.querySelector(".st-lead canvas");
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            let blue = 0;
            for (let i = 0; i < data.length; i += 4)
                blue += data[i + 3] > 200 && data[i + 2] - data[i] > 100;
            return blue;
        }"""
    )
    assert blue > 5  # even one point is to be seen


# -- what later stages log ----------------------------------------------------------------------


def test_every_number_has_a_chart(place, visit, path):
    records: list[dict[str, Any]] = []
    for number in range(1, 10):
        learnt = {"kind": "rollout", "step": number, "stage": "rl", "reward": number / 10}
        by_task = {"by_task": {"chains/10": 0.5, "chains/5": 0.875}}
        lengths = {"length_right": 100, "length_wrong": 200, "my_reward": 41.0}
        records.append(learnt | {"pass_at_1": 0.25, "pass_at_k": 0.75, "k": 8} | lengths | by_task)
        loss = "NaN" if number == 5 else 0.5
        stage = "sft" if number < 7 else "rl"
        more = {"my_measure": 42.0, "my_list": [1.5, 2.5]}
        records.append(step(number, stage=stage, loss=loss, **more))
    tasks = {"chains/5": {"accuracy": 0.5, "accuracy_low": 0.4, "pass_at_8": 0.9, "length": 30.0}}
    records.append({"kind": "validation", "step": 9, "stage": "rl", "tasks": tasks})
    written(path, *records)
    page = visit(f"{place.address}/studio/{path.name}")
    says(page, "Reward", "0.9000")  # what one looks for stands first, and large
    assert page.locator(".st-lead .st-chart-title").inner_text() == "Reward"
    assert told(page, "Solved: pass@1 and pass@k", "pass@k") == "75.00"
    assert told(page, "Length of answers", "wrong answers") == "200.0"
    assert told(page, "Solved by task", "chains/5") == "87.50"
    assert told(page, "Accuracy, held-out problems", "chains/5") == "50.00"
    assert told(page, "pass@8, held-out problems", "chains/5") == "90.00"
    assert told(page, "Length, held-out problems", "chains/5") == "30.00"
    assert page.get_by_role("figure", name="accuracy low").count() == 0
    says(page, "my reward", "41.00")
    says(page, "Loss of the policy", "0.5000")  # in no unit, and so on no chart with others
    into_view(chart(page, "Loss"))
    chart(page, "Loss").get_by_text("Values that are no numbers: 1").wait_for()
    says(page, "my measure", "42.00")
    assert chart(page, "my list").locator(".st-key").count() == 2


def test_rollouts_are_browsed(place, visit, path):
    make_rl_run(path, kept=40)
    page = visit(f"{place.address}/studio/{path.name}")
    tab(page, "Rollouts")
    answers = page.locator(".st-rollout")
    page.get_by_role("heading", name="step 400").wait_for()
    assert answers.count() == 30
    page.get_by_role("button", name="Show more").click()
    until(page, lambda: answers.count() == 40)
    assert page.get_by_role("button", name="Show more").count() == 0

    page.get_by_role("button", name="wrong", exact=True).click()
    until(page, lambda: 0 < answers.count() < 10)
    assert answers.filter(has=page.locator(".badge.ok")).count() == 0
    first = answers.filter(has_text="not closed").first
    assert "<b>bold</b>" in first.inner_text()  # what a model wrote is text
    assert first.locator("b").count() == 0
    assert "no answer" in first.inner_text()

    page.get_by_label("First step shown").fill("203")
    page.get_by_role("heading", name="step 205").wait_for()
    page.get_by_role("button", name="right", exact=True).click()
    until(page, lambda: answers.filter(has=page.locator(".badge.danger")).count() == 0)
    page.get_by_label("Task").select_option("chains/5")
    until(page, lambda: answers.filter(has_text="chains/4").count() == 0)
    told = answers.first.inner_text()
    for words in ("reward 1", "07+35+2+42=", "07+35=321+2=521+42=941", "advantage +0.625"):
        assert words in told
    page.get_by_label("Task").select_option("parity/24")
    page.get_by_text("No such answer from here on").wait_for()


def test_new_rollouts_come_by_themselves(place, visit, path):
    with begun(path) as run, run.open_log() as log, run.open_rollouts() as rollouts:
        log.append(rollout_record(1, 0, 9, np.random.default_rng(0)))
        page = visit(f"{place.address}/studio/{path.name}")
        tab(page, "Rollouts")
        page.get_by_text("This run kept no answers").wait_for()
        for number in (2, 3):
            rollouts.append(kept_rollout(number, 0, True) | {"prompt": f"{HOSTILE}{number}"})
            log.append(rollout_record(number, 0, 9, np.random.default_rng(0)))
            page.get_by_role("heading", name=f"step {number}", exact=True).wait_for()
        assert page.locator(".st-rollout").count() == 1
        assert page.locator(".st-rollout img").count() == 0
        assert "hacked" not in page.title()


def test_no_rollouts_no_panel(place, visit, path):
    written(path, step(1), step(2))
    page = visit(f"{place.address}/studio/{path.name}")
    says(page, "Loss", "8.800")
    tabs = [one.inner_text() for one in page.get_by_role("tab").all()]
    assert tabs == ["Curves", "Recipe"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_experts_have_a_heat_map(place, visit, path, theme):
    loads = [[0.0, 1.0, 4.0], [1.0, 1.0, 1.0]]
    written(path := path.with_name(f"heat-{theme}"), step(1, expert_load=loads))
    page = visit(f"{place.address}/studio/{path.name}", color_scheme=theme)
    tab(page, "Experts")
    page.get_by_text("busiest now: expert 3 with 4.000×").wait_for()
    pixels = page.evaluate(
        """() => [...document.querySelectorAll(".st-heat canvas")].map((canvas) =>
            [...canvas.getContext("2d").getImageData(0, 0, 1, canvas.height).data])"""
    )
    first, second = ([row[i : i + 3] for i in range(0, len(row), 4)] for row in pixels)
    idle, even, busy = first
    assert idle[2] - idle[0] > 80  # blue
    assert busy[0] - busy[2] > 80  # orange
    assert second == [even] * 3
    ground = 255 if theme == "light" else 20
    assert all(abs(value - ground) < 25 for value in even)  # what is even is quiet
    page.locator(".st-heat canvas").first.hover(position={"x": 5, "y": 4})
    page.get_by_text("expert 1 at step 1: 0×").wait_for()


# -- looking closer -----------------------------------------------------------------------------


def test_scales_axes_and_zoom(place, visit, path):
    records = [step(number, loss=1000 / number) for number in range(1, 201)]
    validation = {"kind": "validation", "step": 100, "loss": 12.0, "tokens": 7}
    written(path, *records, validation, steps=200)
    page = visit(f"{place.address}/studio/{path.name}")
    says(page, "Loss", "5.000", "training")
    smoothing = page.get_by_label("Smoothing")
    smoothing.fill("0")
    says(page, "Loss", "5.000", "training")

    def at(share: float, wanted: Callable[[str], bool]) -> None:
        """Until what stands at the pointer, so far along the plot, is as wanted. The plot may be
        drawn anew meanwhile, so the pointer moves again and again."""
        for attempt in range(500):
            box = page.evaluate(
                "document.querySelector('.st-lead .u-over').getBoundingClientRect().toJSON()"
            )
            x = box["x"] + box["width"] * share
            page.mouse.move(x + attempt % 2, box["y"] + box["height"] / 2)
            seen = page.locator(".st-lead .st-chart-at").inner_text()
            if seen and wanted(seen.replace(",", "")):
                return
            page.wait_for_timeout(20)
        raise AssertionError(f"{seen!r} stands at {share}")

    at(0.5, lambda seen: 95 < int(seen) < 106)
    step_there = int(page.locator(".st-lead .st-chart-at").inner_text())
    assert float(told(page, "Loss", "training")) == pytest.approx(1000 / step_there, rel=1e-3)
    page.get_by_role("button", name="tokens", exact=True).click()
    at(0.9, lambda seen: 17_000 < int(seen) < 19_000)
    assert told(page, "Loss", "validation") == "12.00"  # at its step's tokens, not at its own 7
    page.get_by_role("button", name="time", exact=True).click()
    at(0.5, lambda seen: seen.endswith("s"))
    page.get_by_role("button", name="step", exact=True).click()
    at(0.02, lambda seen: seen.isdigit() and int(seen) < 10)

    box = page.locator(".st-lead .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60, steps=4)
    page.mouse.up()
    page.get_by_role("button", name="Zoom out").wait_for()
    at(0.02, lambda seen: 95 < int(seen) < 110)
    page.get_by_role("button", name="Zoom out").click()
    at(0.02, lambda seen: int(seen) < 10)
    page.get_by_label("Range").select_option("tenth")
    at(0.02, lambda seen: int(seen) > 175)
    page.get_by_label("Range").select_option("all")
    page.get_by_role("button", name="log", exact=True).click()
    page.get_by_role("button", name="log", exact=True, pressed=True).wait_for()
    page.reload()  # how one likes to look is kept
    page.get_by_role("button", name="log", exact=True, pressed=True).wait_for()
    says(page, "Loss", "5.000", "training")


def test_runs_are_compared(place, visit, path):
    for name, rate in (("wide", 0.1), ("narrow", 0.2)):
        with begun(place.runs / name, seed=round(rate * 10)) as run, run.open_log() as log:
            for number in range(1, 21):
                log.append(step(number, loss=9 - number * rate))
            run.set_status("interrupted", stage="pretrain", step=20, steps=100)
    page = visit(f"{place.address}/studio")
    assert page.get_by_role("button", name="Compare").is_disabled()
    page.get_by_label("Choose Poems 27M", exact=False).first.wait_for()
    for name in ("wide", "narrow"):
        row = page.locator(".st-run").filter(has=page.get_by_text(name, exact=True))
        row.get_by_role("checkbox").check()
    page.get_by_role("button", name="Compare 2").click()
    says(page, "Loss: training", "7.000", "wide")
    says(page, "Loss: training", "5.000", "narrow")
    keys = page.locator(".st-lead .st-key")
    assert keys.count() == 2
    differences = page.locator("tr").filter(has=page.get_by_text("seed", exact=True))
    assert differences.locator("td").all_inner_texts() == ["1", "2"]
    page.locator(".st-compared").get_by_role("link", name="wide").click()
    page.get_by_role("heading", name="wide").wait_for()


# -- the rest of a run --------------------------------------------------------------------------


def test_a_finished_run_shows_its_recipe_texts_and_report(place, visit, path):
    make_run(path)
    report = f"<title>t</title><style>h1{{color:red}}</style><h1>All went well</h1>{HOSTILE}"
    (path / "report.html").write_text(report, encoding="utf-8")
    page = visit(f"{place.address}/studio/{path.name}")
    assert float(told(page, "Loss", "training")) < 4
    assert page.locator(".st-aside .st-sample").count() == 4  # those of the last two looks
    tab(page, "Texts")
    assert page.locator(".st-sample").count() == 12
    assert "training begins" in page.locator(".st-events").inner_text()
    tab(page, "Recipe")
    assert "27,262,976" in page.locator(".st-panel").inner_text()
    section = page.locator(".st-recipe section").filter(has=page.get_by_text("stages.pretrain"))
    assert "2000" in section.first.inner_text()
    tab(page, "Report")
    page.frame_locator("iframe").get_by_role("heading", name="All went well").wait_for()
    assert page.locator("iframe").get_attribute("sandbox") == ""
    assert "hacked" not in page.title()


def test_the_keyboard_reaches_every_tab(place, visit, path):
    make_run(path, steps=60)
    page = visit(f"{place.address}/studio/{path.name}")
    page.get_by_role("tab", name="Curves").focus()
    seen = []
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        seen.append(page.locator("[role=tab]:focus").inner_text())
    assert seen == ["Experts", "Texts", "Recipe", "Curves"]
    assert page.get_by_role("tabpanel").count() == 1


def test_a_phone_in_chinese(place, visit, path):
    make_run(path)
    page = visit(f"{place.address}/studio", **PHONE)
    page.get_by_role("heading", name="工作室").wait_for()
    page.locator(".st-run").first.wait_for()
    assert too_wide(page) == []
    page.goto(f"{place.address}/studio/{path.name}")
    assert float(told(page, "损失", "训练")) < 4
    assert too_wide(page) == []
    for name in ("专家", "文本", "配方"):
        tab(page, name)
        assert too_wide(page) == []
    learnt = make_rl_run(path.with_name("phone-rl"), kept=12)
    page.goto(f"{place.address}/studio/{learnt.name}")
    told(page, "各题型的解出率", "chains/5")
    assert too_wide(page) == []
    tab(page, "作答")
    page.get_by_role("heading", name="第 400 步").wait_for()
    assert too_wide(page) == []


def test_figures_say_of_which_stage_and_of_how_much_text_they_are(place, visit, path):
    look = {"kind": "validation", "stage": "pretrain"}
    records = [
        *(step(number, stage="pretrain", minutes=6.0) for number in range(1, 7)),
        {**look, "step": 3, "loss": 4.5, "bits_per_character": 4.25},
        {**look, "step": 6, "loss": 4.25, "bits_per_character": 4.75, "when": "after"},
        {"kind": "rollout", "step": 2154, "stage": "rl", "reward": 0.5},
        {"kind": "rollout", "step": 2155, "stage": "rl", "reward": 0.75},
        step(2156, stage="distil"),
    ]
    with begun(path) as run, run.open_log() as log:
        for record in records:
            log.append(record)
        page = visit(f"{place.address}/studio/{path.name}")
        shown = page.locator(".st-figures")
        shown.get_by_text("0.7500").wait_for()
        told = shown.inner_text().split("\n")
        assert told[: told.index("0.7500") + 1] == ["Reward", "rl", "0.7500"]
        whole = told.index("Validation, all of it")
        assert told[whole + 1 : whole + 3] == ["pretrain", "4.250"]
        says(page, "Loss", "4.500", "validation")
        says(page, "Loss", "4.250", "all validation text")
        assert page.locator(".st-chart", has_text="minutes").count() == 0


def test_until_there_is_a_model_the_chat_names_what_is_training(place, visit, path):
    page = visit(place.address)
    page.get_by_role("heading", name="No model is loaded yet.").wait_for()
    with begun(path) as run:
        run.set_status("running", stage="rl", step=7, steps=60)
        page.get_by_role("heading", name=f"{path.name} is still training.").wait_for()
        page.get_by_text("Stage rl, step 7 of 60").wait_for()


def test_what_is_not_there_is_said(place, visit):
    page = visit(f"{place.address}/studio/nowhere")
    page.get_by_role("alert").get_by_text("There is no run “nowhere”.").wait_for()
    page.get_by_role("link", name="All runs").click()
    page.get_by_role("heading", name="Studio").wait_for()


# -- starting one -------------------------------------------------------------------------------


def test_a_recipe_that_cannot_be_is_refused_in_its_own_words(place, visit):
    page = visit(f"{place.address}/studio")
    page.get_by_role("button", name="Train a model").click()
    page.get_by_label("seconds", exact=False).check()
    page.get_by_role("button", name="Change a key").click()
    page.get_by_label("Key", exact=True).fill("stages.pretrain.steps")
    page.get_by_label("Value", exact=True).fill("-3")
    page.get_by_role("button", name="Start training").click()
    assert "steps" in page.get_by_role("alert").inner_text()
    assert page.get_by_label("Value", exact=True).input_value() == "-3"  # nothing typed is lost


@pytest.mark.long
def test_from_a_recipe_to_a_model_that_talks(place, visit):
    page = visit(f"{place.address}/studio")
    page.get_by_role("button", name="Train a model").click()
    page.get_by_label("seconds", exact=False).check()
    page.get_by_label("Name of the run").fill("mine")
    page.get_by_role("button", name="Change a key").click()
    page.get_by_label("Key", exact=True).fill("stages.pretrain.steps")
    page.get_by_label("Value", exact=True).fill("2000")
    page.get_by_role("button", name="Start training").click()
    page.get_by_role("heading", name="mine").wait_for()
    chart(page, "Loss").wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Stop", exact=True).click()
    page.locator("[data-state=interrupted]").wait_for()
    run = httpx.get(f"{place.address}/api/runs/mine").json()
    assert 0 < run["step"] < 2000
    assert run["recipe"]["stages"][0]["steps"] == 2000

    page.get_by_role("link", name="All runs").click()
    page.get_by_role("button", name="Train a model").click()
    page.get_by_label("seconds", exact=False).check()
    page.get_by_label("Name of the run").fill("whole")
    page.get_by_role("button", name="Start training").click()
    page.get_by_role("heading", name="whole").wait_for()
    page.locator(".st-run-head [data-state=finished]").wait_for()
    page.get_by_role("button", name="Talk to it").first.click()
    page.locator("#composer").wait_for()
    models = httpx.get(f"{place.address}/api/models").json()
    assert [model["id"] for model in models] == ["whole"]
    page.get_by_text("whole", exact=True).first.wait_for()


def test_a_stray_percent_in_the_address_does_no_harm(place: Site, visit) -> None:
    page = visit(f"{place.address}/studio/100%")
    page.get_by_role("alert").filter(has_text="100%").wait_for()
