"""A longer context from some stage on: what the config says, and what is learnt of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qiusuo.engine.loading import load
from qiusuo.model.checks import ConfigError
from qiusuo.model.extension import extended
from qiusuo.model.families import config_from_hf
from qiusuo.model.rope_scaling import YarnScaling
from qiusuo.training.recipe import Recipe, RecipeError, parse_recipe
from tests.model.shapes import YARN, tiny_config
from tests.model.test_published import V3
from tests.training import lives, tasks

SHORT, LONG = 16, 64


pytestmark = pytest.mark.usefixtures("no_pictures")


def recipe_of(corpus: Path, *stages: dict[str, Any], positions: int = SHORT) -> Recipe:
    """A stage of short sequences, and others that say what they have of their own."""
    model = {"max_position_embeddings": positions, "qk_rope_head_dim": 8}
    table = lives.recipe_table(corpus, model=model, sequence_length=SHORT, steps=5)
    [first] = table["stages"]
    first |= {"validation_steps": 0, "checkpoint_steps": 3, "samples": {"prompts": []}}
    table["stages"] = [first, *(first | {"sequence_length": LONG} | stage for stage in stages)]
    return parse_recipe(table)


# -- the config ----------------------------------------------------------------------------


def test_v3_s_own_config_is_that_of_4k_extended_forty_times() -> None:
    published = config_from_hf(V3)
    trained = dataclasses.replace(published, rope_scaling=None, max_position_embeddings=4096)
    assert extended(trained, 40) == published


def test_in_other_families_the_pairs_grow() -> None:
    config = extended(tiny_config(model_type="qwen2"), 8, 32, beta_fast=16, mscale=0.5)
    assert config.max_position_embeddings == 256
    assert config.rope_scaling == YarnScaling(
        factor=8, original_max_position_embeddings=32, beta_fast=16, mscale=0.5, mscale_all_dim=0
    )


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"rope_scaling": YARN}, {"factor": 2}, "stretched already, by yarn with factor 8 to 128"),
        ({}, {"factor": 1}, "128 positions times 1 are 128"),
        ({}, {"factor": 4, "original": 32}, "32 positions times 4 are 128"),
    ],
)
def test_what_cannot_be_extended(changes: dict, how: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        extended(tiny_config(**changes), **how)


# -- the recipe ------------------------------------------------------------------------------


def test_a_stage_s_context_is_that_of_what_it_goes_on_from(corpus: Path) -> None:
    recipe = recipe_of(
        corpus,
        {"name": "long", "extend": {"factor": 4}},
        {"name": "after"},
        {"name": "aside", "start_from": "pretrain", "sequence_length": SHORT},
        {"name": "other", "extend": {"factor": 8}},
        {"name": "back", "start_from": "after"},
    )
    base = recipe.model_for(97)
    contexts = {
        one.name: recipe.config_of(one.name, base).max_position_embeddings for one in recipe.stages
    }
    expected = {"pretrain": 16, "long": 64, "after": 64, "aside": 16, "other": 128, "back": 64}
    assert contexts == expected


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "long"}], "stage long: sequence_length 64 is over .* 16; extend can"),
        (
            [{"name": "long", "extend": {"factor": 2}}],
            "stage long: sequence_length 64 is over .* 32",
        ),
        ([{"name": "long", "extend": {"factor": 0.5}}], "extend.factor: .*greater than 1"),
        (
            [{"name": "a", "extend": {"factor": 4}}, {"name": "b", "extend": {"factor": 2}}],
            "stage b: the context is stretched already, by yarn with factor 4 to 64",
        ),
        (
            [{"name": "a", "extend": {"factor": 4}}, {"name": "b", "start_from": "pretrain"}],
            "stage b: sequence_length 64 is over .* 16",
        ),
        (
            [{"name": "long", "extend": {"factr": 4}}],
            "extend.factr is not a key; did you mean 'factor'",
        ),
    ],
)
def test_what_no_recipe_may_say(corpus: Path, stages: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(corpus, *stages)


def test_a_base_is_refused_before_anything_is_learnt(taught: Path, tmp_path: Path) -> None:
    """What its context is, only its config knows; the second stage's fault is found at once."""
    stages = [
        tasks.sft(steps=2),
        tasks.sft(steps=2, name="long", extend={"factor": 1.5, "original": 4}),
    ]
    with pytest.raises(ConfigError, match=r"stage long: extend: 4 positions times 1\.5 are 6"):
        lives.live(tasks.recipe(*stages, base=taught), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


# -- a run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 8])
def test_it_goes_on_after_a_stop_and_is_exported(corpus: Path, tmp_path: Path, step: int) -> None:
    recipe = recipe_of(corpus, {"name": "long", "extend": {"factor": 4}})
    assert lives.live(recipe, tmp_path / "whole")
    lives.live_until(recipe, tmp_path / "again", step)
    assert lives.go_on(tmp_path / "again")
    lives.assert_same_life(tmp_path / "again", tmp_path / "whole")
    said = json.loads((tmp_path / "again" / "model" / "config.json").read_text(encoding="utf-8"))
    assert said["max_position_embeddings"] == LONG
    assert said["rope_scaling"]["type"] == "yarn"
    assert said["rope_scaling"]["original_max_position_embeddings"] == SHORT
    assert said["rope_scaling"]["mscale_all_dim"] == 1.0
    lm = load(tmp_path / "again")
    assert lm.config.softmax_scale == recipe.config_of("long", recipe.model_for(97)).softmax_scale
    assert lm.logits([3] * LONG).isfinite().all()


def test_a_base_is_extended_too(taught: Path, tmp_path: Path) -> None:
    stages = [tasks.sft(steps=2, sequence_length=160, extend={"factor": 2})]
    assert lives.live(tasks.recipe(*stages, base=taught), tmp_path / "run")
    config = load(tmp_path / "run").config
    assert config.max_position_embeddings == 256
    assert config.rope_scaling.original_max_position_embeddings == 128


@torch.no_grad()
def far_loss(run: Path, ids: torch.Tensor) -> float:
    """Nats per token in the second half of long windows."""
    lm = load(run, dtype="float32")
    rows_BT = ids[: len(ids) // LONG * LONG].view(-1, LONG)
    logits_BTW = lm.model.logits(lm.model(rows_BT[:, :-1]).x_BTD)[:, LONG // 2 :]
    return F.cross_entropy(logits_BTW.flatten(0, 1), rows_BT[:, LONG // 2 + 1 :].flatten()).item()


def test_far_positions_are_learnt(corpus: Path, tmp_path: Path) -> None:
    """Against the same model that never saw them."""
    first = {"steps": 60, "name": "pretrain"}
    found = {}
    for name, more in (
        ("short", []),
        ("long", [{"name": "long", "steps": 10, "extend": {"factor": 4}}]),
    ):
        recipe = recipe_of(corpus, *more, positions=SHORT if more else LONG)
        stages = [recipe.stages[0].model_copy(update=first), *recipe.stages[1:]]
        assert lives.live(recipe.model_copy(update={"stages": tuple(stages)}), tmp_path / name)
        tokenizer = load(tmp_path / name).tokenizer
        text = "\n".join(
            json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()[:60]
        )
        found[name] = far_loss(tmp_path / name, torch.tensor(tokenizer.encode(text)))
    assert found["long"] < found["short"] - 0.1
