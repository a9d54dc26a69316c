"""Reinforcement is told: before and after, in pictures, report, card and terminal."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tests.runs.conftest import RL_TASKS, make_run
from tests.runs.test_run_console import Clock
from tests.runs.test_run_report import Page

from qiusuo.runs.card import write_model_card
from qiusuo.runs.console import LiveView
from qiusuo.runs.facts import read_facts
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import RunLog, read_log
from qiusuo.runs.outcomes import find_outcomes, in_order, other_words
from qiusuo.runs.plots import draw_pictures
from qiusuo.runs.report import write_report
from qiusuo.runs.series import broken_at, stage_starts
from qiusuo.terminal import outcomes_table


def look(step: int, stage: str, when: str | None = None, **tasks: float) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": "validation", "step": step, "stage": stage}
    record["tasks"] = {name.replace("_", "/"): {"accuracy": rate} for name, rate in tasks.items()}
    return record | ({"when": when} if when else {})


def columns(*records: dict[str, Any]) -> list[tuple[str, int]]:
    found = find_outcomes(records)
    return found.columns if found else []


def test_a_column_for_each_end_of_a_stage() -> None:
    before = look(10, "sft", "before", chains_5=0.0)
    during = look(15, "sft", chains_5=0.02)
    after = look(20, "sft", "after", chains_5=0.05)
    again = look(20, "rl", "before", chains_5=0.05)
    assert columns(before, during, after, again) == [("before sft", 10), ("after sft", 20)]
    so_far = look(30, "rl", chains_5=0.6)
    assert columns(after, again, so_far) == [("after sft", 20), ("rl, so far", 30)]
    assert columns(again, so_far) == [("before rl", 20), ("rl, so far", 30)]
    assert columns({"kind": "validation", "step": 1, "loss": 2.0}) == []
    found = find_outcomes([after, look(30, "rl", "after", chains_5=0.9, chains_10=0.4)])
    assert found is not None
    assert found.rows == [
        ("chains/5", [{"accuracy": 0.05}, {"accuracy": 0.9}]),
        ("chains/10", [None, {"accuracy": 0.4}]),
    ]
    assert found.mean_accuracy() == (0.05, 0.9, 1)  # of those that both looks have
    assert not found.intervals


def test_tasks_in_order_and_cells_in_words() -> None:
    names = ["chains/10", "parity/24", "chains/5", "word", "chains/5b"]
    assert in_order(names) == ["chains/5", "chains/5b", "chains/10", "parity/24", "word"]
    cell = {"accuracy": 0.5, "problems": 2000, "pass_at_8": 0.995, "length": 31.25, "novelty": 7.5}
    told = ["2,000 problems", "pass@8 99.5%", "31.2 tokens", "novelty 7.50"]
    assert other_words(cell) == told


def test_rollout_records_keep_what_is_not_finite(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl") as log:
        log.append({"kind": "rollout", "step": 1, "kl": math.inf, "by_task": {"a/1": math.nan}})
    [record] = read_log(log.path)
    assert record["kl"] == math.inf
    assert math.isnan(record["by_task"]["a/1"])


def test_the_table_of_a_terminal_has_a_line_a_task(tmp_path: Path) -> None:
    """Five stages of a life, in eighty columns."""
    with RunLog(tmp_path / "log.jsonl") as log:
        for step, stage in enumerate(("pretrain", "cold-start", "rl", "distil"), 1):
            rates = {"parity/12": {"accuracy": 0.625, "length": 3.96}}
            look = {"step": step, "stage": stage, "when": "after", "tasks": rates}
            log.append({"kind": "validation", **look})
    shown = io.StringIO()
    Console(file=shown, width=80).print(outcomes_table(tmp_path))
    head, line = shown.getvalue().splitlines()
    assert head.split("  ")[0] == "held-out (tokens)"
    assert line.split()[1:] == ["62.5%", "(4)"] * 4


def test_the_pictures(rl_run: Path) -> None:
    names = [picture.name for picture in draw_pictures(read_log(rl_run / "log.jsonl"))]
    own = ["reward", "accuracy", "length", "entropy", "groups", "distance", "traces", "tasks"]
    assert names[:9] == [f"rl-{name}" for name in [*own, "others"]]
    assert names[9] == "loss"
    alone = [{"kind": "rollout", "step": 1, "reward": math.nan, "kl": 0.0}]
    assert len(draw_pictures(alone)) == 2
    policy = [{"kind": "step", "step": 1, "stage": "rl", "loss": 0.01}]
    told = [{"kind": "rollout", "step": n, "stage": "rl", "kept": 3 * n} for n in (1, 2)]
    assert [picture.name for picture in draw_pictures(told + policy)] == ["rl-others"]


def test_no_line_joins_two_stages() -> None:
    records = [{"step": i, "stage": "ab"[i > 2]} for i in range(6)]
    assert stage_starts(records) == [(0, "a"), (3, "b")]
    assert stage_starts(records[:3]) == []
    x, y = broken_at(np.arange(6.0), np.arange(6.0), [0, 3])
    assert np.flatnonzero(np.isnan(y)).tolist() == [3]
    assert x[~np.isnan(y)].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_report_tells_of_reinforcement(rl_run: Path) -> None:
    page = Page(write_report(rl_run))
    table = page.sections["outcomes"]
    for words in (*RL_TASKS, "after sft", "after rl", "95.2%", "92.2–97.2", "pass@8 97.7%"):
        assert words in table
    assert "before" not in table.replace("Before and after", "")
    assert "from 4.6% (after sft)" in page.text
    assert "2.7000" in page.sections["validation"]  # the look at text, and no empty rows
    assert page.sections["validation"].count("–") <= 2
    answers = page.sections["rollouts"]
    assert "step 205" in answers
    assert "step 400" in answers
    assert "the thought is not closed" in answers
    assert "<b>bold</b>" in answers
    kinds = [attrs.get("class") for tag, attrs in page.tags if tag == "div"]
    assert kinds.count("rollout right") == 6
    assert 3 < kinds.count("rollout wrong") <= 6
    assert "samples.jsonl" not in page.text


def test_the_card_shows_before_and_after(rl_run: Path) -> None:
    card = write_model_card(rl_run, rl_run / "model").read_text(encoding="utf-8")
    assert "| held-out problems | after sft | after rl |\n| --- | --- | --- |\n" in card
    assert "| **95.2%** (92.2–97.2)<br>pass@1 83.2%, pass@8 97.7%" in card
    assert "| Accuracy | 4.6% → 81.3% greedy, mean of 4 tasks |" in card


def test_looks_at_problems_alone_need_no_loss(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {"name": "x"}) as run:
        with run.open_log() as log:
            log.append({"kind": "validation", "step": 1, "loss": 3.0})
            log.append(look(2, "rl", "after", chains_5=0.5))
        facts = read_facts(run.path)
    assert [label for label, _, _ in facts.key_figures()] == ["Validation loss"]
    assert "3.000 nats per token" in facts.paragraph()
    page = Page(write_report(run.path))
    assert "50.0%" in page.sections["outcomes"]
    assert "3.0000" in page.sections["validation"]


def test_other_runs_know_nothing_of_it(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", steps=20, layers=1, experts=4)))
    assert not {"outcomes", "rollouts", "reinforcement"} & set(page.sections)


def test_the_terminal_shows_the_reward() -> None:
    stream, clock = io.StringIO(), Clock()
    with LiveView(3, "demo", stream=stream, clock=clock) as view:
        for number in range(1, 4):
            clock.now += 20
            told = {"kind": "rollout", "step": number, "stage": "rl", "reward": 0.25 * number}
            told |= {"pass_at_1": 0.5, "pass_at_k": 0.875, "k": 8, "length": 31.25, "entropy": 0.4}
            view.update(told)
            view.update({"kind": "step", "step": number, "stage": "rl", "loss": 0.0123})
        view.update(look(3, "rl", "after", a_1=0.5, a_2=0.25, a_3=1.0, a_10=0.0, b_1=0.1))
    lines = stream.getvalue().splitlines()
    words = "reward 0.750  pass@1 50.0%  pass@8 87.5%  length 31.2  entropy 0.400"
    last = [line for line in lines if line.startswith("step 3/3")]
    assert len(last) == 2
    assert words in last[0]
    assert "loss" not in "".join(lines)
    assert last[1].endswith("validation a/1 50.0%  a/2 25.0%  a/3 100.0%  a/10 0.0%  and 1 more")


def test_the_stage_after_has_a_loss_again() -> None:
    stream, clock = io.StringIO(), Clock()
    with LiveView(2, "demo", stream=stream, clock=clock) as view:
        view.update({"kind": "rollout", "step": 1, "stage": "rl", "reward": 1.0})
        clock.now += 20
        view.update({"kind": "step", "step": 2, "stage": "sft", "loss": 1.5})
    last = stream.getvalue().splitlines()[-1]
    assert "loss 1.5000" in last
    assert "reward" not in last
