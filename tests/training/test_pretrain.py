"""One step is the whole batch's, however it is cut; the plan, the precisions and the stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qiusuo.engine.loading import load
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import read_log
from qiusuo.training import steps
from qiusuo.training.losses import language_model_losses, make_window
from qiusuo.training.pretrain import Pretraining
from qiusuo.training.recipe import RecipeError, parse_recipe
from qiusuo.training.scene import TrainingError
from qiusuo.training.stages import PretrainStage
from tests.training import lives


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports take longer to draw than these runs to train."""
    monkeypatch.setattr("qiusuo.training.finish.write_report", lambda path: path)


Make = Callable[..., Pretraining]


@pytest.fixture
def pretraining(corpus: Path, tmp_path: Path) -> Make:
    """Makes the steps of the tiny recipe with some keys changed, each in a folder of its own."""
    numbers = itertools.count()

    def make(**stage: Any) -> Pretraining:
        stage = {"precision": "float32", **stage}
        recipe = lives.recipe_for(corpus, model={"num_nextn_predict_layers": 2}, **stage)
        return Pretraining(lives.scene_of(recipe, tmp_path / f"made-{next(numbers)}"))

    return make


def gradients_of_one_step(training: Pretraining) -> tuple[Any, dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def keep(share: float) -> float:
        for name, parameter in training.state.model.named_parameters():
            found[name] = parameter.grad.clone()
        return 1.0

    training.apply_gradients = keep
    return training.one_step(), found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert float((found[name] - gradient).abs().max()) <= 1e-4 * scale, name


@pytest.mark.parametrize("isolate", [False, True], ids=["joined", "isolated"])
@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_add_up_to_the_batch(
    corpus: Path, pretraining: Make, size: int, isolate: bool
) -> None:
    data = {"corpora": [{"source": str(corpus)}], "isolate_documents": isolate}
    how = {"data": data, "balance": {"sequence_weight": 0.5}}
    whole = pretraining(**how, micro_batch_size=None)
    parts = pretraining(**how, micro_batch_size=size)
    one, expected = gradients_of_one_step(whole)
    many, found = gradients_of_one_step(parts)
    assert_close(found, expected)
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    assert many.more["mtp_loss"] == pytest.approx(one.more["mtp_loss"], rel=1e-5)
    assert many.more["balance_loss"] == pytest.approx(one.more["balance_loss"], rel=1e-5)
    assert many.tokens == one.tokens
    for layer, count_E in whole.load.counts.items():
        assert torch.equal(parts.load.counts[layer], count_E)


def test_a_step_minimises_the_papers_sum(pretraining: Make) -> None:
    """CE + λ/D · Σ CE_k + α · Σ balance, each mean over its own tokens."""
    training = pretraining(mtp_weight=0.7, balance={"sequence_weight": 0.2})
    batch = next(iter(pretraining().state.feed))
    result, found = gradients_of_one_step(training)
    model = training.state.model
    window = make_window(batch.tokens_BS, batch.documents_BS, batch.valid_BS, 2, True)
    counts = [int((labels != IGNORE).sum()) for labels in window.labels]
    assert len(set(counts)) == 3  # each depth has its own
    losses = language_model_losses(model, window)
    means = [loss / count for loss, count in zip(losses.mtp, counts[1:], strict=True)]
    total = losses.main / counts[0] + 0.7 * (means[0] + means[1]) / 2 + 0.2 * losses.balance
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(total, list(model.parameters()))
    assert_close(found, dict(zip(names, gradients, strict=True)))
    assert result.tokens == counts[0]
    assert result.loss == pytest.approx(losses.main.item() / counts[0], rel=1e-5)
    assert result.more["mtp_loss"] == pytest.approx(sum(means).item() / 2, rel=1e-5)


def test_gradients_are_clipped_and_the_norm_told_before(pretraining: Make) -> None:
    training = pretraining(optimizer={"clip": 0.5})
    seen: list[float] = []

    class Recorder:
        param_groups: ClassVar[list[dict[str, Any]]] = [{"peak_lr": 0.1, "lr": 0.0}]

        def step(self) -> None:
            grads = [p.grad for p in training.state.model.parameters()]
            seen.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    Recorder.param_groups[0]["params"] = list(training.state.model.parameters())
    training.state.optimizers = [Recorder()]
    for parameter in training.state.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    count = sum(p.numel() for p in training.state.model.parameters())
    assert training.apply_gradients(0.25) == pytest.approx(0.3 * count**0.5, rel=1e-4)
    assert seen == [pytest.approx(0.5, rel=1e-3)]
    assert Recorder.param_groups[0]["lr"] == pytest.approx(0.1 / 3)  # the first of three to warm up
    assert all(p.grad is None for p in training.state.model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_never_reach_the_weights(
    pretraining: Make, bad: float
) -> None:
    training = pretraining()
    before = {name: p.detach().clone() for name, p in training.state.model.named_parameters()}
    for parameter in training.state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.state.model.lm_head.weight.grad[0, 0] = bad
    with pytest.raises(TrainingError, match="not finite"):
        training.apply_gradients(1.0)
    for name, parameter in training.state.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_loss_that_is_not_finite_stops_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    lives.live_until(lives.recipe_for(corpus), run, 10)
    good = (lives.last_checkpoint(run) / "state.pt").read_bytes()
    one_step = Pretraining.one_step

    def poisoned(self: Pretraining) -> Any:
        if self.state.step == 11:
            self.state.model.lm_head.weight.data[3, 3] = float("nan")
        return one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "one_step", poisoned)
        with pytest.raises(TrainingError, match=r"step 12: loss is nan.*Lower the learning rate"):
            lives.go_on(run)
    assert lives.state_of(run) == "failed"
    assert "step 12" in RunFolder.open(run, lock=False).status()["error"]
    assert lives.last_checkpoint(run).name == "step-00000010"
    assert (lives.last_checkpoint(run) / "state.pt").read_bytes() == good
    assert lives.go_on(run)  # from step 10, without the poison
    assert lives.steps_done(run) == list(range(1, lives.STEPS + 1))


# The plan: minutes


def fake_clock(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every step takes ``seconds``."""
    now = [0.0]

    def tick() -> float:
        now[0] += seconds
        return now[0]

    patch.setattr(steps, "time", SimpleNamespace(perf_counter=tick))


def rates(run: Path) -> list[float]:
    return [r["lr"] for r in read_log(run / "log.jsonl") if r["kind"] == "step"]


def test_minutes_shorten_the_plan_and_the_rate_still_decays(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = lives.recipe_for(corpus, minutes=0.3)  # 18 steps of a second
    fake_clock(monkeypatch, 1.0)
    assert lives.live(recipe, tmp_path / "whole")
    assert lives.steps_done(tmp_path / "whole") == list(range(1, 19))
    steps = [r for r in read_log(tmp_path / "whole/log.jsonl") if r["kind"] == "step"]
    assert [record.get("minutes") for record in steps] == [0.3] * 10 + [None] * 8
    peak = recipe.stages[0].optimizer.learning_rate
    decay = 0.3 * 18
    expected = [peak * min(1.0, (18 - step) / decay) for step in range(10, 18)]
    assert rates(tmp_path / "whole")[10:] == pytest.approx(expected)
    assert lives.state_of(tmp_path / "whole") == "finished"
    status = RunFolder.open(tmp_path / "whole", lock=False).status()
    assert (status["step"], status["steps"]) == (18, 18)

    # Interrupted after the plan was made and resumed on a machine ten times as fast.
    lives.live_until(recipe, tmp_path / "again", 12)
    fake_clock(monkeypatch, 0.1)
    assert lives.go_on(tmp_path / "again")
    assert lives.steps_done(tmp_path / "again") == list(range(1, 19))
    assert rates(tmp_path / "again") == rates(tmp_path / "whole")


@pytest.mark.parametrize(
    ("minutes", "steps", "expected"),
    [(1000.0, 24, 24), (1e-6, 24, 11), (1e-6, 10, 10), (1e-6, 5, 5)],
    ids=["ample", "none", "ten-steps", "five-steps"],
)
def test_minutes_never_lengthen_the_plan(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: float,
    steps: int,
    expected: int,
) -> None:
    fake_clock(monkeypatch, 1.0)
    recipe = lives.recipe_for(corpus, minutes=minutes, steps=steps, validation_steps=0)
    assert lives.live(recipe, tmp_path / "run")
    assert lives.steps_done(tmp_path / "run")[-1] == expected


# Precisions, optimizers, shapes


@pytest.mark.parametrize(
    ("model", "stage"),
    [
        ({}, {"precision": "float32"}),
        ({}, {"precision": "bfloat16", "micro_batch_size": 2}),
        ({}, {"optimizer": {"kind": "adamw", "learning_rate": 0.01}}),
        ({"num_nextn_predict_layers": 0}, {"micro_batch_size": None}),
        ({"num_nextn_predict_layers": 3}, {"sequence_length": 3}),
        ({"n_routed_experts": 0}, {}),
        ({"tie_word_embeddings": True}, {"schedule": {"kind": "cosine", "warmup_steps": 2}}),
        (
            {"model_type": "deepseek_v2", "q_lora_rank": 0, "norm_topk_prob": False},
            {"samples": {"prompts": []}},
        ),
    ],
    ids=["float32", "bfloat16", "adamw", "no-mtp", "three-mtp", "dense", "tied-cosine", "v2"],
)
def test_every_kind_of_model_learns(
    corpus: Path,
    tmp_path: Path,
    model: dict[str, Any],
    stage: dict[str, Any],
) -> None:
    how = {"steps": 12, "validation_steps": 0, **stage}
    recipe = lives.recipe_for(corpus, model=model, **how)
    assert lives.live(recipe, tmp_path / "run")
    losses = [r["loss"] for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.1
    lm = load(tmp_path / "run")
    assert lm.logits([1, 2, 3]).isfinite().all()
    assert lm.config.tie_word_embeddings == model.get("tie_word_embeddings", False)


def test_precisions_agree_at_first(pretraining: Make) -> None:
    results = []
    for precision in ("float32", "bfloat16"):
        training = pretraining(precision=precision)
        assert training.dtype == getattr(torch, precision)
        results.append(training.one_step().loss)
    assert results[0] == pytest.approx(results[1], rel=5e-3)
    assert results[0] != results[1]


@pytest.mark.long
def test_compiled_steps_are_the_plain_ones(corpus: Path, tmp_path: Path) -> None:
    runs = tmp_path / "plain", tmp_path / "compiled"
    for run, compiled in zip(runs, (False, True), strict=True):
        recipe = lives.recipe_for(corpus, steps=6, compile=compiled, precision="float32")
        assert lives.live(recipe, run)
    plain, found = ([r["loss"] for r in read_log(run / "log.jsonl")] for run in runs)
    assert found == pytest.approx(plain, rel=1e-3)


# Stages


@pytest.fixture
def two_stages(corpus: Path) -> Any:
    table = lives.recipe_table(corpus, steps=6, validation_steps=3, checkpoint_steps=4)
    [first] = table["stages"]
    second = first | {"name": "second", "steps": 5, "sequence_length": 24}
    table["stages"] = [first, second]
    return parse_recipe(table)


def stages_of(run: Path) -> list[str]:
    return [r["stage"] for r in read_log(run / "log.jsonl") if r["kind"] == "step"]


@pytest.mark.parametrize("step", [2, 6, 7, 10])
def test_stages_follow_each_other_whatever_interrupts(
    two_stages: Any, tmp_path: Path, step: int
) -> None:
    names = ["pretrain"] * 6 + ["second"] * 5
    assert lives.live(two_stages, tmp_path / "whole")
    assert lives.steps_done(tmp_path / "whole") == list(range(1, 12))
    assert stages_of(tmp_path / "whole") == names
    with pytest.MonkeyPatch.context() as patch:
        lives.interrupt_at(patch, step)
        if not lives.live(two_stages, tmp_path / "again"):
            assert lives.state_of(tmp_path / "again") == "interrupted"
            patch.undo()
            assert lives.go_on(tmp_path / "again")
    assert stages_of(tmp_path / "again") == names
    lives.assert_same_life(tmp_path / "again", tmp_path / "whole")


def test_a_stage_waits_for_the_one_before(two_stages: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="stage second goes on from pretrain, which this run has"):
        lives.live(two_stages, tmp_path / "run", only_stage="second")
    with pytest.MonkeyPatch.context() as patch:
        lives.interrupt_at(patch, 2)
        assert not lives.live(two_stages, tmp_path / "run")
    with pytest.raises(RecipeError, match="leave --stage out, or live that one first"):
        lives.go_on(tmp_path / "run", only_stage="second")
    assert lives.state_of(tmp_path / "run") == "interrupted"


def test_stages_one_at_a_time(two_stages: Any, tmp_path: Path) -> None:
    assert isinstance(two_stages.stages[0], PretrainStage)
    assert lives.live(two_stages, tmp_path / "whole")
    assert lives.live(two_stages, tmp_path / "parts", only_stage="pretrain")
    assert stages_of(tmp_path / "parts") == ["pretrain"] * 6
    assert lives.go_on(tmp_path / "parts", only_stage="second")
    lives.assert_same_life(tmp_path / "parts", tmp_path / "whole")
