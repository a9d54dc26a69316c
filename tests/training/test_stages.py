"""Recipes of every kind of stage: defaults, strictness at any depth, and what may follow what."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from qiusuo.runs.folder import read_recipe as read_resolved
from qiusuo.tasks.task import TaskError
from qiusuo.training import stages
from qiusuo.training.recipe import RecipeError, parse_recipe
from qiusuo.training.sections import AdapterSection
from qiusuo.training.train import start_run
from tests.training import lives, tasks

TEXT = lives.recipe_table("tang-poems")["stages"][0]
KINDS: dict[str, dict[str, Any]] = {
    "pretrain": TEXT,
    "sft": tasks.sft(),
    "rl": tasks.rl(),
    "sample": tasks.sample(),
}


def refused(*stage: dict[str, Any], **top: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tasks.table(*stage, **top))
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_named_after_itself_and_reads_back(kind: str, tmp_path: Path) -> None:
    recipe = tasks.recipe(KINDS[kind])
    [stage] = recipe.stages
    assert isinstance(stage, stages.STAGES[kind])
    assert (stage.kind, stage.name) == (kind, kind)
    named = tasks.recipe(KINDS[kind] | {"name": "other"})
    assert named.stages[0].name == "other"
    with start_run(recipe, tmp_path / "run") as run:
        assert parse_recipe(run.recipe) == recipe
    assert read_resolved(tmp_path / "run")["stages"][0]["kind"] == kind


def test_defaults_of_reinforcement() -> None:
    [stage] = parse_recipe(tasks.table({"kind": "rl", "steps": 3, "tasks": [tasks.PARITY]})).stages
    assert isinstance(stage, stages.RlStage)
    assert (stage.preset, stage.group, stage.loss.kl) == ("ours", None, None)
    assert (stage.temperature, stage.lag, stage.replay_experts) == (1.0, 0, True)
    assert (stage.optimizer.kind, stage.optimizer.weight_decay) == ("adamw", 0.0)
    assert stage.balance.bias_update_speed == 0.0
    assert not stage.random_reward
    assert not stage.positives_only
    assert stage.format_weight == stage.language_weight == stage.guard_weight == 0.0


def test_a_part_that_is_given_keeps_the_other_defaults_of_its_kind() -> None:
    """Half a table of settings is filled up as the stage says, not as other stages do."""
    [whole] = tasks.recipe(tasks.rl(schedule={})).stages
    [part] = tasks.recipe(tasks.rl(optimizer={"adamw_learning_rate": 1e-3}, schedule={})).stages
    assert part.optimizer.adamw_learning_rate == 1e-3
    assert (part.optimizer.kind, part.optimizer.weight_decay) == ("adamw", 0.0)
    assert part.schedule == whole.schedule


MISSPELT: dict[tuple[Any, ...], tuple[dict[str, Any], str, str]] = {
    ("stages", 0): (tasks.sft(), "seqence_length", "sequence_length"),
    ("stages", 0, "sources", 0): (tasks.sft(), "thougt_share", "thought_share"),
    ("stages", 0, "sources", 0, "task"): (tasks.sft(), "dificulties", "difficulties"),
    ("stages", 0, "x"): (tasks.rl(), "promts", "prompts"),
    ("stages", 0, "tasks", 0): (tasks.rl(), "wieght", "weight"),
    ("stages", 0, "loss"): (tasks.rl(), "clip_hihg", "clip_high"),
    ("stages", 0, "curriculum"): (tasks.rl(curriculum={"start": 8}), "widht", "width"),
    ("stages", 0, "optimizer"): (tasks.rl(), "lerning_rate", "learning_rate"),
    ("stages", 0, "y"): (tasks.sample(), "aswers", "answers"),
    ("stages", 0, "tasks", 0, "z"): (tasks.sample(), "corpsu", "corpus"),
}


@pytest.mark.parametrize("place", MISSPELT, ids=lambda p: ".".join(map(str, p)))
def test_misspelt_keys_of_every_kind(place: tuple[Any, ...]) -> None:
    stage, wrong, right = MISSPELT[place]
    place = tuple(part for part in place if part not in ("x", "y", "z"))
    table = tasks.table(stage)
    section: Any = table
    for part in place:
        section = section.setdefault(part, {}) if isinstance(section, dict) else section[part]
    section[wrong] = 1
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table)
    key = ".".join(map(str, (*place, wrong)))
    assert f"{key} is not a key; did you mean {right!r}?" in str(caught.value)


@pytest.mark.parametrize(
    ("top", "wrong", "right"),
    [
        ("adapter", "rnak", "rank"),
        ("ask", "thinkng", "thinking"),
        ("evaluation", "smaples", "samples"),
    ],
)
def test_misspelt_keys_beside_the_stages(top: str, wrong: str, right: str) -> None:
    said = refused(tasks.sft(), **{top: {wrong: 1}})
    assert f"{top}.{wrong} is not a key; did you mean {right!r}?" in said


def test_a_kind_that_does_not_exist_names_the_nearest() -> None:
    said = refused(tasks.sft(kind="stf"))
    assert "stages.0.kind: 'stf' is none of " in said
    assert "did you mean 'sft'?" in said
    assert "pretrain, sft, rl, sample" in said
    assert "is none of" in refused(tasks.sft(kind=3))


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (tasks.sft(sources=[]), "stages.0.sources"),
        (tasks.sft(sources=[{}]), "a source is one of file, task or traces"),
        (tasks.sft(sources=[{"file": "x", "task": tasks.PARITY}]), "one of file, task or traces"),
        (tasks.sft(sources=[{"task": {"task": "parity", "difficulties": []}}]), "difficulties"),
        (tasks.sft(batch_size=4, micro_batch_size=3), "multiple of micro_batch_size"),
        (tasks.rl(tasks=[]), "stages.0.tasks"),
        (tasks.rl(group=1), "stages.0.group"),
        (tasks.rl(temperature=0.0), "stages.0.temperature"),
        (tasks.rl(preset="grpo"), "stages.0.preset"),
        (tasks.rl(loss={"clip_low": 0.0}), "stages.0.loss.clip_low"),
        (tasks.rl(curriculum={}), "stages.0.curriculum.start"),
        (tasks.rl(lag=2), "stages.0.lag"),
        (tasks.sample(answers=0), "stages.0.answers"),
        (tasks.sample(minutes=1.0), "stages.0.minutes"),
    ],
)
def test_values_that_cannot_be(stage: dict[str, Any], expected: str) -> None:
    assert expected in refused(stage)


# What follows what


def traces(of: str) -> list[dict[str, Any]]:
    return [{"traces": of}]


@pytest.mark.parametrize(
    ("stage", "key", "named"),
    [
        (tasks.rl(start_from="tech"), "start_from", "tech"),
        (tasks.rl(start_from="rl"), "start_from", "rl"),  # itself
        (tasks.rl(start_from="sample"), "start_from", "sample"),  # which comes later
        (tasks.sft(name="again", sources=traces("sample")), "traces", "sample"),
        (tasks.sft(name="again", sources=traces("again")), "traces", "again"),
    ],
)
def test_only_earlier_stages_can_be_gone_on_from(
    stage: dict[str, Any], key: str, named: str
) -> None:
    said = refused(tasks.sft(name="teach"), stage, tasks.sample())
    name = stage.get("name", stage["kind"])
    assert f"stage {name}: {key} names {named!r}, which is no earlier" in said


def test_traces_are_those_of_a_sample_stage() -> None:
    """Anything else leaves none, and that would be found out after the stages before."""
    said = refused(tasks.sft(name="teach"), tasks.sft(name="again", sources=traces("teach")))
    assert "stage again: traces names 'teach', a stage that leaves no traces" in said


def test_a_chain_that_fits() -> None:
    recipe = tasks.chain(Path("somewhere"))
    assert [stage.name for stage in recipe.stages] == ["teach", "rl", "sample", "refine"]


# The beginning


def test_a_model_or_a_base_and_not_both() -> None:
    both = tasks.table(tasks.sft()) | {"base": "somewhere"}
    neither = tasks.table(tasks.sft())
    del neither["model"]
    for table in (both, neither):
        with pytest.raises(RecipeError, match=r"give either \[model\], a new model, or base"):
            parse_recipe(table)


def test_a_base_has_its_own_tokenizer() -> None:
    table = tasks.table(tasks.sft(), base=Path("somewhere"))
    assert parse_recipe(copy.deepcopy(table)).base == "somewhere"
    del table["license"]
    with pytest.raises(RecipeError, match="give license: with base it is the one that somewhere"):
        parse_recipe(table)
    table |= {"license": "mit", "tokenizer": {"kind": "characters"}}
    with pytest.raises(RecipeError, match=r"base has its own tokenizer"):
        parse_recipe(table)


def test_adapters() -> None:
    recipe = tasks.recipe(tasks.sft(), adapter={})
    assert recipe.adapter == AdapterSection(kind="lora", rank=16, alpha=32.0)
    assert tasks.recipe(tasks.sft()).adapter is None
    assert "adapter.rank" in refused(tasks.sft(), adapter={"rank": 0})
    assert "adapter.kind" in refused(tasks.sft(), adapter={"kind": "dora"})


def test_a_row_longer_than_the_context_is_refused() -> None:
    said = refused(tasks.sft(sequence_length=129))
    assert "sequence_length 129 is over the model's max_position_embeddings 128" in said


# Refused before anything is done


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (tasks.rl(tasks=[{"task": "party", "difficulties": [8]}]), "did you mean 'parity'"),
        (tasks.rl(tasks=[{"task": "parity", "difficulties": [8, 7]}]), "difficulties 8 to 64"),
        (tasks.sample(tasks=[{"task": "parity", "difficulties": [99]}]), "difficulties 8 to 64"),
        (
            tasks.sft(name="x", sources=[{"task": {"task": "party", "difficulties": [8]}}]),
            "did you mean 'parity'",
        ),
        (tasks.rl(preset="cispo", loss={"dual_clip": 2.0}), "stage rl: dual_clip"),
    ],
)
def test_a_later_stage_that_cannot_work_is_refused_at_once(
    taught: Path, tmp_path: Path, stage: dict[str, Any], expected: str
) -> None:
    recipe = tasks.recipe(tasks.sft(), stage, base=taught)
    with pytest.raises((RecipeError, TaskError), match=expected):
        lives.live(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_that_is_only_looked_at_is_checked_too(taught: Path, tmp_path: Path) -> None:
    looks = {"tasks": [{"task": "parity", "difficulties": [3]}]}
    with pytest.raises(TaskError, match="difficulties 8 to 64"):
        lives.live(tasks.recipe(tasks.sft(), base=taught, evaluation=looks), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_margin_beyond_the_longest_answer() -> None:
    said = refused(tasks.rl(overlong="soft", overlong_margin=13, max_tokens=12))
    assert "overlong_margin must be at most max_tokens, 12" in said
