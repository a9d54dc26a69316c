"""Countdown: reach a target from a few numbers by +, -, *, / and brackets.

    4,16,8:12=  ->  <think>8*4=32;16+8=24;8/4=2;16-4=12</think>16-4

There are many right answers, so the verifier computes: the answer must be one expression, of the
given numbers, each used at most as often as it is given, whose exact value is the target. The
thought is a search: branches in random order, between `;`, each of steps between `,`, each step
a sum of two numbers at hand and its result. A branch takes all steps but the last; the last one is
written where it hits the target. Results within a thought are whole and positive.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from qiusuo.tasks.expression import ExpressionError, read_expression
from qiusuo.tasks.task import Parts, Problem, Task, Verdict, response_of, take_apart, verdict_on

TRIES = 12  # at most so many branches that fail stand in a thought
DRAWS = 40  # of branches in search of one that hits; then the one that made the problem is taken
STEP = re.compile(r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,6})")
LARGEST_NUMBER = 20
LARGEST_TARGET = {3: 50, 4: 100}

Made = tuple[int, str, bool]  # value, its expression, whether that is a sum or difference
Step = tuple[str, Made]  # the step as written, what it makes


class Countdown(Task):
    """Difficulty is how many numbers are given, each from 1 to 20; targets reach 50 for three
    numbers and 100 for four, and are none of the numbers. Every problem can be solved."""

    name: ClassVar[str] = "countdown"
    description: ClassVar[str] = "Reach a target from three or four numbers by + - * /."
    difficulties: ClassVar[range] = range(3, 5)
    alphabet: ClassVar[str | None] = "0123456789+-*/()=,:;"

    def problem(self, difficulty: int, chance: random.Random) -> Problem:
        self.check_difficulty(difficulty)
        while True:
            numbers = [chance.randint(1, LARGEST_NUMBER) for _ in range(difficulty)]
            steps, [(target, expression, _)] = _branch(numbers, difficulty - 1, chance)
            if target <= LARGEST_TARGET[difficulty] and target not in numbers:
                break
        listed = ", ".join(map(str, numbers))
        question = (
            f"Use the numbers {listed}, each at most once, with + - * / and brackets to make "
            f"{target}. Answer with the expression alone, for example (3+4)*5."
        )
        key = f"countdown:{','.join(map(str, sorted(numbers)))}:{target}"
        prompt = f"{','.join(map(str, numbers))}:{target}="
        data = {
            "numbers": numbers,
            "target": target,
            "expression": expression,  # one right answer, and the steps that lead there
            "steps": ",".join(text for text, _ in steps),
        }
        return Problem(self.name, prompt, question, difficulty, key, data)

    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        if not thought:
            return response_of("", problem.data["expression"])
        numbers, target = problem.data["numbers"], problem.data["target"]
        failed: list[str] = []
        found, expression = problem.data["steps"], problem.data["expression"]
        for _ in range(DRAWS):
            steps, left = _branch(numbers, len(numbers) - 2, chance)
            hit = _hit(steps, left, target)
            if hit is not None:
                found, expression = hit
                break
            branch = ",".join(text for text, _ in steps)
            if branch not in failed:
                failed.append(branch)
        return response_of(";".join([*failed[-TRIES:], found]), expression)

    def verify(self, problem: Problem, response: str) -> Verdict:
        parts = take_apart(response)
        numbers, target = problem.data["numbers"], problem.data["target"]
        reason = _fault(parts, numbers, target)
        right = parts.answer if parts.answer is not None and not reason else ""
        valid = _is_valid(parts.thought.strip(), numbers, target)
        verdict = verdict_on(parts, right, trace_valid=valid)
        if reason and parts.answer is not None:
            return Verdict(0.0, verdict.answer, reason, verdict.measures)
        return verdict


def _fault(parts: Parts, numbers: Sequence[int], target: int) -> str:
    """Why the answer is wrong, or nothing."""
    try:
        read = read_expression(parts.answer or "")
    except ExpressionError as error:
        return str(error)
    if Counter(read.numbers) - Counter(numbers):
        return "a number that is not given, or too often"
    return "" if read.value == target else "wrong answer"


def _branch(
    numbers: Sequence[int], count: int, chance: random.Random
) -> tuple[list[Step], list[Made]]:
    """`count` random steps from the numbers: the steps, and what is then at hand."""
    hand: list[Made] = [(number, str(number), False) for number in numbers]
    steps: list[Step] = []
    for _ in range(count):
        first, second = chance.sample(range(len(hand)), 2)
        step = chance.choice(_steps_of(hand[first], hand[second]))
        steps.append(step)
        hand = [one for place, one in enumerate(hand) if place not in (first, second)]
        hand.append(step[1])
    return steps, hand


def _steps_of(one: Made, other: Made) -> list[Step]:
    """Every step that two values allow: the larger one first, results whole and positive."""
    large, small = (one, other) if one[0] >= other[0] else (other, one)
    steps = [_step(large, "+", small, large[0] + small[0])]
    if large[0] > small[0]:
        steps.append(_step(large, "-", small, large[0] - small[0]))
    if small[0] > 1:  # times one and by one lead nowhere
        steps.append(_step(large, "*", small, large[0] * small[0]))
        if large[0] % small[0] == 0:
            steps.append(_step(large, "/", small, large[0] // small[0]))
    return steps


def _step(left: Made, operation: str, right: Made, value: int) -> Step:
    first, second = left[1], right[1]
    if operation in "*/" and left[2]:
        first = f"({first})"
    # What stands behind - and / is in brackets where its own operation would come later.
    if (right[2] and operation != "+") or (operation == "/" and not second.isdigit()):
        second = f"({second})"
    text = f"{left[0]}{operation}{right[0]}={value}"
    return text, (value, f"{first}{operation}{second}", operation in "+-")


def _hit(steps: Sequence[Step], hand: Sequence[Made], target: int) -> tuple[str, str] | None:
    """The branch that makes the target, within these steps or by one more, and its expression."""
    taken: list[str] = []
    for text, (value, expression, _) in [*steps, *_steps_of(hand[0], hand[1])]:
        if value == target:
            return ",".join([*taken, text]), expression
        if len(taken) < len(steps):
            taken.append(text)
    return None


def _is_valid(thought: str, numbers: Sequence[int], target: int) -> bool:
    """Whether every step is right and takes numbers at hand, and the last one makes the target."""
    made = 0
    for branch in thought.split(";"):
        hand = Counter(numbers)
        for step in branch.split(","):
            match = STEP.fullmatch(step)
            if not match:
                return False
            left, right, made = int(match[1]), int(match[3]), int(match[4])
            hand.subtract((left, right))
            if min(hand[left], hand[right]) < 0 or not _is_right(left, match[2], right, made):
                return False
            hand[made] += 1
    return made == target


def _is_right(left: int, operation: str, right: int, result: int) -> bool:
    if operation == "+":
        return left + right == result
    if operation == "-":
        return left - right == result
    return left * right == result if operation == "*" else right * result == left and right > 0
