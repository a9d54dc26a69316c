"""Merging: the average in plain torch, branches that join, and what has no average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qiusuo.checkpoint.load import load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.training_state import load_state
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import read_log
from qiusuo.training.recipe import RecipeError, parse_recipe
from tests.training import lives, tasks


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qiusuo.training.finish.write_report", lambda path: path)


BRANCHES = (
    tasks.sft(steps=3, name="trunk"),
    tasks.sft(steps=2, name="left", start_from="trunk"),
    tasks.sft(steps=3, name="right", start_from="trunk"),
)


def merge(*models: tuple[str, float], **changes: Any) -> dict[str, Any]:
    named = [{"model": model, "weight": weight} for model, weight in models]
    return {"kind": "merge", "models": named, **changes}


def state_at(path: Path, step: int) -> dict[str, Any]:
    return load_state(dict(RunFolder.open(path, lock=False).checkpoints())[step])


def test_branches_join_at_their_weighted_average(tmp_path: Path) -> None:
    recipe = tasks.recipe(*BRANCHES, merge(("stage:left", 1), ("stage:right", 3)))
    path = tmp_path / "run"
    assert lives.live(recipe, path)
    left, right, joined = (state_at(path, step)["model"] for step in (5, 8, 9))
    assert not torch.equal(left["lm_head.weight"], right["lm_head.weight"])
    for name, held in joined.items():
        expected = (left[name].double() + 3 * right[name].double()) / 4
        assert torch.allclose(held.double(), expected, rtol=0, atol=1e-6), name
        assert held.dtype == left[name].dtype
    told = read_log(path / "log.jsonl")[-1]
    assert (told["kind"], told["step"]) == ("event", 9)
    assert "stage:right × 3" in told["text"]
    written = load_model(open_checkpoint(path)).state_dict()
    assert torch.equal(written["lm_head.weight"], joined["lm_head.weight"])


def test_later_stages_go_on_from_the_average(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    recipe = tasks.recipe(
        *BRANCHES,
        merge(("stage:left", 1), ("stage:right", 1)),
        tasks.sft(steps=4, name="after"),
    )
    assert lives.live(recipe, whole)
    lives.live_until(recipe, stopped, 11)
    assert lives.go_on(stopped)
    lives.assert_same_life(whole, stopped)


def test_a_model_and_itself_are_itself(taught: Path, tmp_path: Path) -> None:
    recipe = tasks.recipe(merge((str(taught), 1), (str(taught), 2)), base=taught)
    assert lives.live(recipe, tmp_path / "run")
    before = load_model(open_checkpoint(taught)).state_dict()
    after = load_model(open_checkpoint(tmp_path / "run")).state_dict()
    for name, held in before.items():
        assert torch.equal(held, after[name]), name


def test_another_architecture_has_no_average(taught: Path, tmp_path: Path) -> None:
    recipe = tasks.recipe(
        merge((str(taught), 1), (str(taught), 1)),
        tokenizer={"kind": "path", "path": str(taught)},
        model=tasks.MODEL | {"hidden_size": 16},
    )
    with pytest.raises(RecipeError, match="only models of one architecture have an average"):
        lives.live(recipe, tmp_path / "run")


def test_another_vocabulary_has_no_average(taught: Path, undisturbed: Path, tmp_path: Path) -> None:
    recipe = tasks.recipe(merge((str(taught), 1), (str(undisturbed), 1)), base=taught)
    with pytest.raises(RecipeError, match="another tokenizer"):
        lives.live(recipe, tmp_path / "run")


def test_adapters_have_no_average(taught: Path, tmp_path: Path) -> None:
    recipe = tasks.recipe(
        merge((str(taught), 1), (str(taught), 1)), base=taught, adapter={"rank": 2}
    )
    with pytest.raises(RecipeError, match="without \\[adapter\\]"):
        lives.live(recipe, tmp_path / "run")


def test_only_earlier_stages_can_be_named() -> None:
    with pytest.raises(RecipeError, match="'after', which is no earlier stage"):
        parse_recipe(tasks.table(merge(("stage:after", 1), ("x", 1)), tasks.sft(name="after")))
