"""The stage ``sample``: of many answers the right ones are kept, as conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qiusuo.data.dialogues import read_dialogues
from qiusuo.runs.log import read_log
from qiusuo.tasks.parity import running_parity
from qiusuo.training.recipe import RecipeError
from qiusuo.training.rl.rollouts import Group
from qiusuo.training.sample import Sampling
from tests.training import lives, tasks


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qiusuo.training.finish.write_report", lambda path: path)


def sampling(taught: Path, path: Path, **stage: Any) -> Sampling:
    return Sampling(lives.scene_of(tasks.recipe(tasks.sample(**stage), base=taught), path))


def responses(lines: list[str]) -> list[str]:
    found = []
    for line in lines:
        said = json.loads(line)["messages"][-1]
        thought = said["reasoning_content"]
        found.append(said["content"] if thought is None else f"{thought}|{said['content']}")
    return found


def answers(*told: tuple[str, float, bool]) -> Group:
    """(thought, reward, finished) of each."""
    rollouts = [
        tasks.rollout(reward, finished=finished, response=f"<think>{thought}</think>1")
        for thought, reward, finished in told
    ]
    return Group(tasks.a_question(), rollouts)


def test_right_and_finished_answers_are_kept_once(taught: Path, tmp_path: Path) -> None:
    right = [("10", 1.0, True), ("10", 1.0, True), ("11", 1.0, True)]
    group = answers(("00", 0.0, True), ("01", 1.0, False), *right)
    for keep, expected in ((1, ["10|1"]), (2, ["10|1", "11|1"]), (9, ["10|1", "11|1"])):
        work = sampling(taught, tmp_path / str(keep), keep=keep)
        assert responses(work.lines(group)) == expected


def test_marks_in_the_words_cannot_be_kept(taught: Path, tmp_path: Path) -> None:
    """They would be read as text, which is something else than what was said."""
    work = sampling(taught, tmp_path / "run", keep=4)
    assert work.lines(answers(("0<｜User｜>1", 1.0, True))) == []


def test_a_valid_trace_may_be_asked_for(taught: Path, tmp_path: Path) -> None:
    question = tasks.a_question()
    trace = running_parity(question.problem.data["bits"])
    right = f"<think>{trace}</think>{trace[-1]}"
    lucky = f"<think>{'0' * 8}</think>{trace[-1]}"
    group = Group(question, [])
    for response in (lucky, right):
        one = tasks.rollout(1.0, response=response)
        verdict = question.task.verify(question.problem, response)
        assert verdict.reward == 1
        group.rollouts.append(type(one)(**vars(one) | {"verdict": verdict}))
    strict = sampling(taught, tmp_path / "strict", trace_valid=True)
    assert responses(strict.lines(group)) == [f"{trace}|{trace[-1]}"]
    lax = sampling(taught, tmp_path / "lax", trace_valid=False)
    assert responses(lax.lines(group)) == [f"{'0' * 8}|{trace[-1]}"]


def test_traces_read_back_as_the_tokens_that_were_sampled(taught: Path, tmp_path: Path) -> None:
    work = sampling(taught, tmp_path / "run", count=16, batch=16, keep=9)
    groups = work.ask()
    lines = [line for group in groups for line in work.lines(group)]
    assert len(lines) > 8
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(lines))
    read = read_dialogues(file, work.scene.tokenizer)
    sampled = {(*one.prompt, *one.answer) for group in groups for one in group.rollouts}
    for index in range(read.length):
        example = read.example(index)
        assert tuple(example.tokens) in sampled
    # What counts is the answer.
    [first] = [one for g in groups for one in g.rollouts
               if [*one.prompt, *one.answer] == read.example(0).tokens][:1]  # fmt: skip
    assert read.example(0).counted == [False] * len(first.prompt) + [True] * len(first.answer)


def test_what_a_killed_run_wrote_is_not_counted(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = sampling(taught, tmp_path / "run", count=8, batch=4)
    work.path.parent.mkdir()
    work.path.write_bytes(b"x" * 500)
    lines, lengths = work.lines, []

    def nothing_at_first(group: Group) -> list[str]:
        return lines(group) if work.state.step else []

    def look() -> bool:
        lengths.append((work.bytes, work.path.stat().st_size))
        return False

    monkeypatch.setattr(work, "lines", nothing_at_first)
    work.run(look)
    assert lengths[0] == (0, 0)
    assert lengths[1][0] == lengths[1][1] > 0
    assert all(json.loads(line) for line in work.path.read_text().splitlines())


@pytest.mark.parametrize("learner", ["sft", "teach"])
def test_a_stage_that_kept_nothing_is_told_of(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learner: str
) -> None:
    sources = [{"traces": "sample"}]
    learning = {
        "sft": tasks.sft(sources=sources),
        "teach": {"kind": "teach", "sources": sources, "count": 5},
    }
    monkeypatch.setattr(Sampling, "lines", lambda self, group: [])
    recipe = tasks.recipe(tasks.sample(), learning[learner], base=taught)
    with pytest.raises(RecipeError, match=f"stage {learner}: stage sample kept nothing: give"):
        lives.live(recipe, tmp_path / "run")


def test_a_whole_stage(taught: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tasks.recipe(tasks.sample(count=10, batch=4, keep=2), base=taught)
    assert lives.live(recipe, run)
    tries = [record for record in read_log(run / "log.jsonl") if record["kind"] == "rollout"]
    assert [record["step"] for record in tries] == [1, 2, 3]
    assert [record["answered"] for record in tries] == [16, 32, 40]  # the last two problems
    kept = (run / "traces" / "sample.jsonl").read_text().splitlines()
    assert tries[-1]["kept"] == len(kept)
    keys = [json.loads(line)["key"] for line in kept]
    assert max(map(keys.count, keys)) <= 2
    for line in kept:
        record = json.loads(line)
        assert record["thinking"] is True
        bits = record["messages"][0]["content"].removesuffix("=")
        assert record["messages"][1]["content"] == running_parity(bits)[-1]
    assert lives.state_of(run) == "finished"
