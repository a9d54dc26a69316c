"""DPO: the equations in plain torch, a whole step against them, pairs, and going on."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qiusuo.checkpoint.training_state import load_state
from qiusuo.data.errors import DataError
from qiusuo.data.preferences import read_preferences
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.transformer import Transformer
from qiusuo.runs.log import read_log
from qiusuo.tasks.registry import find_task
from qiusuo.training.dpo import Preferring
from qiusuo.training.pairs import PairOrder, Pairs
from qiusuo.training.preference import Answers, preference_loss
from qiusuo.training.recipe import RecipeError
from tests.training import lives, tasks

RIGHT = ["0110=", "1011=", "10=", "111="]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qiusuo.training.finish.write_report", lambda path: path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Short answers of different lengths, with thoughts and without."""
    lines = []
    for number, prompt in enumerate(RIGHT * 2):
        chosen: dict[str, Any] = {"role": "assistant", "content": "1" * (number % 3 + 1)}
        rejected = {"role": "assistant", "content": "0"}
        if number % 2:
            chosen["reasoning_content"] = "01" * number
        pair = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
        lines.append(json.dumps(pair | {"thinking": True}) + "\n")
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def dpo(file: Path | str, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "dpo",
        "steps": 6,
        "sources": [{"file": str(file)}],
        "batch_size": 3,
        "micro_batch_size": 2,
        "precision": "float32",
        "checkpoint_steps": 2,
        "schedule": {"warmup_steps": 0, "decay_fraction": 0.0},
        **changes,
    }


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("smoothing", "sft"), [(0.0, 0.0), (0.2, 0.0), (0.1, 0.5)])
def test_the_loss_is_the_papers(smoothing: float, sft: float) -> None:
    policy, reference = (-3.0, -7.0), (-4.0, -5.5)
    chosen = torch.tensor([policy[0]], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([policy[1]], dtype=torch.float64, requires_grad=True)
    fixed = [torch.tensor([x], dtype=torch.float64) for x in reference]
    found = preference_loss(
        Answers(chosen, fixed[0]),
        Answers(rejected, fixed[1]),
        torch.tensor([5]),
        beta=0.3,
        label_smoothing=smoothing,
        sft_weight=sft,
    )
    h = 0.3 * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    expected = -(1 - smoothing) * math.log(sigmoid(h)) - smoothing * math.log(sigmoid(-h))
    assert found.loss_P.item() == pytest.approx(expected - sft * policy[0] / 5)
    assert found.chosen_reward_P.item() == pytest.approx(0.3)
    assert found.rejected_reward_P.item() == pytest.approx(-0.45)
    found.loss_P.sum().backward()
    # Equation 7's gradient: both answers move by β σ(−h), here with the share of wrong labels.
    force = 0.3 * ((1 - smoothing) * sigmoid(-h) - smoothing * sigmoid(h))
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-force - sft / 5)
    assert rejected.grad.item() == pytest.approx(force)


# -- a step ---------------------------------------------------------------------------------------


def answer_logprob(model: Transformer, tokens: list[int], counted: list[bool]) -> Tensor:
    """One answer, alone, in plain torch."""
    logits_TW = model(torch.tensor([tokens[:-1]])).x_BTD[0] @ model.lm_head.weight.T
    picked = logits_TW.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return picked[torch.tensor(counted[1:])].sum()


def test_a_step_is_the_gradient_of_the_equation(file: Path, taught: Path, tmp_path: Path) -> None:
    options = {"label_smoothing": 0.1, "sft_weight": 0.2, "beta": 0.5}
    scene = lives.scene_of(tasks.recipe(dpo(file, **options), base=taught), tmp_path / "run")
    work = Preferring(scene)
    torch.manual_seed(0)
    work.reference_P2 = work.ask_reference()
    began = copy.deepcopy(scene.model)
    with torch.no_grad():  # away from the reference, so that there is something to tell
        for parameter in scene.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = copy.deepcopy(scene.model)
    order = PairOrder(work.pairs, work.order.seed)
    total = torch.zeros(())
    right = 0
    for number in order.take(3):
        pair = work.pairs.pair(number)
        h, nll = torch.zeros(()), torch.zeros(())
        for example, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            ours = answer_logprob(model, example.tokens, example.counted)
            with torch.no_grad():
                before = answer_logprob(began, example.tokens, example.counted)
            h = h + 0.5 * sign * (ours - before)
            if sign == 1:
                nll = -ours / sum(example.counted)
        right += int(h > 0)
        total = total - 0.9 * h.sigmoid().log() - 0.1 * (-h).sigmoid().log() + 0.2 * nll
    (total / 3).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found: dict[str, Tensor] = {}

    def keep(loss: float) -> float:
        named = scene.model.named_parameters()
        found.update({n: p.grad.clone() for n, p in named if p.grad is not None})
        return 1.0

    work.apply_gradients = keep  # type: ignore[method-assign]
    result = work.one_step()
    assert result.loss == pytest.approx(total.item() / 3, rel=1e-4)
    assert result.more["reward_accuracy"] == pytest.approx(right / 3)
    for name, grad in expected.items():
        assert torch.allclose(grad, found[name], atol=2e-5, rtol=1e-3), name


def test_it_begins_at_its_own_reference_and_learns(
    file: Path, taught: Path, tmp_path: Path
) -> None:
    recipe = tasks.recipe(
        dpo(file, steps=20, optimizer={"kind": "adamw", "adamw_learning_rate": 0.003}), base=taught
    )
    path = tmp_path / "run"
    assert lives.live(recipe, path)
    steps = [record for record in read_log(path / "log.jsonl") if record["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["reward_accuracy"] == 1.0
    assert steps[-1]["reward_margin"] > 0.5
    assert steps[-1]["loss"] < 0.5
    for step in steps:
        margin = step["reward_chosen"] - step["reward_rejected"]
        assert step["reward_margin"] == pytest.approx(margin, abs=1e-5)


def test_the_reference_is_what_the_stage_began_with(
    file: Path, taught: Path, tmp_path: Path
) -> None:
    recipe = tasks.recipe(dpo(file), base=taught, adapter={"rank": 2})
    scene = lives.scene_of(recipe, tmp_path / "run")
    with torch.no_grad():
        for parameter in scene.adapter.parameters():  # as an earlier stage left it
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator()))
    work = Preferring(scene)
    reference_P2 = work.ask_reference()
    for number in (0, 5):
        pair = work.pairs.pair(number)
        for side, example in enumerate(pair):
            with torch.no_grad():
                expected = answer_logprob(scene.model, example.tokens, example.counted)
            assert reference_P2[number, side].item() == pytest.approx(expected.item(), rel=1e-4)


# -- pairs ----------------------------------------------------------------------------------------


def test_every_pair_comes_once_an_epoch(file: Path) -> None:
    tokenizer = tasks.tokenizer()
    pairs = Pairs([read_preferences(file, tokenizer), read_preferences(file, tokenizer)])
    assert pairs.length == 16
    assert pairs.pair(8) == pairs.pair(0)
    order = PairOrder(pairs, 3)
    epochs = [order.take(16) for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(16))] * 2
    assert epochs[0] != epochs[1]
    order.take(5)
    other = PairOrder(pairs, 3)
    other.load_state_dict(order.state_dict())
    assert other.take(20) == order.take(20)


def test_it_goes_on_as_if_never_stopped(file: Path, taught: Path, tmp_path: Path) -> None:
    recipe = tasks.recipe(dpo(file, steps=7), base=taught)
    assert lives.live(recipe, tmp_path / "whole")
    lives.live_until(recipe, tmp_path / "stopped", 4)
    assert lives.go_on(tmp_path / "stopped")
    lives.assert_same_life(tmp_path / "whole", tmp_path / "stopped")


def test_other_pairs_are_refused(file: Path, taught: Path, tmp_path: Path) -> None:
    lives.live_until(tasks.recipe(dpo(file), base=taught), tmp_path / "run", 3)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(DataError, match="the pairs are others"):
        lives.go_on(tmp_path / "run")


def test_too_long_a_pair_is_refused(file: Path, taught: Path, tmp_path: Path) -> None:
    long = {"prompt": "1=", "chosen": "1" * 200, "rejected": "0"}
    file.write_text(json.dumps(long) + "\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="over the model's max_position_embeddings 128"):
        lives.live(tasks.recipe(dpo(file), base=taught), tmp_path / "run")


def test_pairs_of_a_sample_stage_are_right_and_wrong(taught: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    recipe = tasks.recipe(
        tasks.sample(pairs=True, keep=2, name="tried"),
        dpo("", sources=[{"pairs": "tried"}], steps=2),
        base=taught,
    )
    assert lives.live(recipe, path)
    task, tokenizer = find_task("parity"), Tokenizer.load(taught)
    lines = [json.loads(line) for line in (path / "traces/tried.jsonl").open(encoding="utf-8")]
    assert len(lines) >= 3
    for line in lines:
        bits = line["prompt"][-1]["content"].removesuffix("=")
        right = str(bits.count("1") % 2)
        [chosen], [rejected] = line["chosen"], line["rejected"]
        assert chosen["content"] == right
        assert rejected["content"] != right
    assert task.name == lines[0]["task"]
    pairs = read_preferences(path / "traces/tried.jsonl", tokenizer)
    assert pairs.length == len(lines)
    first = load_state(lives.last_checkpoint(path))["feed"]["reference"]
    assert first.shape == (len(lines), 2)
    assert (first < 0).all()


def test_a_stage_that_kept_no_pairs_is_told_of(taught: Path, tmp_path: Path) -> None:
    stages = tasks.sample(pairs=True), dpo("", sources=[{"pairs": "sample"}])
    recipe, run = tasks.recipe(*stages, base=taught), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qiusuo.training.sample.Sampling.lines", lambda self, group: [])
        with pytest.raises(RecipeError, match="stage sample kept no pairs"):
            lives.live(recipe, run)
