"""Scores of answerers whose competence is known to the answer."""

import random

import pytest

from qiusuo.evaluation.answers import EvaluationError, Reply
from qiusuo.evaluation.evaluate import evaluate, held_out
from qiusuo.evaluation.statistics import wilson
from qiusuo.tasks.chains import Chains
from qiusuo.tasks.parity import Parity
from qiusuo.tasks.task import TaskError, split_of
from tests.evaluation.models import Scripted

TASK = Chains()


def solution(problem, thought=True):
    return TASK.solution(problem, random.Random(problem.key), thought=thought)


def test_rates_are_those_of_the_answers():
    """Two problems of three are solved greedily; of four samples as many are right as the place of
    the problem says."""
    order = {}

    def answer(problem, sample):
        place = order.setdefault(problem.key, len(order))
        right = place % 3 != 0 if sample < 0 else sample < place % 5
        return solution(problem) if right else "<think></think>0"

    [score] = evaluate(Scripted(answer), TASK, [3], count=30, samples=4)
    assert (score.task, score.difficulty, score.problems) == ("chains", 3, 30)
    assert score.greedy.rates["accuracy"] == wilson(20, 30)
    assert score.greedy.reasons == {"right": 20, "wrong answer": 10}
    assert [one["response"] for one in score.wrong] == ["<think></think>0"] * 3
    assert score.wrong[0]["prompt"] == next(iter(held_out(TASK, [3], 30, 0)[3])).prompt
    # As many right as 0..4 of 4; at least one of 4 for all but the zeros.
    assert score.sampled.rates["pass@1"].value == pytest.approx(0.5)
    assert score.sampled.rates["pass@4"].value == pytest.approx(0.8)
    for rate in score.sampled.rates.values():
        assert rate.low < rate.value < rate.high
    assert score.sampled.count == 120
    assert score.sampled.reasons == {"right": 60, "wrong answer": 60}


def test_measures_are_means_over_the_answers_that_have_them():
    def answer(problem, sample):
        if sample == 0:
            return "no mark at all"
        return solution(problem, thought=sample != 1)

    [score] = evaluate(Scripted(answer), TASK, [2], count=10, samples=3)
    sampled = score.sampled
    assert sampled.measures == {"thought": 0.5, "trace_valid": 1.0}
    assert sampled.measured == {"thought": 20, "trace_valid": 10}
    assert sampled.reasons == {"right": 20, "the thought is not closed": 10}


def test_lengths_cuts_and_failures_are_counted():
    def answer(problem, sample):
        if sample == 0:
            return Reply("<think>", 50, "length")
        if sample == 1:
            return Reply("", 0, "error", "logits are not numbers")
        return Reply(solution(problem), None, "stop")

    [score] = evaluate(Scripted(answer), TASK, [2], count=4, samples=3)
    assert score.greedy.length is None
    assert score.sampled.length == 25
    assert score.sampled.tokens == 200
    assert score.sampled.cut == pytest.approx(1 / 3)
    assert score.sampled.reasons["no reply: logits are not numbers"] == 4


def test_difficulties_share_the_count_and_are_summed_up():
    right = Scripted(lambda problem, _: solution(problem) if problem.difficulty < 4 else "")
    *each, together = evaluate(right, TASK, [4, 2, 3], count=20, samples=0)
    assert [(one.difficulty, one.problems) for one in each] == [(2, 7), (3, 7), (4, 6)]
    assert together.difficulty is None
    assert together.problems == 20
    assert together.greedy.rates["accuracy"] == wilson(14, 20)
    assert together.sampled is None
    assert together.record()["sampled"] is None
    assert {call["temperature"] for call in right.calls} == {0.0}


def test_scores_come_as_they_are_made():
    asked = Scripted(lambda problem, _: solution(problem))
    scores = evaluate(asked, TASK, [2, 3], count=4, samples=2)
    assert next(scores).difficulty == 2
    assert len(asked.calls) == 2  # greedily and by samples, of the first difficulty alone


def test_problems_are_held_out_distinct_and_repeatable():
    chosen = held_out(TASK, [2, 5], 100, seed=1)
    keys = [problem.key for part in chosen.values() for problem in part]
    assert len(keys) == len(set(keys)) == 100
    assert {split_of(key) for key in keys} == {"test"}
    assert held_out(TASK, [2, 5], 100, seed=1) == chosen
    assert held_out(TASK, [2, 5], 100, seed=2) != chosen


def test_a_small_split_gives_what_it_has():
    every = [f"parity:{bits:08b}" for bits in range(256)]
    in_test = [key for key in every if split_of(key) == "test"]
    [found] = held_out(Parity(), [8], 500, seed=0).values()
    assert sorted(problem.key for problem in found) == in_test


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"samples": -1}, "samples must be in 0"),
        ({"temperature": 0.0}, "would all be the same"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_asked(settings, said):
    asked = Scripted(lambda problem, _: "")
    with pytest.raises(EvaluationError, match=said):
        evaluate(asked, TASK, [2], **settings)
    with pytest.raises(TaskError, match="difficulties 2 to 30"):
        evaluate(asked, TASK, [99])
    assert not asked.calls
