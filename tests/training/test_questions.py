"""Which problems come next: the same wherever a run stopped, and harder as the policy gets on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from qiusuo.tasks.task import split_of
from qiusuo.training.rl.questions import Question, Questions
from qiusuo.training.sections import TaskEntry
from qiusuo.training.stages import CurriculumSection
from tests.training import tasks

LADDER = TaskEntry(task="parity", difficulties=(8, 9, 10, 12))
CHAINS = TaskEntry(task="chains", difficulties=(3,), weight=3.0)


def questions(*entries: TaskEntry, seed: int = 1, **curriculum: Any) -> Questions:
    section = CurriculumSection(**curriculum) if curriculum else None
    return Questions(entries or (LADDER,), section, seed)


def keys(asked: list[Question]) -> list[tuple[str, int]]:
    return [(question.problem.key, question.entry) for question in asked]


def test_a_seed_names_its_problems() -> None:
    first = keys(questions(LADDER, CHAINS).take(40))
    assert keys(questions(LADDER, CHAINS).take(40)) == first
    assert keys(questions(LADDER, CHAINS, seed=2).take(40)) != first
    in_parts = questions(LADDER, CHAINS)
    assert keys([*in_parts.take(7), *in_parts.take(33)]) == first
    assert len(set(first)) > 35  # not one and the same


def test_entries_of_one_task_have_problems_of_their_own() -> None:
    twice = questions(CHAINS, CHAINS).take(60)
    streams = [[q.problem.key for q in twice if q.entry == entry] for entry in (0, 1)]
    assert streams[0][:10] != streams[1][:10]
    alone = [question.problem.key for question in questions(CHAINS).take(len(streams[0]))]
    assert streams[0] == alone  # the first entry's are what they are by itself
    both = questions(LADDER, LADDER, CHAINS, start=9)
    assert both.hardest() == {"parity_1": 9, "parity_2": 9, "chains": 3}
    assert [both.mark(number) for number in range(3)] == ["_1", "_2", ""]


def test_only_training_problems_are_asked() -> None:
    assert {split_of(q.problem.key) for q in questions(LADDER, CHAINS).take(200)} == {"train"}


def test_entries_come_by_weight_and_difficulties_evenly() -> None:
    asked = questions(LADDER, CHAINS).take(800)
    entries = Counter(question.entry for question in asked)
    assert entries[1] / 800 == pytest.approx(0.75, abs=0.05)
    hard = Counter(q.problem.difficulty for q in asked if q.entry == 0)
    assert set(hard) == set(LADDER.difficulties)
    assert max(hard.values()) < 1.7 * min(hard.values())
    for question in asked[:20]:
        assert question.task.name == question.problem.task


@pytest.mark.parametrize("place", [0, 1, 13])
def test_a_saved_place_goes_on(place: int) -> None:
    how = {"start": 8, "rise": 0.5, "memory": 2}
    whole, resumed = questions(LADDER, CHAINS, **how), questions(LADDER, CHAINS, **how)
    for question in whole.take(place):
        whole.heard(question, 1.0)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(20):
        [one], [other] = whole.take(1), resumed.take(1)
        assert keys([one]) == keys([other])
        whole.heard(one, 0.8)
        resumed.heard(other, 0.8)
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.hardest() == whole.hardest()


def test_without_a_curriculum_nothing_is_heard() -> None:
    plain = questions()
    before = plain.difficulties(0)
    plain.heard(tasks.a_question(12), 1.0)
    assert plain.difficulties(0) == before == LADDER.difficulties
    assert plain.hardest() == {}


@pytest.mark.parametrize(
    ("start", "width", "expected"),
    [
        (8, 3, (8,)),
        (9, 3, (8, 9)),
        (10, 3, (8, 9, 10, 10)),
        (12, 2, (10, 12)),
        (12, 3, (9, 10, 12, 12)),
        (12, 1, (12,)),
        (11, 3, (8, 9, 10, 10)),  # there is no 11
        (64, 2, (10, 12)),
        (2, 3, (8,)),  # below all of them
    ],
)
def test_half_of_the_problems_are_the_hardest(
    start: int, width: int, expected: tuple[int, ...]
) -> None:
    """And the others are the ``width - 1`` below, evenly."""
    assert questions(start=start, width=width).difficulties(0) == expected
    found = Counter(q.problem.difficulty for q in questions(start=start, width=width).take(60))
    assert set(found) == set(expected)


def test_the_curriculum_rises_where_the_hardest_are_solved() -> None:
    ladder = questions(start=8, rise=0.7, memory=4)
    rate, heard = 0.0, 0
    while ladder.hardest() == {"parity": 8}:
        ladder.heard(tasks.a_question(8), 0.9)
        rate += (0.9 - rate) / 4
        heard += 1
    assert rate > 0.7
    assert heard == 6  # 0.9 · (1 − 0.75⁶) is the first above 0.7
    assert ladder.hardest() == {"parity": 9}
    for _ in range(50):
        ladder.heard(tasks.a_question(8), 1.0)  # solved before: says nothing of 9
        ladder.heard(tasks.a_question(9), 0.6)  # not enough
    assert ladder.hardest() == {"parity": 9}
    for _ in range(200):
        for difficulty in (9, 10, 12):
            ladder.heard(tasks.a_question(difficulty), 1.0)
    assert ladder.hardest() == {"parity": 12}  # and there it ends


def test_every_entry_has_a_curriculum_of_its_own() -> None:
    other = TaskEntry(task="chains", difficulties=(2, 3, 4))
    both = questions(LADDER, other, start=8, rise=0.5, memory=1)
    assert both.hardest() == {"parity": 8, "chains": 4}
    both.heard(tasks.a_question(8, entry=0), 1.0)
    assert both.hardest() == {"parity": 9, "chains": 4}
