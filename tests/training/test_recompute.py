"""Blocks that are run again in the backward pass: the same numbers, for less memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qiusuo.model.fp8 import in_fp8
from qiusuo.model.transformer import Transformer
from qiusuo.training.balance import ExpertLoad
from qiusuo.training.lora import LoRA
from qiusuo.training.losses import Losses, language_model_losses, make_window
from qiusuo.training.recipe import RecipeError
from tests.kernels.alive import Alive
from tests.model.shapes import FAMILIES, tiny_model
from tests.training import lives, tasks

MTP: dict[str, object] = {"num_nextn_predict_layers": 2}
MODELS = {
    name: changes if "model_type" in changes else changes | MTP
    for name, changes in FAMILIES.items()
}
every_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


pytestmark = pytest.mark.usefixtures("no_pictures")


def losses_of(model: Transformer, length: int = 24, rows: int = 2) -> Losses:
    depth = model.config.num_nextn_predict_layers
    tokens_BS = torch.randint(
        97, (rows, length + 1 + depth), generator=torch.Generator().manual_seed(2)
    )
    documents_BS = torch.arange(tokens_BS.shape[1]).expand(rows, -1) // 10
    valid_BS = torch.ones(tokens_BS.shape, dtype=torch.bool)
    return language_model_losses(model, make_window(tokens_BS, documents_BS, valid_BS, depth, True))


def total(losses: Losses) -> Tensor:
    return losses.main + sum(losses.mtp, torch.zeros(())) + 0.1 * losses.balance


def gradients(
    model: Transformer, recompute: bool, between: Any = lambda: None
) -> dict[str, Tensor]:
    """The loss, and every gradient; ``between`` is called between the two passes."""
    model.recompute = recompute
    model.zero_grad()
    loss = total(losses_of(model))
    between()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


# -- the same numbers --------------------------------------------------------------------------


@every_model
def test_losses_and_gradients_are_the_same_bits(changes: dict) -> None:
    model = tiny_model(**changes)
    lives.assert_equal(gradients(model, True), gradients(model, False))


@pytest.mark.parametrize("precision", ["bfloat16", "fp8", "fp8_ue8m0"])
def test_in_the_precision_of_the_first_pass(precision: str) -> None:
    """The backward pass runs outside of what says the precision."""
    model = tiny_model(**MTP)
    found = []
    for recompute in (True, False):
        model.recompute = recompute
        model.zero_grad()
        fp8 = precision if precision != "bfloat16" else None
        with torch.autocast("cpu", torch.bfloat16), in_fp8(model, fp8):
            loss = total(losses_of(model))
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    lives.assert_equal(*found)
    assert not any(getattr(module, "fp8", None) for module in model.modules())


def test_beside_an_adapter() -> None:
    """Nothing that enters the first block has a gradient there."""
    model = tiny_model(**MTP)
    adapter = LoRA(model, torch.Generator().manual_seed(0), rank=3, modules=("*.mlp.*",))
    found = []
    for recompute in (True, False):
        model.recompute = recompute
        for parameter in adapter.parameters():
            parameter.grad = None
        total(losses_of(model)).backward()
        found.append([p.grad.clone() for p in adapter.parameters()])
    lives.assert_equal(*found)


def test_experts_are_chosen_once() -> None:
    """The second pass takes the first one's, even where a router would choose others by now."""
    model = tiny_model(**MTP)

    def turn_round() -> None:
        for router in model.routers().values():
            router.e_score_correction_bias.neg_().mul_(100)

    expected = gradients(model, False)
    found = gradients(model, True, turn_round)
    lives.assert_equal(found, expected)
    assert not torch.equal(gradients(model, True)["loss"], expected["loss"])  # it would


def test_experts_are_counted_once() -> None:
    model = tiny_model(**MTP)
    model.recompute = True
    load = ExpertLoad(model)
    losses = losses_of(model)
    load.add(losses.routings)
    total(losses).backward()
    for count_E in load.counts.values():
        assert count_E.sum() == 2 * 24 * 3  # rows, tokens, experts of a token


def test_without_gradients_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qiusuo.model.transformer.recomputed", None)
    model = tiny_model()
    model.recompute = True
    with torch.no_grad():
        model(torch.arange(5)[None])
    with pytest.raises(TypeError):
        model(torch.arange(5)[None])


# -- less memory -----------------------------------------------------------------------------


def kept_bytes(length: int, layers: int, recompute: bool) -> int:
    """What is held between the forward pass and the backward pass."""
    model = tiny_model(num_hidden_layers=layers, max_position_embeddings=4096).train()
    model.recompute = recompute
    tokens_BT = torch.arange(length)[None] % 97
    with Alive() as alive:
        hidden = model(tokens_BT)
        gc.collect()
        kept = alive.bytes
    assert hidden.x_BTD.requires_grad
    return kept


def test_memory_grows_with_length_and_of_a_layer_by_its_input() -> None:
    short, long, longer = (kept_bytes(length, 3, True) for length in (128, 256, 512))
    assert longer - long == 2 * (long - short)  # linear, to the byte
    layer = (kept_bytes(256, 6, True) - long) / 3
    config = tiny_model().config
    chosen = 256 * (config.n_routed_experts * 4 + config.num_experts_per_tok * (8 + 4))
    # Its input, and its routing, which the balance loss reads; a graph of a few small numbers.
    states = 256 * config.hidden_size * 4
    assert states <= layer <= states + 3 * chosen
    plain = kept_bytes(512, 3, False), kept_bytes(512, 6, False)
    assert plain[0] > 8 * longer
    assert plain[1] - plain[0] > 30 * 3 * layer


# -- in a recipe -----------------------------------------------------------------------------


def test_a_run_is_the_same_run(corpus: Path, tmp_path: Path) -> None:
    for name, recompute in (("plain", False), ("again", True)):
        recipe = lives.recipe_for(corpus, steps=8, recompute=recompute)
        assert lives.live(recipe, tmp_path / name)
    lives.assert_same_life(tmp_path / "again", tmp_path / "plain")


def test_imitation_and_reinforcement_too(taught: Path, tmp_path: Path) -> None:
    stages = [tasks.sft(steps=3, micro_batch_size=2), tasks.rl(steps=2)]
    for name, recompute in (("plain", False), ("again", True)):
        recipe = tasks.recipe(*(stage | {"recompute": recompute} for stage in stages), base=taught)
        assert lives.live(recipe, tmp_path / name)
    lives.assert_same_life(tmp_path / "again", tmp_path / "plain")


def test_compiled_is_refused(corpus: Path) -> None:
    with pytest.raises(RecipeError, match="compile and recompute do not go together"):
        lives.recipe_for(corpus, recompute=True, compile=True)
