"""Sampling one step ahead: by which weights, in which order, and through every kind of end.

The sampling processes are real ones, killed from outside.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qiusuo.runs.log import read_log
from qiusuo.training.recipe import RecipeError
from qiusuo.training.rl.ahead import Ahead
from qiusuo.training.rl.asking import Batch, packed, unpacked
from qiusuo.training.rl.reinforce import Reinforcement, resolved
from qiusuo.training.rl.rollouts import Group
from qiusuo.training.scene import TrainingError
from qiusuo.training.seeds import seed_of
from qiusuo.training.speaking import Speaker, weights_of
from qiusuo.training.stages import RlStage
from tests.training import dying_ahead, lives, tasks
from tests.training.tasks import Make

BROKEN = """
from qiusuo.tasks.parity import Parity

class Broken(Parity):
    name = "broken"

    def verify(self, problem, response):
        if problem.difficulty == 9:  # not when the task is looked at
            raise KeyError("a verdict nobody can give")
        return super().verify(problem, response)
"""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qiusuo.training.finish.write_report", lambda path: path)


@pytest.fixture
def ahead(trying: Make) -> Iterator[Make]:
    """Steps that sample ahead; their processes end with the test."""
    made: list[Reinforcement] = []

    def make(**changes: Any) -> Reinforcement:
        made.append(trying(lag=1, **changes))
        return made[-1]

    yield make
    for work in made:
        work.close()


def sampler(work: Reinforcement) -> subprocess.Popen[bytes]:
    """The process."""
    assert work.ahead is not None
    assert work.ahead.process is not None
    return work.ahead.process.popen


def words_of(groups: list[Group]) -> list[list[int]]:
    return [one.answer for group in groups for one in group.rollouts]


# What the recipe says


def loss_of(**changes: Any) -> Any:
    return resolved(RlStage.model_validate(tasks.rl(**changes))).loss


def test_answers_of_older_weights_are_weighted_by_default() -> None:
    assert loss_of().importance_cap is None
    assert loss_of(lag=1).importance_cap == 2.0
    assert loss_of(lag=1, loss={"importance_cap": 5.0}).importance_cap == 5.0
    with pytest.raises(RecipeError, match=r"lag = 1 ask.*not 0\.8: set it to 1, or leave"):
        loss_of(lag=1, temperature=0.8)


# By which weights


def run_and_watch(work: Reinforcement) -> tuple[list[dict[str, Tensor]], list[list[Group]]]:
    """The weights, adapter inside, before each step and after the last; and what was asked."""
    weights, asked = [], []
    pay = work.pay

    def watch() -> bool:
        weights.append(copy.deepcopy(weights_of(work.state.model, work.state.adapter)))
        return False

    def pay_and_keep(groups: list[Group]) -> Any:
        asked.append(groups)
        return pay(groups)

    work.pay = pay_and_keep  # type: ignore[method-assign,assignment]
    watch()
    work.run(watch)
    return weights, asked


@pytest.mark.parametrize("top", [{}, {"adapter": {"rank": 2}}], ids=["whole", "adapter"])
def test_a_step_learns_from_answers_of_the_weights_two_updates_ago(
    ahead: Make, top: dict[str, Any]
) -> None:
    fast = {"adamw_learning_rate": 0.02}
    work = ahead(top=top, same_groups="keep", steps=4, optimizer=fast)
    weights, asked = run_and_watch(work)
    assert len(asked) == 4
    # Another engine, on a model that gets the weights by hand.
    model = copy.deepcopy(work.state.model)
    for module in model.modules():
        module._forward_hooks.clear()  # the adapter's: its weights come merged
    speaker = Speaker(model, None, None, torch.float32, answers=12, max_tokens=64)
    end = work.scene.tokenizer.eos_id

    def said(step: int, updates: int) -> list[list[int]]:
        model.load_state_dict(weights[updates])
        with speaker.speaking() as lm:
            told = lm.generate(
                [group.rollouts[0].prompt for group in asked[step]],
                n=4,
                max_tokens=12,
                temperature=1.0,
                seed=seed_of(f"{work.seed}/{step}/0"),
                stop_ids=frozenset({end}),
            )
        return [one.token_ids for one in told]

    for step, groups in enumerate(asked):
        updates = max(0, step - 1)
        assert said(step, updates) == words_of(groups)
        assert {one.version for group in groups for one in group.rollouts} == {updates}
    assert said(3, 3) != words_of(asked[3])  # the weights do make a difference


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_first_batch_is_that_of_sampling_in_step(
    ahead: Make, trying: Make, precision: str
) -> None:
    """Refills, experts, verdicts and the questions' places included."""
    changes: dict[str, Any] = {"precision": precision, "group": 2, "max_tokens": 3}
    one, other = ahead(**changes), trying(**changes)
    found, expected = one.ask(), other.ask()
    assert expected.refills > 0
    lives.assert_equal(packed(found), packed(expected))
    assert one.questions.state_dict() == other.questions.state_dict()
    assert one.pay(found.groups)[0].tolist() == other.pay(expected.groups)[0].tolist()


def test_a_batch_survives_a_checkpoint(trying: Make, tmp_path: Path) -> None:
    work = trying()
    batch = work.ask()
    torch.save(packed(batch), tmp_path / "batch")
    plain = torch.load(tmp_path / "batch", weights_only=True)
    again = unpacked(plain, work.questions)
    for group, other in zip(batch.groups, again.groups, strict=True):
        assert group.question == other.question
        for one, same in zip(group.rollouts, other.rollouts, strict=True):
            lives.assert_equal(vars(one), vars(same))
    assert again.refills == batch.refills
    dense = Batch([tasks.group([1.0, 0.0])], 2)  # of a model without experts
    [group] = unpacked(packed(dense), work.questions).groups
    assert group.rollouts == dense.groups[0].rollouts


def test_the_curriculum_has_heard_all_batches_that_came(ahead: Make) -> None:
    """What is drawn for the next step knows how this one's groups did."""
    easy = {"start": 8, "rise": 0.01, "memory": 1, "width": 1}
    task = {"task": "parity", "difficulties": [8, 9, 10]}
    work = ahead(tasks=[task], curriculum=easy, same_groups="keep", steps=3)
    _, asked = run_and_watch(work)
    hardest = 8
    for groups in asked:
        assert {group.question.problem.difficulty for group in groups} == {hardest}
        hardest += any(group.passed > 0.01 for group in groups) and hardest < 10
    assert hardest > 8


# Ends


def test_half_of_the_threads_until_it_ends(ahead: Make) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        work = ahead()
        assert torch.get_num_threads() == 2  # whether or not there is anything left to sample
        work.ask()
        assert torch.get_num_threads() == 2
        pid = sampler(work).pid
        work.close()
        assert torch.get_num_threads() == 3
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        torch.set_num_threads(threads)


def test_its_errors_come_back_in_their_words(ahead: Make, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    work = ahead(tasks=[{"task": str(tmp_path / "broken.py"), "difficulties": [9]}])
    with pytest.raises(TrainingError, match="KeyError: 'a verdict nobody can give'") as caught:
        work.one_step()
    assert "broken.py" in caught.value.__notes__[0]


def test_signals_are_not_its_business_but_death_is_told(ahead: Make) -> None:
    work = ahead(steps=5)
    work.one_step()
    work.one_step()  # it listens by now
    process = sampler(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    work.one_step()
    assert os.getpgid(process.pid) != os.getpgid(0)  # where a terminal's Ctrl-C does not come
    process.kill()
    process.wait()
    with pytest.raises(TrainingError, match="ended by SIGKILL; if memory was short, lag = 0"):
        work.one_step()


# Going on


@pytest.fixture(scope="module")
def whole(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qiusuo.training.finish.write_report", lambda path: path)
        assert lives.live(dying_ahead.recipe_for(taught), run)
    return run


@pytest.fixture(scope="module")
def dead(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were killed, by the way."""
    folder = tmp_path_factory.mktemp("dead")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.dying_ahead", taught, folder],
        env=lives.environment(Path(os.environ["QIUSUO_HOME"])),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,  # a sampling process that outlives its parent would be waited for
    )
    assert done.returncode == 0, done.stderr
    ends = [line.split() for line in done.stdout.splitlines()]
    assert [words for words in ends if words[0] in dying_ahead.WAYS] == [
        [way, str(-signal.SIGKILL)] for way in dying_ahead.WAYS
    ]
    return folder


@pytest.mark.parametrize("way", dying_ahead.WAYS)
def test_killed_and_resumed(dead: Path, whole: Path, way: str) -> None:
    run = dead / way
    waiting = torch.load(lives.last_checkpoint(run) / "state.pt")["feed"]["ahead"]
    assert waiting["batch"]["groups"]  # what was under way when the checkpoint was written
    assert lives.go_on(run)
    lives.assert_same_life(run, whole)


def test_interrupted_and_resumed(whole: Path, taught: Path, tmp_path: Path) -> None:
    lives.live_until(dying_ahead.recipe_for(taught), tmp_path / "run", 3)
    assert lives.go_on(tmp_path / "run")
    lives.assert_same_life(tmp_path / "run", whole)


def test_who_is_faster_does_not_matter(
    whole: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run, each batch waited for before anything is learnt."""
    begin = Ahead.begin

    def begin_and_wait(self: Ahead, step: int, version: int) -> None:
        begin(self, step, version)
        self.wait()

    monkeypatch.setattr(Ahead, "begin", begin_and_wait)
    assert lives.live(dying_ahead.recipe_for(taught), tmp_path / "run")
    lives.assert_same_life(tmp_path / "run", whole)


def test_the_undisturbed_run_has_had_what_may_be_lost(whole: Path) -> None:
    tries = [r for r in read_log(whole / "log.jsonl") if r["kind"] == "rollout"]
    assert len(tries) == 7
    assert any(record["refills"] for record in tries)
    assert tries[-1]["kl"] > 0
    assert tries[0]["importance_weight"] == pytest.approx(1.0, abs=1e-5)
    assert abs(tries[3]["importance_weight"] - 1) > 1e-5
    assert torch.load(lives.last_checkpoint(whole) / "state.pt")["feed"]["ahead"] is None
