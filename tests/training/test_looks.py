"""Looks at held-out problems: what the report reads is there, and as evaluation measures it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qiusuo.engine.loading import load
from qiusuo.evaluation.answers import ModelAnswerer
from qiusuo.evaluation.asking import Asker
from qiusuo.evaluation.evaluate import evaluate
from qiusuo.runs.log import read_log
from qiusuo.runs.progress import Progress
from qiusuo.runs.rollout_plots import draw_accuracy
from qiusuo.tasks.parity import Parity
from tests.training import lives, tasks

LOOKS = {
    "tasks": [{"task": "parity", "difficulties": [8, 10]}],
    "count": 6,
    "samples": 3,
    "max_tokens": 14,
}


@pytest.fixture(scope="module")
def lived(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "looked"
    recipe = tasks.recipe(
        tasks.rl(validation_steps=2, samples={"prompts": ["01"], "max_tokens": 3}),
        base=taught,
        evaluation=LOOKS,
    )
    assert lives.live(recipe, run)  # with its report
    return run


def test_before_in_between_and_after(lived: Path) -> None:
    looks = [record for record in read_log(lived / "log.jsonl") if record["kind"] == "validation"]
    assert [(r["step"], r.get("when")) for r in looks] == [(0, "before"), (2, None), (4, "after")]
    for look in looks:
        assert look["stage"] == "rl"
        assert look["seconds"] >= 0
        assert look["look_seconds"] > 0
        assert list(look["tasks"]) == ["parity/8", "parity/10"]
        for rates in look["tasks"].values():
            assert rates["problems"] == 6
            low, rate, high = (rates[f"accuracy{end}"] for end in ("_low", "", "_high"))
            assert 0 <= low <= rate <= high <= 1
            assert 0 <= rates["pass_at_1"] <= rates["pass_at_3"] <= 1
            assert 1 <= rates["length"] <= 14
    assert [s["step"] for s in lives.samples(lived)] == [0, 2, 4]


def test_the_report_shows_it(lived: Path) -> None:
    records = read_log(lived / "log.jsonl")
    looks = [record for record in records if record["kind"] == "validation"]
    assert draw_accuracy(looks, []) is not None
    report = (lived / "report.html").read_text(encoding="utf-8")
    for words in ("parity/8", "Held-out accuracy", "Pass rate by task"):
        assert words in report
    progress = Progress(4, "rl", 0, 0.0)
    for record in records:
        progress.add(record, 1.0)
    rate = looks[-1]["tasks"]["parity/8"]["accuracy"]
    assert f"parity/8 {100 * rate:.1f}%" in progress.validation_words()


def test_a_look_is_what_evaluation_says_of_the_finished_model(lived: Path) -> None:
    last = read_log(lived / "log.jsonl")[-1]
    assert last["when"] == "after"
    lm = load(lived, dtype="float32")
    scores = evaluate(
        ModelAnswerer(lm, Asker(lm.needed_tokenizer())),
        Parity(),
        [8, 10],
        count=12,
        samples=3,
        temperature=1.0,
        max_tokens=14,
    )
    for score in scores:
        if score.difficulty is not None:
            found = last["tasks"][f"parity/{score.difficulty}"]
            assert found["accuracy"] == score.greedy.rates["accuracy"].value
            assert found["length"] == pytest.approx(score.greedy.length)
            assert score.sampled is not None
            assert found["pass_at_1"] == score.sampled.rates["pass@1"].value
