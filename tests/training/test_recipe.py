"""A recipe is read strictly: what is not known is an error that names the nearest right thing."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from qiusuo.checkpoint.gguf.limits import check_writable
from qiusuo.checkpoint.tensors import disk_shapes
from qiusuo.model.config import ModelConfig
from qiusuo.runs.folder import read_recipe as read_resolved
from qiusuo.runs.toml import dump_toml
from qiusuo.training import recipe as recipes
from qiusuo.training.recipe import RecipeError, parse_recipe, read_recipe
from qiusuo.training.train import start_run
from tests.training import lives


@pytest.fixture
def table() -> dict[str, Any]:
    return lives.recipe_table("tang-poems")


@pytest.fixture
def file(table: dict[str, Any], tmp_path: Path) -> Path:
    return lives.write_recipe(tmp_path / "tiny.toml", table)


def refused(table: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(table)
    return str(caught.value)


@pytest.mark.parametrize("name", recipes.built_in_recipes())
def test_built_in_recipes_parse(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.stages
    if recipe.base is None:
        assert isinstance(recipe.model_for(recipe.tokenizer.vocab_size), ModelConfig)


@pytest.mark.parametrize("name", recipes.built_in_recipes())
def test_built_in_recipes_can_leave_for_gguf(name: str) -> None:
    """llama.cpp runs them, MTP module and all, and quantises every row in whole blocks of 32."""
    recipe = read_recipe(name)
    if recipe.tokenizer.kind != "bpe":
        pytest.skip("a character vocabulary has no place in a GGUF file")
    if recipe.base is not None:
        pytest.skip("its architecture is its base's")
    config = recipe.model_for(recipe.tokenizer.vocab_size)
    check_writable(config)
    assert config.num_nextn_predict_layers == 1
    matrices = {name: shape for name, shape in disk_shapes(config).items() if len(shape) == 2}
    assert {name: shape for name, shape in matrices.items() if shape[1] % 32} == {}


def test_built_in_recipes_are_there() -> None:
    assert {"seconds", "tinyshakespeare"} <= set(recipes.built_in_recipes())


MISSPELT = {
    (): ("sead", "seed"),
    ("tokenizer",): ("vocabsize", "vocab_size"),
    ("stages", 0): ("batchsize", "batch_size"),
    ("stages", 0, "data"): ("corpra", "corpora"),
    ("stages", 0, "data", "corpora", 0): ("wieght", "weight"),
    ("stages", 0, "optimizer"): ("lerning_rate", "learning_rate"),
    ("stages", 0, "schedule"): ("warm_up_steps", "warmup_steps"),
    ("stages", 0, "balance"): ("bias_updatespeed", "bias_update_speed"),
    ("stages", 0, "samples"): ("promts", "prompts"),
}


@pytest.mark.parametrize("place", MISSPELT, ids=lambda p: ".".join(map(str, p)) or "top")
def test_misspelt_key_names_the_nearest(place: tuple[Any, ...], table: dict[str, Any]) -> None:
    wrong, right = MISSPELT[place]
    section: Any = table
    for part in place:
        section = section.setdefault(part, {}) if isinstance(section, dict) else section[part]
    section[wrong] = 1
    key = ".".join(map(str, (*place, wrong)))
    assert f"{key} is not a key; did you mean {right!r}?" in refused(table)


def test_misspelt_model_key_names_the_nearest(table: dict[str, Any]) -> None:
    table["model"]["hiden_size"] = 24
    assert "[model] has no key 'hiden_size'; did you mean 'hidden_size'?" in refused(table)


def test_every_wrong_key_is_named_at_once(table: dict[str, Any]) -> None:
    table["sead"] = 1
    table["stages"][0]["stebs"] = 1
    table["stages"][0]["batch_size"] = 0
    message = refused(table)
    assert "sead" in message
    assert "stages.0.stebs" in message
    assert "stages.0.batch_size: Input should be greater than or equal to 1 (got 0)" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.pretrain.precison=fp8", "precison is not a key; did you mean 'precision'?"),
        ("stages.0.steps=abc", "steps: Input should be a valid integer"),
        ("stages.pretrain.steps=-4", "steps: Input should be greater than or equal to 1 (got -4)"),
        ("stages.pretrain.optimizer.learning_rate=nan", "should be greater than 0 (got nan)"),
        ('stages.pretrain.data.corpora=[{source="x", wait=1}]', "corpora.0.wait is not a key"),
        ("stages.pretrain.kind=wash", "kind: 'wash' is none of"),
        ("stages=[]", "at least 1 item"),
    ],
)
def test_a_set_that_is_wrong_is_one_line_in_the_words_typed(override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe("seconds", ["stages.pretrain.batch_size=32", override])
    [line] = str(error.value).splitlines()
    assert line.startswith(f"--set {override.split('=', maxsplit=1)[0]}")
    assert expected in line
    assert "seconds.toml" not in line


def test_what_a_set_and_the_file_cannot_be_together_names_both() -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe("seconds", ["stages.pretrain.batch_size=33"])
    head, line = str(error.value).splitlines()
    assert "seconds.toml with --set stages.pretrain.batch_size" in head
    assert line == "  stages.pretrain: batch_size must be a multiple of micro_batch_size"


def test_an_extension_that_is_too_short_is_not_told_to_extend() -> None:
    stage = {"extend": {"factor": 2}, "sequence_length": 500}
    message = refused(lives.recipe_table("tang-poems", **stage))
    assert "sequence_length 500 is over the model's max_position_embeddings 256" in message
    assert "raise the factor" in message
    assert "can make it longer" not in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "batch_size must be a multiple of micro"),
        ({"batch_size": 4, "micro_batch_size": 8}, "batch_size must be a multiple of micro"),
        ({"minutes": 1.0, "schedule": {"kind": "cosine"}}, "minutes needs the wsd schedule"),
        ({"steps": 0}, "stages.0.steps"),
        ({"precision": "float16"}, "stages.0.precision"),
        ({"data": {"corpora": []}}, "stages.0.data.corpora"),
        ({"optimizer": {"learning_rate": 0.0}}, "stages.0.optimizer.learning_rate"),
        ({"optimizer": {"momentum": 1.0}}, "stages.0.optimizer.momentum"),
    ],
)
def test_values_that_cannot_be(changes: dict[str, Any], expected: str) -> None:
    assert expected in refused(lives.recipe_table("tang-poems", **changes))


def test_two_stages_of_one_name(table: dict[str, Any]) -> None:
    table["stages"] *= 2
    assert "two stages share a name: pretrain, pretrain" in refused(table)


@pytest.mark.parametrize(
    "tokenizer", [{"kind": "path"}, {"kind": "bpe", "path": "x"}, {"vocab_size": 299}]
)
def test_tokenizers_that_cannot_be(tokenizer: dict[str, Any], table: dict[str, Any]) -> None:
    table["tokenizer"] = tokenizer
    assert "tokenizer" in refused(table)


def test_stated_vocabulary_must_be_the_tokenizers(table: dict[str, Any]) -> None:
    special = {"bos_token_id": 0, "eos_token_id": 1}
    recipe = parse_recipe(table)
    assert recipe.model_for(321, **special).vocab_size == 321
    table["model"]["vocab_size"] = 321
    recipe = parse_recipe(table)
    assert recipe.model_for(321, **special).vocab_size == 321
    with pytest.raises(RecipeError, match=r"vocab_size is 321, but the tokenizer has 322 tokens"):
        recipe.model_for(322, **special)


def test_vocabulary_mismatch_stops_a_run(corpus: Path, tmp_path: Path) -> None:
    recipe = lives.recipe_for(corpus, model={"vocab_size": 5000})
    with pytest.raises(RecipeError, match="vocab_size is 5000, but the tokenizer has"):
        lives.live(recipe, tmp_path / "run")
    assert lives.state_of(tmp_path / "run") == "failed"


# --set


@pytest.mark.parametrize("stage", ["pretrain", "0"])
def test_overrides_reach_a_stage_by_name_and_number(stage: str, file: Path) -> None:
    recipe = read_recipe(
        file,
        [
            f"stages.{stage}.steps=7",
            f"stages.{stage}.optimizer.learning_rate=1e-3",
            f"stages.{stage}.data.isolate_documents=false",
            f"stages.{stage}.samples.prompts=['a', 'b']",
            f"stages.{stage}.data.corpora.0.weight=2.5",
            "name=plain words",
            "model.rope_theta=500.0",
            "tokenizer.kind='bpe'",
        ],
    )
    [found] = recipe.stages
    assert (found.steps, found.optimizer.learning_rate) == (7, 1e-3)
    assert found.data.isolate_documents is False
    assert found.samples.prompts == ("a", "b")
    assert found.data.corpora[0].weight == 2.5
    assert (recipe.name, recipe.model["rope_theta"]) == ("plain words", 500.0)
    assert recipe.tokenizer.kind == "bpe"


def test_override_finds_a_stage_by_its_own_name(table: dict[str, Any], tmp_path: Path) -> None:
    first, second = lives.recipe_table("tang-poems")["stages"][0], table["stages"][0]
    table["stages"] = [first | {"name": "one"}, second | {"name": "two"}]
    file = lives.write_recipe(tmp_path / "two.toml", table)
    recipe = read_recipe(file, ["stages.two.steps=7"])
    assert [stage.steps for stage in recipe.stages] == [lives.STEPS, 7]
    assert recipe.stage("two").steps == 7
    with pytest.raises(RecipeError, match=r"no stage 'twoo'; did you mean 'two'\?; there are one"):
        recipe.stage("twoo")


def test_an_unnamed_stage_answers_to_its_default_name(tmp_path: Path) -> None:
    table = lives.recipe_table("tang-poems")
    del table["stages"][0]["kind"]
    file = lives.write_recipe(tmp_path / "tiny.toml", table)
    assert read_recipe(file, ["stages.pretrain.steps=7"]).stages[0].steps == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "expected KEY=VALUE"),
        ("stages.sft.steps=1", "there is no stage 'sft'"),
        ("stages.1.steps=1", "there is no stage '1'"),
        ("name.first=1", "'name' is not a section"),
        ("name.first.second=1", "'first' is not a section|'name' is not a section"),
        ("stages=1", "stages"),
        ("stages.0.samples.prompts.0.x=1", "stages.0.samples.prompts.0.x"),
        ("stages.0.stebs=1", r"stages.0.stebs is not a key; did you mean 'steps'\?"),
        ("stages.0.steps=many", r"stages.0.steps: .*integer.* \(got 'many'\)"),
        ("=1", " is not a key"),
    ],
)
def test_bad_overrides(override: str, expected: str, file: Path) -> None:
    with pytest.raises(RecipeError, match=expected):
        read_recipe(file, [override])


# Files


def test_unknown_recipe_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"did you mean 'seconds'\?.*built in are"):
        read_recipe("secnds")
    (tmp_path / "poems.toml").touch()
    with pytest.raises(RecipeError, match=r"did you mean 'poems\.toml'\?"):
        read_recipe("poem.toml")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"[a]\n[a]"])
def test_broken_toml_names_the_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"broken\.toml is not valid TOML"):
        read_recipe(file)


@pytest.mark.parametrize(
    "stage", [{}, {"minutes": 0.5, "optimizer": {"clip": float("inf")}}, {"mtp_weight": 1e-300}]
)
def test_resolved_recipe_reads_back_equal(stage: dict[str, Any], tmp_path: Path) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16}
    table = lives.recipe_table("tang-poems", model={"rope_scaling": yarn}, **stage)
    recipe = parse_recipe(table | {"languages": ["zh"], "description": '引 "号"\n\\'})
    with start_run(recipe, tmp_path / "run") as run:
        assert parse_recipe(run.recipe) == recipe
    # Every default is written out: the folder needs no later version's defaults.
    resolved = read_resolved(tmp_path / "run")
    assert resolved["stages"][0]["optimizer"]["beta2"] == 0.95
    assert resolved["seed"] == 1
    assert tomllib.loads(dump_toml(resolved)) == resolved


@pytest.mark.parametrize("name", recipes.built_in_recipes())
def test_resolved_built_in_recipes_read_back_equal(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name)
    with start_run(recipe, tmp_path / "run") as run:
        assert parse_recipe(run.recipe) == recipe
