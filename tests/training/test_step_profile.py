"""Where a step's time goes: every part is there, and the arithmetic adds up."""

import pytest

from qiusuo.model.cost import measure
from qiusuo.training.recipe import RecipeError, read_recipe
from qiusuo.training.step_profile import profile_step
from tests.commands import Ask, asker

SMALL = [
    "stages.pretrain.batch_size=2",
    "stages.pretrain.micro_batch_size=2",
    "stages.pretrain.sequence_length=16",
]


def test_parts_and_their_arithmetic() -> None:
    recipe = read_recipe("seconds", SMALL)
    profile = profile_step(recipe, steps=2)
    names = [part.name for part in profile.parts]
    assert {"attention", "routed experts", "routers", "head and losses", "rest"} <= set(names)
    for part in profile.parts:
        if part.name != "clip and optimizer":
            assert min(part.forward, part.backward) > 0, part
    config = recipe.model_for(recipe.tokenizer.vocab_size)
    counted = measure(config).training_flops(16) * profile.tokens
    assert profile.tokens == 32
    assert sum(part.flops for part in profile.parts) == pytest.approx(counted, rel=0.02)


def test_a_dense_model_has_no_experts() -> None:
    model = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "vocab_size": 4096,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    changed = read_recipe("seconds", SMALL).model_copy(update={"model": model})
    profile = profile_step(changed, steps=1)
    counted = measure(changed.model_for(4096)).training_flops(16) * profile.tokens
    assert "routed experts" not in [part.name for part in profile.parts]
    assert sum(part.flops for part in profile.parts) == pytest.approx(counted, rel=0.02)


def test_steps_are_those_of_the_stage() -> None:
    """In its precision, with as many micro-batches as it has."""
    sets = ["stages.pretrain.batch_size=4", *SMALL[1:], "stages.pretrain.precision=fp8"]
    profile = profile_step(read_recipe("seconds", sets), steps=1)
    assert (profile.precision, profile.tokens) == ("fp8", 64)
    assert min(part.forward for part in profile.parts) > 0


def test_a_recipe_without_text_to_learn_is_refused() -> None:
    recipe = read_recipe("seconds")
    with pytest.raises(RecipeError, match="needs \\[model\\]"):
        profile_step(recipe.model_copy(update={"stages": ()}), steps=1)


ask = pytest.fixture(asker)


def test_command(ask: Ask) -> None:
    sets = [word for change in SMALL for word in ("--set", change)]
    answer = ask("bench", "train", "seconds", *sets, "--steps", "1")
    assert answer.code == 0, answer.err
    assert "attention" in answer.out
    assert "tokens/s" in answer.out
