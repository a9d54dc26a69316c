"""Stages in FP8: what is rounded and what is not, on whole lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qiusuo.engine.loading import load
from qiusuo.kernels import fp8, fp8_experts
from qiusuo.model.layers import Linear
from qiusuo.model.moe import Experts
from qiusuo.runs.log import read_log
from qiusuo.training.pretrain import Pretraining
from qiusuo.training.recipe import RecipeError
from qiusuo.training.sft import Finetuning
from tests.training import lives, tasks

BOTH = ("fp8", "fp8_ue8m0")
both = pytest.mark.parametrize("precision", BOTH)


pytestmark = pytest.mark.usefixtures("no_pictures")


def losses(path: Path) -> list[float]:
    return [r["loss"] for r in read_log(path / "log.jsonl") if r["kind"] == "step"]


def one_step(corpus: Path, path: Path, **stage: Any) -> tuple[Pretraining, float]:
    training = Pretraining(lives.scene_of(lives.recipe_for(corpus, **stage), path))
    return training, training.one_step().loss


def test_a_step_is_near_bfloat16_s_and_another(corpus: Path, tmp_path: Path) -> None:
    found = {
        precision: one_step(corpus, tmp_path / precision, precision=precision)
        for precision in ("bfloat16", *BOTH)
    }
    reference = found["bfloat16"][1]
    for precision in BOTH:
        training, loss = found[precision]
        assert loss == pytest.approx(reference, rel=5e-3)
        assert loss != reference
        assert training.dtype is torch.bfloat16
    assert found["fp8"][1] != found["fp8_ue8m0"][1]


@both
def test_it_learns_and_goes_on_after_a_stop_as_if_nothing_had_been(
    corpus: Path, tmp_path: Path, precision: str
) -> None:
    recipe = lives.recipe_for(corpus, steps=9, checkpoint_steps=5, precision=precision)
    assert lives.live(recipe, tmp_path / "whole")
    found = losses(tmp_path / "whole")
    assert found[-1] < found[0] - 0.1
    lives.live_until(recipe, tmp_path / "again", 7)
    assert lives.go_on(tmp_path / "again")
    lives.assert_same_life(tmp_path / "again", tmp_path / "whole")
    assert load(tmp_path / "whole").logits([1, 2, 3]).isfinite().all()


class Rounded:
    """The tensors that are rounded: where they stand in memory, and their shapes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: set[int] = set()
        self.shapes: list[tuple[int, ...]] = []
        quantize = fp8.quantize

        def watched(x_NC: Tensor, *how: Any) -> fp8.Quantized:
            self.places.add(x_NC.data_ptr())
            self.shapes.append(tuple(x_NC.shape))
            return quantize(x_NC, *how)

        monkeypatch.setattr(fp8, "quantize", watched)
        monkeypatch.setattr(fp8_experts, "quantize", watched)


def test_head_embedding_router_and_eh_proj_are_not_rounded(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Rounded(monkeypatch)
    training, _ = one_step(corpus, tmp_path / "run", precision="fp8")
    for name, weight in training.state.model.named_parameters():
        kept = ("lm_head", "embed_tokens", "gate.weight", "eh_proj", "norm.weight")
        places = {one.data_ptr() for one in weight} if weight.ndim == 3 else {weight.data_ptr()}
        assert bool(places & seen.places) != name.removesuffix(".weight").endswith(
            tuple(part.removesuffix(".weight") for part in kept)
        ), name


def test_validation_is_in_fp8_and_what_the_model_writes_is_not(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, _ = one_step(corpus, tmp_path / "run", precision="fp8")
    seen = Rounded(monkeypatch)
    assert list(training.look(whole=False))
    assert seen.shapes
    seen.shapes.clear()
    model = training.state.model
    assert not any(m.fp8 for m in model.modules() if isinstance(m, Linear | Experts))
    model(torch.arange(5)[None])
    assert not seen.shapes


def test_sft_and_lora_in_fp8(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an adapter the frozen weights are rounded, the adapter is not, and only it learns."""
    stage = tasks.sft(precision="fp8", steps=3)
    recipe = tasks.recipe(stage, base=taught, adapter={"kind": "lora", "rank": 3})
    work = Finetuning(lives.scene_of(recipe, tmp_path / "run"))
    seen = Rounded(monkeypatch)
    before = {name: p.clone() for name, p in work.state.model.named_parameters()}
    found = [work.one_step().loss for _ in range(3)]
    assert all(p.isfinite().all() for p in work.state.trained())
    assert seen.shapes
    assert all(3 not in shape for shape in seen.shapes)
    for name, parameter in work.state.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert any(p.any() for layer in work.state.adapter.layers.values() for p in [layer.b_OR])
    assert len(found) == 3


def test_compiled_is_refused(corpus: Path) -> None:
    with pytest.raises(RecipeError, match="compile works in bfloat16 and float32"):
        lives.recipe_for(corpus, precision="fp8", compile=True)
    with pytest.raises(RecipeError, match=r"precision: Input should be .*'fp8'"):
        lives.recipe_for(corpus, precision="fp4")
