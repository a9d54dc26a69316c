"""The stage ``rl``: what is asked, what is learnt from, and when it ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from qiusuo.checkpoint.adapter_files import read_adapter
from qiusuo.checkpoint.load import load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.runs.log import read_log
from qiusuo.runs.rollouts import read_rollouts
from qiusuo.training.lora import LoRA
from qiusuo.training.recipe import RecipeError
from qiusuo.training.rl import asking
from qiusuo.training.rl.policy_presets import PRESETS
from qiusuo.training.rl.questions import Questions
from qiusuo.training.rl.reinforce import Reinforcement, resolved
from qiusuo.training.rl.rollouts import Group
from qiusuo.training.stages import RlStage
from qiusuo.training.state import weights
from tests.training import lives, tasks
from tests.training.tasks import Make

LORA: dict[str, Any] = {"adapter": {"rank": 2, "alpha": 4.0}}


pytestmark = pytest.mark.usefixtures("no_pictures")


def stage_of(**changes: Any) -> RlStage:
    return RlStage.model_validate(tasks.rl(**changes))


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_log(run / "log.jsonl") if record["kind"] == kind]


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_it_says(name: str) -> None:
    assert resolved(stage_of(preset=name, group=None)) == PRESETS[name]


def test_what_the_stage_says_goes_before_the_preset() -> None:
    said = {"group": 5, "scale": "batch", "same_groups": "keep", "overlong": "soft", "updates": 3}
    found = resolved(
        stage_of(preset="r1", reference_steps=7, loss={"kl": 0.5, "clip_high": 1.5}, **said)
    )
    said["group_size"] = said.pop("group")
    loss = dataclasses.replace(PRESETS["r1"].loss, kl=0.5, clip_high=1.5)
    expected = dataclasses.replace(PRESETS["r1"], **said, refresh_reference=7, loss=loss)
    assert found == expected
    assert found.loss.aggregation == "sequence"  # of R1 still


@pytest.mark.parametrize("key", ["importance_cap", "drop_beyond"])
def test_what_the_sampler_found_is_known_at_temperature_one(key: str) -> None:
    assert getattr(resolved(stage_of(loss={key: 2.0})).loss, key) == 2.0
    with pytest.raises(RecipeError, match=rf"loss\.{key} ask.*temperature 1, not 0\.5"):
        resolved(stage_of(loss={key: 2.0}, temperature=0.5))


# What is learnt from


def paid_of(work: Reinforcement, groups: list[Group]) -> tuple[list[list[float]], list[Any]]:
    work.questions.drawn += len(groups)
    pay = work.pay(groups)
    told = [[(one.advantage, one.counted) for one in group] for group in pay.paid]
    return pay.rewards_PG.tolist(), told


MIXED, RIGHT, WRONG = [1.0, 0.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4
ADVANTAGES = [(0.75, True), *[(-0.25, True)] * 3]


@pytest.mark.parametrize("same", ["keep", "drop", "refill"])
def test_groups_without_variance(trying: Make, same: str) -> None:
    work = trying(same_groups=same)
    rewards, told = paid_of(work, [tasks.group(r) for r in (RIGHT, MIXED, WRONG)])
    assert rewards == [RIGHT, MIXED, WRONG]  # what is told of the step is fair
    if same == "keep":
        nothing = [(0.0, True)] * 4
        assert told == [nothing, ADVANTAGES, nothing]
    else:
        assert told == [ADVANTAGES]


@pytest.mark.parametrize(
    ("most", "counts", "groups"), [(None, [3, 2, 1], 6), (4, [3, 1], 4), (2, [2], 2)]
)
def test_groups_are_refilled_up_to_a_limit(
    trying: Make,
    monkeypatch: pytest.MonkeyPatch,
    most: int | None,
    counts: list[int],
    groups: int,
) -> None:
    asked, seeds = [], []
    script = iter([RIGHT, MIXED, WRONG, MIXED, RIGHT, RIGHT])

    def scripted(lm: Any, asker: Any, questions: Any, **how: Any) -> list[Group]:
        asked.append(len(questions))
        seeds.append(how["seed"])
        return [tasks.group(next(script), question) for question in questions]

    monkeypatch.setattr(asking, "roll_out", scripted)
    work = trying(same_groups="refill", most_prompts=most)
    found, _ = work.ask()
    assert (asked, len(found)) == (counts, groups)
    assert len(set(seeds)) == len(seeds)  # the same words would come again
    asked_for = [group.question.problem.key for group in found]
    assert len(set(asked_for)) == len(asked_for)


def test_without_refilling_a_step_asks_once(
    trying: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scripted(lm: Any, asker: Any, questions: Any, **how: Any) -> list[Group]:
        return [tasks.group(RIGHT, question) for question in questions]

    monkeypatch.setattr(asking, "roll_out", scripted)
    for same in ("keep", "drop"):
        found, refills = trying(same_groups=same).ask()
        assert (len(found), refills) == (3, 0)


def cut_off() -> Group:
    """Four answers of 12, 9, 7 and 3 tokens; the first reached the limit. Two are right."""
    lengths, rewards = (12, 9, 7, 3), (0.0, 1.0, 1.0, 0.0)
    rollouts = [
        tasks.rollout(reward, tokens=length, finished=length < 12)
        for length, reward in zip(lengths, rewards, strict=True)
    ]
    return Group(tasks.a_question(), rollouts)


def test_answers_cut_off(trying: Make) -> None:
    rewards, [told] = paid_of(trying(overlong="reward"), [cut_off()])
    assert rewards == [[0, 1, 1, 0]]
    assert told == [(-0.5, True), (0.5, True), (0.5, True), (-0.5, True)]

    rewards, [told] = paid_of(trying(overlong="mask"), [cut_off()])
    assert rewards == [[0, 1, 1, 0]]
    assert told == [(-0.5, False), (0.5, True), (0.5, True), (-0.5, True)]

    rewards, [told] = paid_of(trying(overlong="soft", overlong_margin=5), [cut_off()])
    expected = [-1.0, 1 - 2 / 5, 1.0, 0.0]  # DAPO's eq. 13 with 12 tokens at most
    assert rewards[0] == pytest.approx(expected)
    mean = sum(expected) / 4
    assert [a for a, _ in told] == pytest.approx([reward - mean for reward in expected])
    assert all(counted for _, counted in told)

    rewards, _ = paid_of(trying(overlong="soft"), [cut_off()])  # the last fifth: two tokens
    assert rewards[0] == pytest.approx([-1.0, 1.0, 1.0, 0.0])


def test_positives_only(trying: Make) -> None:
    _, told = paid_of(trying(positives_only=True), [tasks.group(MIXED)])
    assert told == [[(0.75, True), *[(-0.25, False)] * 3]]


@pytest.mark.parametrize(
    "changes",
    [
        {"same_groups": "drop", "positives_only": False},
        {"same_groups": "keep", "positives_only": True},
    ],
)
def test_a_step_that_teaches_nothing_moves_nothing(
    trying: Make,
    changes: dict[str, Any],
) -> None:
    """Not by Adam's momentum or weight decay either."""
    work = trying(optimizer={"weight_decay": 0.5}, **changes)
    work.one_step()
    before = {name: value.clone() for name, value in work.state.model.state_dict().items()}
    result, measures, _ = work.learn(work.pay([tasks.group(RIGHT)]).paid)
    assert (result.loss, result.grad_norm, result.tokens, measures) == (0.0, 0.0, 0, None)
    for name, value in work.state.model.state_dict().items():
        assert torch.equal(value, before[name]), name


# Whole runs


@pytest.fixture(scope="module")
def lived(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "rl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qiusuo.training.finish.write_report", lambda path: path)
        assert lives.live(
            tasks.recipe(tasks.rl(temperature=1.0, kept_rollouts=5), base=taught), run
        )
    return run


def test_on_policy_in_float32_engine_and_trainer_agree(lived: Path) -> None:
    tries = of_kind(lived, "rollout")
    assert len(tries) == 4
    for record in tries:
        assert 0 < record["mismatch_max"] < 1e-4
        assert abs(record["mismatch_kl"]) < 1e-6
        assert record["clip_share"] == 0
        assert record["importance_weight"] == 1


def test_the_log_tells_what_was_tried(lived: Path) -> None:
    steps = of_kind(lived, "step")
    tries = of_kind(lived, "rollout")
    assert [r["step"] for r in tries] == [r["step"] for r in steps] == [1, 2, 3, 4]
    for record in tries:
        assert record["stage"] == "rl"
        assert record["k"] == 4
        assert 0 <= record["pass_at_1"] <= record["pass_at_k"] <= 1
        assert list(record["by_task"]) == ["parity/8"]
        assert record["by_task"]["parity/8"] == pytest.approx(record["pass_at_1"])
        assert record["reward"] == pytest.approx(record["pass_at_1"])
        assert 0 < record["entropy"] < 4
        assert 1 <= record["length"] <= 12
        assert record["rollout_seconds"] > 0
        assert record["update_seconds"] > 0
    for record in steps:
        assert {"loss", "grad_norm", "lr", "tokens", "seconds", "max_violation"} <= record.keys()


def test_some_rollouts_are_kept_to_be_read(lived: Path) -> None:
    kept = read_rollouts(lived / "rollouts.jsonl").rollouts
    assert [one["step"] for one in kept] == [step for step in (1, 2, 3, 4) for _ in range(5)]
    for one in kept:
        assert (one["task"], one["difficulty"], one["stage"]) == ("parity", 8, "rl")
        assert one["version"] == one["step"] - 1  # the weights before the step
        assert one["prompt"].endswith("=")
        assert one["response"].startswith("<think>")
        assert one["reward"] in (0, 1)
        assert (one["reason"] == "right") == (one["reward"] == 1) == one["right"]
    for step in (1, 2, 3, 4):  # in turn while there are both
        right = sum(one["right"] for one in kept if one["step"] == step)
        [rate] = [r["pass_at_1"] for r in of_kind(lived, "rollout") if r["step"] == step]
        assert min(2, round(12 * rate)) <= right <= max(3, 5 - round(12 * (1 - rate)))
    assert len({one["prompt"] for one in kept if one["step"] == 1}) > 1  # not of one group alone


def test_what_is_told_is_what_was_paid_and_asked(
    trying: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more paid than the verifier's reward: answers all right, one of them cut off."""
    stage = {"overlong": "soft", "overlong_margin": 5, "prompts": 1, "temperature": 0.5}
    work = trying(top={"ask": {"text": "question"}}, same_groups="keep", **stage)

    def scripted(lm: Any, asker: Any, questions: Any, **how: Any) -> list[Group]:
        rollouts = [tasks.rollout(1.0, tokens=length, finished=length < 12) for length in (3, 12)]
        return [Group(question, rollouts * 2) for question in questions]

    monkeypatch.setattr(asking, "roll_out", scripted)
    work.one_step()
    [told] = [r for r in work.record.__self__ if r["kind"] == "rollout"]
    assert told["pass_at_1"] == 1
    assert told["zero_variance_share"] == 0
    assert told["reward"] == 0.5
    assert not told.keys() & {"mismatch_kl", "mismatch_max", "importance_weight"}
    work.close()
    kept = read_rollouts(work.scene.run.path / "rollouts.jsonl").rollouts
    assert [(one["reward"], one["right"]) for one in kept] == [(1, True), (0, True)] * 2
    problem = Questions(work.stage.tasks, None, work.seed).take(1)[0].problem
    assert problem.question != problem.prompt
    assert {one["prompt"] for one in kept} == {problem.question}


def test_a_stage_that_has_reached_its_goal_ends(taught: Path, tmp_path: Path) -> None:
    reached = tasks.recipe(tasks.rl(steps=14, stop_above=0.2, prompts=2), base=taught)
    assert lives.live(reached, tmp_path / "run")
    assert lives.steps_done(tmp_path / "run") == list(range(1, 11))  # the first ten, and no more
    assert lives.state_of(tmp_path / "run") == "finished"
    never = tasks.recipe(tasks.rl(steps=12, stop_above=1.0, prompts=1), base=taught)
    assert lives.live(never, tmp_path / "other")
    assert len(lives.steps_done(tmp_path / "other")) == 12


def test_rewards_teach(taught: Path, tmp_path: Path) -> None:
    """Short answers are right as often as long ones, but only they are finished in time: soon
    nearly all are."""
    stage = tasks.rl(
        steps=20, prompts=8, max_tokens=4, overlong="reward",
        optimizer={"adamw_learning_rate": 3e-3},
    )  # fmt: skip
    assert lives.live(tasks.recipe(stage, base=taught), tmp_path / "run")
    cut = [record["overlong_share"] for record in of_kind(tmp_path / "run", "rollout")]
    assert sum(cut[:2]) / 2 > 0.2
    assert sum(cut[-6:]) / 6 < 0.1


# An adapter


@pytest.fixture
def worn(taught: Path, tmp_path: Path) -> Path:
    recipe = tasks.recipe(
        tasks.rl(optimizer={"adamw_learning_rate": 0.01}, loss={"kl": 0.01}), base=taught, **LORA
    )
    assert lives.live(recipe, tmp_path / "run")
    return tmp_path / "run"


def test_only_the_adapter_learns(taught: Path, trying: Make) -> None:
    work = trying(top=LORA, loss={"kl": 0.01}, optimizer={"adamw_learning_rate": 0.01})
    adapter = work.state.adapter
    assert adapter is not None
    before = {name: value.clone() for name, value in work.state.model.state_dict().items()}
    matrices = {name: value.clone() for name, value in adapter.state_dict().items()}
    assert {id(p) for p in work.state.trained()} == {id(p) for p in adapter.parameters()}
    work.run(lambda: False)
    for name, value in work.state.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    ahead = ".layers.2."  # the module of multi-token prediction has no part in this
    for name, value in adapter.state_dict().items():
        assert torch.equal(value, matrices[name]) == (ahead in name), name
    assert weights(work.state.model, adapter).keys() == {"adapter"}  # of a checkpoint


def test_engine_and_trainer_agree_beside_an_adapter(worn: Path) -> None:
    for record in of_kind(worn, "rollout"):
        assert record["mismatch_max"] < 1e-4


def test_a_finished_model_has_the_adapter_inside(taught: Path, worn: Path) -> None:
    base = load_model(open_checkpoint(taught), dtype=torch.float32)
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    adapter = LoRA(base, torch.Generator().manual_seed(1), rank=2, alpha=4.0)
    adapter.load_state_dict(torch.load(lives.last_checkpoint(worn) / "state.pt")["adapter"])
    beside = load_model(open_checkpoint(taught), dtype=torch.float32)
    stored = LoRA.load(beside, worn / "adapter").state_dict()
    for name, matrix in adapter.state_dict().items():
        assert torch.equal(stored[name], matrix), name
    assert read_adapter(worn / "adapter").base == str(taught)
    expected = plain | adapter.merged_weights()
    assert any(not torch.equal(expected[name], plain[name]) for name in plain)
    found = load_model(open_checkpoint(worn / "model"), dtype=torch.float32).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_adapter_goes_on_after_a_stop(taught: Path, tmp_path: Path, precision: str) -> None:
    """In bfloat16 the engine has a model of its own, which must not wear the adapter twice."""
    stage = tasks.rl(
        precision=precision,
        optimizer={"adamw_learning_rate": 0.01},
        samples={"prompts": ["01"], "max_tokens": 4},
    )
    recipe = tasks.recipe(stage, base=taught, **LORA)
    assert lives.live(recipe, tmp_path / "whole")
    lives.live_until(recipe, tmp_path / "again", 3)
    assert lives.go_on(tmp_path / "again")
    lives.assert_same_life(tmp_path / "again", tmp_path / "whole")
    for record in of_kind(tmp_path / "whole", "rollout"):
        assert record["mismatch_max"] < (1e-4 if precision == "float32" else 0.2)
