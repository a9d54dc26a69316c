"""Every verifier: right for what is right, 0 for anything else, for any text whatever."""

import ast
import random
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.tasks.task import END_THINK, THINK, response_of, take_apart
from tests.tasks.families import NAMES, TASKS, solved, some

ROOM = Path(__file__).parents[2] / "src" / "qiusuo" / "tasks"
each_task = pytest.mark.parametrize("task", TASKS, ids=NAMES)

PIECES = [
    *"0123456789+-*/=();:,.#% \n１２三百一〇\0\ud800\u200b",
    *(THINK, END_THINK, "####", "the answer is ", "\\boxed{", "}", "0x1", "1e3", "1_0", "'", "()"),
]
garbage = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))


@each_task
def test_a_solution_always_verifies(task):
    for number, problem in enumerate(some(task, 1500)):
        for thought in (True, False):
            response = solved(task, problem, thought=thought, seed=number)
            verdict = task.verify(problem, response)
            assert (verdict.reward, verdict.reason) == (1.0, "right"), (problem, response)
            parts = take_apart(response)
            assert bool(parts.thought) == thought
            assert verdict.measures["thought"] == thought
            assert verdict.measures.get("trace_valid") == (1.0 if thought else None)
            text = problem.prompt + parts.thought + parts.answer
            assert set(text) <= set(task.alphabet)


@each_task
@given(response=garbage, number=st.integers(0, 20))
def test_garbage_gets_nothing_and_raises_nothing(task, response, number):
    problem = some(task, 1, seed=number)[0]
    for text in (response, response_of("", response), response_of(response, "")):
        verdict = task.verify(problem, text)
        # Now and then garbage is the answer; then it is so to the letter.
        expected = solved(task, problem, thought=False).split(END_THINK)[1]
        if verdict.reward and task.name != "countdown":
            assert text.split(END_THINK)[1].split() == expected.split()
        assert verdict.reward in (0.0, 1.0)
        assert verdict.reason


@each_task
def test_huge_responses_are_read_in_one_go(task):
    [problem] = some(task, 1)
    for unit in ("1", "(", "1+", "<think>", "</think>", "####", "=", ";", "1*1=1;", "-", " ", "十"):
        many = unit * (300_000 // len(unit))
        for text in (many, response_of("", many), response_of(many, many)):
            assert task.verify(problem, text).reward == 0
        filled = solved(task, problem, thought=False).replace(THINK, THINK + many)
        verdict = task.verify(problem, filled)
        assert verdict.measures.get("trace_valid", 0.0) == 0


def answer_of(task, problem):
    """The text of a right answer, and what stands before it in a response."""
    head, answer = solved(task, problem, thought=False).split(END_THINK)
    mark = "#### " if answer.startswith("#### ") else ""
    return head + END_THINK + mark, answer.removeprefix(mark)


@each_task
def test_an_answer_is_whole_or_nothing(task):
    full_width = str.maketrans(string.digits, "０１２３４５６７８９")
    for problem in some(task, 30):
        head, answer = answer_of(task, problem)
        assert task.verify(problem, f"{head} \n{answer}\t\n").reward == 1
        wrong = [
            f"The answer is {answer}", f"{answer}.", f"{answer} {answer}", f"={answer}",
            f"{answer}=", f"+{answer}", f"0{answer}", f"{answer}.0", f"{answer}$",
            f"\\boxed{{{answer}}}", f"{answer}\n#", f"'{answer}'", f"--{answer}",
            f"{answer}</think>",
            f"{answer}<think>", answer.translate(full_width), f"{answer}\0", f"{answer}\u200b", "",
            f"int({answer})", f"{answer} if 1 else 0",
        ]  # fmt: skip
        for text in wrong:
            verdict = task.verify(problem, head + text)
            assert (verdict.reward, verdict.reason != "right") == (0.0, True), (problem, text)
        # Without its mark, and within the thought, an answer is none.
        assert task.verify(problem, answer).reward == 0
        assert task.verify(problem, f"<think>{head.removeprefix(THINK)}").reward == 0
        assert task.verify(problem, response_of(answer, "")).reward == 0


@each_task
@given(number=st.integers(0, 50), seed=st.integers(0, 10_000))
def test_a_changed_answer_is_wrong(task, number, seed):
    chance = random.Random(seed)
    problem = some(task, 1, seed=number)[0]
    head, answer = answer_of(task, problem)
    place = chance.randrange(len(answer) + 1)
    changed = chance.choice(
        [
            answer[:place] + chance.choice(task.alphabet) + answer[place + 1 :],
            answer[:place] + chance.choice(task.alphabet) + answer[place:],
            answer[:place] + answer[place + 1 :],
        ]
    )
    if changed.strip() == answer:
        return
    verdict = task.verify(problem, head + changed)
    if task.name == "countdown" and verdict.reward:  # another right answer: by Python's own sums
        leaves = [
            one.value for one in ast.walk(ast.parse(changed)) if isinstance(one, ast.Constant)
        ]
        assert abs(eval(changed) - problem.data["target"]) < 1e-9
        assert all(leaves.count(one) <= problem.data["numbers"].count(one) for one in leaves)
    else:
        assert verdict.reward == 0, (problem, changed)


@each_task
def test_a_changed_trace_is_not_valid(task):
    """A digit of a step that is changed makes the step wrong."""
    for number, problem in enumerate(some(task, 150)):
        thought, answer = solved(task, problem, thought=True, seed=number).split(END_THINK)
        digits = [place for place, char in enumerate(thought) if char in string.digits]
        place = random.Random(number).choice(digits)
        other = str((int(thought[place]) + 1) % (2 if task.name == "parity" else 10))
        changed = thought[:place] + other + thought[place + 1 :]
        verdict = task.verify(problem, changed + END_THINK + answer)
        assert verdict.reward == 1
        assert verdict.measures["trace_valid"] == 0, (problem, changed)


def test_nothing_in_the_room_evaluates_text():
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                # Regular expressions are compiled; code is not.
                builtin = isinstance(node.func, ast.Name)
                assert called not in {"eval", "exec", "__import__", "literal_eval"}, file
                assert not (builtin and called == "compile"), file
