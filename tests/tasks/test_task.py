"""The stream of problems, the split and how a response is read."""

import itertools
import json

import pytest

from qiusuo.tasks.parity import Parity
from qiusuo.tasks.task import (
    TaskError,
    problems,
    response_of,
    split_of,
    take_apart,
)
from tests.tasks.families import NAMES, TASKS


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_no_seed_leaks_a_test_problem_into_training(task):
    difficulties = [task.difficulties[0], task.difficulties[-1]]
    keys = {"train": set(), "test": set()}
    for split, seed in itertools.product(keys, range(30)):
        keys[split] |= {one.key for one in problems(task, split, seed, difficulties, 20)}
    assert not keys["train"] & keys["test"]
    assert all(keys.values())


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
@pytest.mark.parametrize("unique", [False, True])
def test_a_stream_is_the_same_again_and_goes_on_where_it_stopped(task, unique):
    def draw(count, start=0):
        stream = problems(task, "train", 7, list(task.difficulties), count, unique, start=start)
        return list(stream)

    whole = draw(40)
    assert whole == draw(40)
    assert whole[25:] == draw(15, start=25)
    assert [json.loads(json.dumps(one.data)) for one in whole] == [one.data for one in whole]
    assert len({one.key for one in whole}) == 40 or not unique


def test_seeds_share_nothing_but_chance():
    task = Parity()
    streams = [[one.key for one in problems(task, "train", seed, [40], 50)] for seed in (42, 43)]
    assert not set(streams[0]) & set(streams[1])


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_equal_prompts_have_equal_keys(task):
    keys = {}
    for one in itertools.islice(problems(task, "train", 0, [task.difficulties[0]] * 2), 400):
        assert keys.setdefault(one.prompt, one.key) == one.key


def test_the_share_of_the_test():
    shares = sum(split_of(f"key {number}") == "test" for number in range(20_000)) / 20_000
    assert 0.09 < shares < 0.11
    assert split_of("a", test_share=0) == "train"
    assert split_of("a", test_share=1) == "test"


def test_an_exhausted_split_says_so():
    with pytest.raises(TaskError, match="no further test problem of difficulty 8 after"):
        list(problems(Parity(), "test", 0, [8], 200, unique=True))


@pytest.mark.parametrize(
    ("split", "difficulties", "said"),
    [
        ("dev", [8], "'train' or 'test', not 'dev'"),
        ("train", [], "at least one"),
        ("train", [8, 99], "8 to 64, not 99"),
    ],
)
def test_senseless_streams_are_refused_at_once(split, difficulties, said):
    with pytest.raises(TaskError, match=said):
        problems(Parity(), split, 0, difficulties)


@pytest.mark.parametrize(
    ("response", "thought", "answer", "fault"),
    [
        (response_of("a", "1"), "a", "1", ""),
        ("a</think> 1\n", "a", "1", ""),  # templates that opened the thought themselves
        ("\n<think>a</think>\n\n1 2", "a", "1 2", ""),
        ("<think></think>1", "", "1", ""),
        ("1", "", None, "the thought is not closed"),
        ("<think>1", "", None, "the thought is not closed"),
        ("", "", None, "the thought is not closed"),
        ("<think>a</think>1</think>1", "", None, "a second </think>"),
        ("<think>a<think></think>1", "a<think>", None, "a second <think>"),
        ("<think>a</think><think>1", "a", None, "a second <think>"),
        ("b<think>a</think>1", "b<think>a", None, "a second <think>"),
        ("<think>a</think> \n", "a", None, "no answer"),
    ],
)
def test_a_response_is_taken_apart(response, thought, answer, fault):
    parts = take_apart(response)
    assert (parts.thought, parts.answer, parts.fault) == (thought, answer, fault)
