"""What an answer is paid beside the verifier's word, and what guards remember."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from qiusuo.tasks.task import Problem
from qiusuo.training.rl.questions import Question, Questions
from qiusuo.training.rl.rewards import Rewards, language_share, well_formed
from qiusuo.training.rl.rollouts import Group
from qiusuo.training.stages import RlStage
from tests.training import tasks


def rewards(seed: int = 1, **changes: Any) -> Rewards:
    stage = RlStage.model_validate(tasks.rl(**changes))
    return Rewards(stage, Questions(stage.tasks, None, seed), seed)


def problem(**data: Any) -> Problem:
    return Problem("parity", "p", "q", 8, "k", data)


def test_by_itself_the_verifier_pays() -> None:
    assert rewards().of(tasks.group([1, 0, 0, 1]), 0) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("response", "finished", "expected"),
    [
        ("<think>01</think>1", True, 1.0),
        ("<think></think>1", True, 1.0),
        ("<think>01</think>1", False, 0.0),
        ("<think>01", True, 0.0),
        ("<think>01</think>", True, 0.0),
        ("<think>0</think>1</think>1", True, 0.0),
        ("<think>0<think>1</think>1", True, 0.0),
        ("1", True, 0.0),
    ],
)
def test_form(response: str, finished: bool, expected: float) -> None:
    one = tasks.rollout(0.0, response=response, finished=finished)
    assert well_formed(one) == expected
    paid = rewards(format_weight=0.25).of(Group(tasks.a_question(), [one, one]), 0)
    assert paid == [0.25 * expected] * 2


@pytest.mark.parametrize(
    ("response", "language", "expected"),
    [
        ("<think>我想 well</think>好", "zh", 0.75),
        ("我想好了", "zh", 1.0),
        ("我想好了", "en", 0.0),
        ("all is well", None, 1.0),
        ("all is 好", "en", 2 / 3),
        ("01 + 23", "zh", 1.0),
    ],
)
def test_language(response: str, language: str | None, expected: float) -> None:
    asked = problem(language=language) if language else problem()
    assert language_share(response, asked) == pytest.approx(expected)


def test_additions_are_added() -> None:
    group = tasks.group([1, 0], response="<think>yes</think>no")
    paid = rewards(format_weight=0.1, language_weight=0.2).of(group, 0)
    assert paid == pytest.approx([1.3, 0.3])


# Guards


def novel(rewards_: list[float]) -> Group:
    question = tasks.a_question()
    return tasks.group(rewards_, Question(question.problem, question.task, 0))


def guarded() -> Rewards:
    return rewards(tasks=[tasks.NOVEL], guard_weight=0.5)


def test_a_guard_pays_for_right_answers_in_their_order() -> None:
    """Each is judged after those before it; a wrong one is remembered, and paid nothing."""
    paid = guarded().of(novel([1, 0, 1, 0, 1]), 0)
    assert paid == pytest.approx([1 + 0.5, 0, 1 + 0.5 / 2, 0, 1 + 0.5 / 3])


def test_a_guard_remembers_over_groups_and_stops() -> None:
    first = guarded()
    first.of(novel([1, 0]), 0)
    second = guarded()
    second.load_state_dict(first.state_dict())
    assert second.of(novel([1, 1]), 1) == pytest.approx([1 + 0.5 / 2, 1 + 0.5 / 3])
    assert second.of(novel([1, 1]), 2) != guarded().of(novel([1, 1]), 2)


def test_a_guard_that_is_not_asked_for_is_not_there() -> None:
    assert rewards(tasks=[tasks.NOVEL]).guards == [None]
    assert rewards(tasks=[tasks.PARITY], guard_weight=0.5).guards == [None]  # it has none
    assert rewards(tasks=[tasks.PARITY]).state_dict() == {"guards": [None]}


# The lot


def test_the_lot_knows_nothing_of_the_answers() -> None:
    lot = rewards(random_reward=True, format_weight=0.5, guard_weight=0.5, tasks=[tasks.NOVEL])
    right, wrong = novel([1] * 8), novel([0] * 8)
    drawn = [lot.of(right, number) for number in range(100)]
    assert [lot.of(wrong, number) for number in range(100)] == drawn
    assert {value for row in drawn for value in row} == {0.0, 1.0}
    assert fmean(value for row in drawn for value in row) == pytest.approx(0.5, abs=0.05)
    assert drawn[0] != drawn[1]
    assert rewards(seed=2, random_reward=True).of(novel([1] * 8), 0) != drawn[0]
