"""Countdown: reach a target from a few numbers by +, -, *, / and brackets.

    4,16,8:12=  ->  <think>4:12+8-16*3/48;16,8:24,8;16-8=8,8+4=12</think>16-8+4

There are many right answers, so the verifier computes: the answer must be one expression, of the
given numbers, each used at most as often as it is given, whose exact value is the target.

The thought meets in the middle. It sets the numbers aside one by one, in the order given. For the
one set aside it writes the goals, what the other two might make: the target itself, or what becomes
the target by way of this number (`4:` 12, or 8 by +4, 16 by -4, 3 by *4, 48 by /4). Then it writes
what the other two do make, by + - * / (`16,8:24,8`), up to the first that is a goal; and last the
steps to the target. The order is fixed and nothing is guessed, so each character follows from a few
above it, and each sum is of two numbers of the problem: a few thousand in all, each seen often.
(In a pilot thoughts were random tries, whose course cannot be learned and whose second steps were
sums rarely seen: pass@1 ended at 39%, and reinforcement let the sums rot.)

Of four numbers, two at random are first made one (`20-4=16;`) and the thought goes on with three;
where that leads nowhere it begins again with another two. Results are whole and positive.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from qiusuo.tasks.expression import ExpressionError, read_expression
from qiusuo.tasks.task import Parts, Problem, Task, Verdict, response_of, take_apart, verdict_on

ROUNDS = 3  # of four numbers; the last one begins as the problem was made, and leads there
NUMBER = "([1-9][0-9]{0,5})"
STEP = re.compile(f"{NUMBER}([-+*/]){NUMBER}={NUMBER}")
ASIDE = re.compile(f"{NUMBER}:.*")
PAIR = re.compile(f"{NUMBER},{NUMBER}:(.+)")
LARGEST_NUMBER = 20
LARGEST_TARGET = {3: 50, 4: 100}
LARGEST_GOAL = {3: 20**2, 4: 20**3}  # no two numbers of a search make more


class Made(NamedTuple):
    """A number at hand: given, or made by `steps`."""

    value: int
    expression: str
    is_sum: bool  # or a difference: in brackets beside * and /
    steps: tuple[str, ...]


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
            first = hand = _join_two(_given(numbers), chance)
            while len(hand) > 1:
                hand = _join_two(hand, chance)
            [made] = hand
            if made.value <= LARGEST_TARGET[difficulty] and made.value not in numbers:
                break
        listed = ", ".join(map(str, numbers))
        question = (
            f"Use the numbers {listed}, each at most once, with + - * / and brackets to make "
            f"{made.value}. Answer with the expression alone, for example (3+4)*5."
        )
        key = f"countdown:{','.join(map(str, sorted(numbers)))}:{made.value}"
        prompt = f"{','.join(map(str, numbers))}:{made.value}="
        data = {
            "numbers": numbers,
            "target": made.value,
            "expression": made.expression,  # one right answer
            "first": [first[0].value, *first[0].steps],  # its first step, and what that makes
        }
        return Problem(self.name, prompt, question, difficulty, key, data)

    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        if not thought:
            return response_of("", problem.data["expression"])
        target, hand = problem.data["target"], _given(problem.data["numbers"])
        hit: Made | None
        if len(hand) == 3:
            parts, hit = _search(hand, target, LARGEST_GOAL[3])
        else:
            parts, hit = _search_by_rounds(hand, target, problem.data["first"][1], chance)
        assert hit, "a search tries every way to join three numbers"
        return response_of(";".join([*parts, ",".join(hit.steps)]), hit.expression)

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


def _given(numbers: Sequence[int]) -> list[Made]:
    return [Made(number, str(number), False, ()) for number in numbers]


def _join_two(hand: Sequence[Made], chance: random.Random) -> list[Made]:
    """Two numbers at random made one, which comes first in the new hand."""
    one, other = chance.sample(range(len(hand)), 2)
    rest = [made for place, made in enumerate(hand) if place not in (one, other)]
    operation = chance.choice(list(_results(hand[one].value, hand[other].value)))
    return [_join(hand[one], operation, hand[other]), *rest]


def _join(one: Made, operation: str, other: Made) -> Made:
    """The larger number stands first."""
    left, right = (one, other) if one.value >= other.value else (other, one)
    value = _results(left.value, right.value)[operation]
    first, second = left.expression, right.expression
    if operation in "*/" and left.is_sum:
        first = f"({first})"
    # What stands behind - and / is in brackets where its own operation would come later.
    if (right.is_sum and operation != "+") or (operation == "/" and not second.isdigit()):
        second = f"({second})"
    step = f"{left.value}{operation}{right.value}={value}"
    steps = (*left.steps, *right.steps, step)
    return Made(value, f"{first}{operation}{second}", operation in "+-", steps)


def _results(one: int, other: int) -> dict[str, int]:
    """What two numbers make, by operation; whole and positive."""
    large, small = max(one, other), min(one, other)
    results = {"+": large + small}
    if large > small:
        results["-"] = large - small
    if small > 1:  # times one and by one lead nowhere
        results["*"] = large * small
        if large % small == 0:
            results["/"] = large // small
    return results


def _goals(aside: int, target: int, most: int) -> list[tuple[str, int]]:
    """What two other numbers might make so that, by an operation with the one set aside, in
    whichever order, the target is reached. `most` is the largest that they can make."""
    goals = [("", target)]
    if target > aside:
        goals.append(("+", target - aside))
    goals.append(("-", target + aside))
    if aside > target:
        goals.append(("-", aside - target))
    if aside > 1:
        if target % aside == 0 and target > aside:
            goals.append(("*", target // aside))
        if target * aside <= most:
            goals.append(("/", target * aside))
        if aside % target == 0 and aside > target > 1:
            goals.append(("/", aside // target))
    return goals


def _goals_text(aside: int, goals: Sequence[tuple[str, int]]) -> str:
    return f"{aside}:" + "".join(f"{operation}{goal}" for operation, goal in goals)


def _search(hand: Sequence[Made], target: int, most: int) -> tuple[list[str], Made | None]:
    """The parts of the thought on three numbers, and what it finds."""
    parts = []
    for place, aside in enumerate(hand):
        goals = _goals(aside.value, target, most)
        parts.append(_goals_text(aside.value, goals))
        one, other = (made for here, made in enumerate(hand) if here != place)
        if one.value < other.value:
            one, other = other, one
        results: list[str] = []
        hit: Made | None = None
        for operation, value in _results(one.value, other.value).items():
            results.append(str(value))
            last = next((by for by, goal in goals if goal == value), None)
            if last is not None:
                hit = _join(one, operation, other)
                hit = _join(hit, last, aside) if last else hit
                break
        parts.append(f"{one.value},{other.value}:{','.join(results)}")
        if hit:
            return parts, hit
    return parts, None


def _search_by_rounds(
    hand: Sequence[Made], target: int, sure: str, chance: random.Random
) -> tuple[list[str], Made]:
    """The same on four: rounds that begin with a random step, the last one with the sure one."""
    parts: list[str] = []
    for _ in range(ROUNDS - 1):
        three = _join_two(hand, chance)
        if three[0].value == target:
            return parts, three[0]
        found, hit = _search(three, target, LARGEST_GOAL[4])
        parts += [*three[0].steps, *found]
        if hit:
            return parts, hit
    found, hit = _search(_after(sure, hand), target, LARGEST_GOAL[4])
    assert hit, "the problem was made from this step"
    return [*parts, sure, *found], hit


def _after(step: str, hand: Sequence[Made]) -> list[Made]:
    match = STEP.fullmatch(step)
    assert match
    rest = list(hand)
    one, other = (
        rest.pop(next(place for place, made in enumerate(rest) if made.value == int(number)))
        for number in (match[1], match[3])
    )
    return [_join(one, match[2], other), *rest]


def _is_valid(thought: str, numbers: Sequence[int], target: int) -> bool:
    """Whether every part is right: goals and results of numbers at hand, in their order, steps
    that two numbers at hand allow, and last those that make the target."""
    *parts, last = thought.split(";")
    hand, aside = list(numbers), 0
    for part in parts:
        if match := PAIR.fullmatch(part):
            one, other = int(match[1]), int(match[2])
            results = ",".join(map(str, _results(one, other).values()))
            left = _without(hand, one, other, aside) if aside else None
            if left is None or not f"{results},".startswith(f"{match[3]},"):
                return False
        elif match := ASIDE.fullmatch(part):
            aside = int(match[1])
            goals = _goals(aside, target, LARGEST_GOAL[len(numbers)])
            if aside not in hand or part != _goals_text(aside, goals):
                return False
        else:
            begun = _taken(part, numbers)
            if begun is None:
                return False
            hand, aside = begun, 0
    made: list[int] | None = list(numbers)
    for step in last.split(","):
        made = _taken(step, made) if made is not None else None
    return made is not None and last.endswith(f"={target}")


def _taken(step: str, hand: Sequence[int]) -> list[int] | None:
    """What is at hand after a step; None if it is wrong or takes what is not at hand."""
    match = STEP.fullmatch(step)
    if not match:
        return None
    left, right, result = int(match[1]), int(match[3]), int(match[4])
    rest = _without(hand, left, right)
    if rest is None or not _is_right(left, match[2], right, result):
        return None
    return [result, *rest]


def _without(hand: Sequence[int], *taken: int) -> list[int] | None:
    """The hand without some numbers; None if it does not have them all."""
    rest = list(hand)
    for number in taken:
        if number not in rest:
            return None
        rest.remove(number)
    return rest


def _is_right(left: int, operation: str, right: int, result: int) -> bool:
    if operation == "+":
        return left + right == result
    if operation == "-":
        return left - right == result
    return left * right == result if operation == "*" else right * result == left
