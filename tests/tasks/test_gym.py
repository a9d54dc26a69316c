"""reasoning-gym behind its fence: the real thing, where our Python or that which
`QIUSUO_GYM_PYTHON` names has the package; and without it, how its lack is told."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qiusuo.tasks.gym import gym_task
from qiusuo.tasks.gym_client import VERSION, gym_server
from qiusuo.tasks.gym_games import GAMES, PLAIN, REFUSED
from qiusuo.tasks.registry import find_task
from qiusuo.tasks.task import TaskError, problems, response_of
from tests.tasks.test_sandbox import isolated

PYTHON = os.environ.get("QIUSUO_GYM_PYTHON", sys.executable)
ASK = "import importlib.metadata as m; print(m.version('reasoning-gym'))"


def has_gym() -> bool:
    run = subprocess.run([PYTHON, "-I", "-c", ASK], capture_output=True, text=True, check=False)
    return run.stdout.strip() == VERSION and isolated()


real = pytest.mark.skipif(not has_gym(), reason=f"no reasoning-gym {VERSION} in {PYTHON}")


def game(name: str):
    return gym_task(name)(PYTHON)


def test_games_are_found_by_name():
    task = find_task("gym/chain_sum")
    assert (task.name, task.description) == (
        "gym/chain_sum",
        "The game chain_sum of reasoning-gym.",
    )
    assert "reasoning_gym" not in sys.modules
    assert not set(GAMES) & set(REFUSED)
    assert set(PLAIN) <= set(GAMES)
    with pytest.raises(TaskError, match="did you mean 'gym/chain_sum'"):
        find_task("gym/chainsum")
    with pytest.raises(TaskError, match="unknown game 'gym/'"):
        find_task("gym/")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("game_of_life_halting", "any text"),
        ("simple_integration", "runs the answer as code"),
        ("composite", "mix tasks"),
        ("rush_hour", "without a right answer"),
    ],
)
def test_what_is_no_fit_reward_is_refused(name, why):
    with pytest.raises(TaskError, match=f"gym/{name} is no fit reward: .*{why}"):
        find_task(f"gym/{name}")


def test_a_python_without_the_package_is_told(tmp_path):
    with pytest.raises(TaskError, match="'/no/python' does not run"):
        gym_task("gcd")("/no/python").problem(0, random.Random(0))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(TaskError, match="does not have: pip install 'qiusuo\\[gym\\]'"):
        gym_task("gcd")(str(bare)).problem(0, random.Random(0))


@real
@pytest.mark.parametrize("name", ["chain_sum", "gcd", "spell_backward", "countdown"])
def test_solutions_verify_and_nothing_else_does(name):
    task = game(name)
    for one in problems(task, "train", 0, [0, 1], 8):
        right = task.solution(one, random.Random(0), thought=True)
        assert task.verify(one, right).reward == 1
        answer = one.data["answer"]
        for wrong in (
            "", " ", "x", "0", f"The answer is {answer}", f"{answer}!", f"{answer} {answer}",
            f"{answer}</think>", "'", "[[[", "9" * 5000, "\ud800", "\0", "１２", "None",
        ):  # fmt: skip
            if wrong != answer:
                assert task.verify(one, response_of("", wrong)).reward == 0, wrong
        assert task.verify(one, answer).reason == "the thought is not closed"


@real
def test_seeds_share_no_items_and_splits_no_problems():
    task = game("chain_sum")
    seeds = [{p.key for p in problems(task, "train", seed, [0], 100)} for seed in (42, 43)]
    assert len(seeds[0] & seeds[1]) < 5  # two-digit sums do meet by chance
    test = {p.key for p in problems(task, "test", 42, [0], 40)}
    assert not test & (seeds[0] | seeds[1])


@real
def test_the_same_items_come_from_another_server():
    task = game("word_sorting")
    first = list(problems(task, "train", 1, [0, 2], 5))
    assert [json.loads(json.dumps(one.data)) for one in first] == [one.data for one in first]
    gym_server(PYTHON).close()
    assert list(problems(task, "train", 1, [0, 2], 5)) == first


@real
@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').mkdir('/tmp/QS')",
        "[open('/tmp/QS', 'w')]",
        "9**9**9**9",
        "9* *9* *9",
        "exit()",
    ],
)
def test_code_does_not_reach_a_scorer(answer):
    for name in PLAIN:
        task = game(name)
        one = task.problem(0, random.Random(0))
        verdict = task.verify(one, response_of("", answer))
        assert verdict.reason == "not an answer of this game"


@real
def test_a_scorer_that_crashes_or_hangs_or_kills_pays_nothing():
    """`polynomial_multiplication` runs code, and is refused; here it is let in to see it held."""
    task = type("Open", (type(game("gcd")),), {"game": "polynomial_multiplication"})(PYTHON)
    server = gym_server(PYTHON)
    question = {"game": task.game, "seed": 1, "level": 0}
    item = server.ask(question, 30)
    assert item
    started = "N.__globals__['__builtins__']['__import__']('os')"
    marks = [Path("/tmp/qs-gym-mark"), Path.cwd() / "qs-gym-mark"]
    for code in (
        *(f"{started}.mkdir('{mark}')" for mark in marks),
        f"{started}.kill({started}.getppid(), 9)",
        f"{started}._exit(0)",
        f"{started}.read(0, 1)",
        f"[{started}.fork() for _ in range(20)]",
        "9**9**9**9",
    ):
        verdict = server.ask({**question, "answer": code, "seconds": 1.0}, 30)
        assert verdict is None or verdict["said"] in ("wrong", "crash", "timeout"), code
        # The next question is answered as ever.
        assert server.ask(question, 30) == item
        right = server.ask({**question, "answer": item["answer"], "seconds": 5.0}, 30)
        assert right == {"said": "right"}
    assert not any(mark.exists() for mark in marks)


@real
def test_no_process_is_left():
    server = gym_server(PYTHON)
    assert server.ask({"game": "gcd", "seed": 1, "level": 0}, 30)
    process = server._process
    assert process
    server.close()
    assert process.poll() is not None
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process.pid}").exists():
        assert time.monotonic() < deadline


@real
@pytest.mark.long
@pytest.mark.parametrize("name", GAMES)
def test_every_game_pays_its_own_answer_and_not_a_sentence_of_it(name):
    task = game(name)
    for seed in range(3):
        one = task.problem(0, random.Random(seed))
        assert one == task.problem(0, random.Random(seed))
        assert task.verify(one, task.solution(one, random.Random(0), thought=False)).reward == 1
        answer = one.data["answer"]
        for wrong in (f"The answer is {answer}", f"{answer} x"):
            assert task.verify(one, response_of("", wrong)).reward == 0
