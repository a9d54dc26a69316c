"""Programs as answers: what is right by what it does, and everything else a policy may try."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.tasks.program_steps import STEPS
from qiusuo.tasks.programs import EXAMPLES, HIDDEN, PROBES, Programs
from qiusuo.tasks.sandbox import run_program
from qiusuo.tasks.task import Problem, problems, response_of
from tests.tasks.test_sandbox import isolated

caged = pytest.mark.skipif(not isolated(), reason="no namespaces on this machine")
TASK = Programs()


def doubled_sum() -> Problem:
    """f(x) = 2 * the sum of a list."""
    names = {step.words: place for place, step in enumerate(STEPS)}
    hidden = [list(range(n, n + 3)) for n in range(HIDDEN)]
    data = {
        "steps": [[names["multiply each number by {k}"], 2], [names["give the sum"], 0]],
        "examples": [[[50, 1], 102], [[2], 4], [[5, 5], 20]],
        "hidden": hidden,
    }
    return Problem("programs", "", "", 2, "", data)


def answered(program: str) -> str:
    verdict = TASK.verify(doubled_sum(), response_of("", program))
    assert (verdict.reward == 1) == (verdict.reason == "right")
    return verdict.reason


RIGHT = "def f(x):\n    return 2 * sum(x)"


def test_problems_stay_what_they_are():
    for difficulty in TASK.difficulties:
        for one in problems(TASK, "train", 0, [difficulty], 60):
            assert json.loads(json.dumps(one.data)) == one.data
            assert len(one.data["steps"]) == difficulty
            shown = [given for given, _ in one.data["examples"]]
            assert (len(shown), len(one.data["hidden"])) == (EXAMPLES, HIDDEN)
            assert not any(given in shown for given in one.data["hidden"])
            assert all(f"f({given!r}) == {result!r}" in one.prompt
                       for given, result in one.data["examples"])  # fmt: skip
            assert not any(repr(given) in one.prompt for given in one.data["hidden"]
                           if len(repr(given)) > 8)  # fmt: skip


def test_what_does_the_same_has_the_same_key_and_so_one_split():
    """Told in other words: by the values of the probes, computed by the code that is shown."""
    behaviours: dict[str, str] = {}
    for one in itertools.islice(problems(TASK, "train", 0, [1, 2]), 300):
        steps = [(STEPS[place], k) for place, k in one.data["steps"]]
        results = []
        for probe in PROBES[steps[0][0].takes]:
            value = probe
            for step, k in steps:
                value = step.apply(value, k)
            results.append(value)
        behaviour = f"{steps[0][0].takes} {results}"
        assert behaviours.setdefault(behaviour, one.key) == one.key
    assert len(set(behaviours.values())) == len(behaviours)


@caged
def test_the_code_that_is_shown_does_what_is_computed():
    """Every step, in one program: its own code against its own function."""
    program, expected = [], []
    for step in STEPS:
        for k in {step.least, step.most}:
            program.append(f"print([{step.code.format(k=k)} for x in {PROBES[step.takes]!r}])")
            expected.append(repr([step.apply(x, k) for x in PROBES[step.takes]]))
    assert run_program("\n".join(program)).stdout.splitlines() == expected


@caged
def test_solutions_verify():
    for number, one in enumerate(problems(TASK, "train", 0, list(TASK.difficulties), 12)):
        for thought in (True, False):
            response = TASK.solution(one, random.Random(number), thought=thought)
            verdict = TASK.verify(one, response)
            assert (verdict.reward, verdict.reason) == (1.0, "right")
            assert verdict.measures.get("trace_valid") == (1.0 if thought else None)
    verdict = TASK.verify(doubled_sum(), response_of("[2] [4] 5", RIGHT))
    assert (verdict.reward, verdict.measures["trace_valid"]) == (1.0, 0.0)


@caged
@pytest.mark.parametrize(
    "program",
    [
        RIGHT,
        f"```python\n{RIGHT}\n```",
        f"```\n{RIGHT}\n```",
        "import functools as t\ng = lambda x: t.reduce(int.__add__, x)\nf = lambda x: g(x) + g(x)",
        "import os\nprint = None or print\ndef f(x):\n    x.append(0)\n    return sum(x) * 2",
    ],
)
def test_right_programs(program):
    assert answered(program) == "right"


@caged
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(x):\n    return sum(x)", "wrong answer"),
        ("def f(x):\n    return 2.0 * sum(x)", "wrong answer"),
        ("def f(x):\n    return str(2 * sum(x))", "wrong answer"),
        ("def f(x):\n    return {(50, 1): 102, (2,): 4, (5, 5): 20}.get(tuple(x), 4)",
         "wrong answer"),
        (RIGHT + "\nprint(f([1, 2]))", "wrong answer"),
        (RIGHT + "\nimport sys\nsys.stderr.write('x')", "wrong answer"),
        ("def f(x)\n    return 2", "the program fails"),
        ("def f(x): 1/0", "the program fails"),
        ("def f(): return 2", "the program fails"),
        (RIGHT + "\n'''", "the program fails"),
        ("def f(x):\n    while True: pass", "the program takes too long"),
        ("def f(x): return f(x)", "the program fails"),
        ("def f(x):\n    return [0] * 10**10", "the program fails"),
        ("def f(x): return 0\nwhile True: print('x' * 9999)", "the program writes too much"),
        ("import os\ndef f(x):\n    while True: os.fork()", "the program fails"),
        # It says that it has passed, as ours would, and leaves.
        ("def f(x): return 0\nprint('right')\nraise SystemExit(0)", "wrong answer"),
        ("def f(x): return 0\nimport os\nos._exit(0)", "wrong answer"),
        ("class Any(int):\n    __eq__ = lambda a, b: True\n    __repr__ = lambda a: '*'\n"
         "f = lambda x: Any()", "wrong answer"),
        # It reads the hidden inputs, which say nothing of results, and looks for the tests.
        ("import sys\ndef f(x): return 0\nprint(sys.stdin.read())", "the program fails"),
        ("import os\ndef f(x):\n    return os.listdir('/home'), os.environ['TESTS']",
         "the program fails"),
        ("import sys\ndef f(x):\n    return sorted(sys._getframe(1).f_locals)", "wrong answer"),
        ("def f(x):\n    open('/program.py', 'w').write('')", "the program fails"),
        ("import socket\ndef f(x):\n    return socket.create_connection(('1.1.1.1', 53), 1)",
         "the program fails"),
        (f"Here it is:\n```python\n{RIGHT}\n```", "no program alone"),
        (f"```python\n{RIGHT}\n```\nDone.", "no program alone"),
        (f"```python\n{RIGHT}\n```\n```python\n{RIGHT}\n```", "no program alone"),
        (RIGHT + "\n#" + "x" * 4000, "no program alone"),
        ("2 * sum(x)", "no function f"),
        ("\ud800def f(x): return 0", "the program fails"),
        ("def f(x): return '\0'", "the program fails"),
    ],
)  # fmt: skip
def test_what_else_a_policy_may_try(program, reason):
    assert answered(program) == reason


@given(st.one_of(st.text(), st.lists(st.sampled_from(
    ["def f", "f =", "(x)", ":", "\n", " return ", "x", "```", "```python\n", "1", "</think>", "\\"]
)).map("".join)))  # fmt: skip
@settings(max_examples=60)
def test_garbage_gets_nothing(text):
    # Without "def f" and "f =" nothing runs, so this is quick.
    plain = text.replace("f", "g")
    for response in (text if "</think>" not in text else plain, response_of("", plain)):
        assert TASK.verify(doubled_sum(), response).reward == 0
