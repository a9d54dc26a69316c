"""Multi-step arithmetic: +, - and * of small numbers, worked one operation at a time.

    5+3*4-2*6=  ->  <think>3*4=12;5+12=17;2*6=12;17-12=5</think>5

Products first, then from left to right. The thought keeps a running total and computes a product
when its turn comes; other orders are as valid, as long as every step is right and is a step of this
problem. Competence ends where the chain gets longer than what the model has seen: the difficulty is
the number of numbers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import ClassVar

from qiusuo.tasks.task import Problem, Task, Verdict, response_of, take_apart, verdict_on

PRODUCTS = 0.3  # chance of a product where two numbers are left
STEP = re.compile(r"(-?\d{1,6})([+*-])(\d{1,6})=(-?\d{1,6})")
Term = Sequence[int]  # [sign, number] or [sign, factor, factor]


class Arithmetic(Task):
    """Difficulty is the number of numbers: terms from 1 to 30, factors from 2 to 9, no product of
    more than two."""

    name: ClassVar[str] = "arithmetic"
    description: ClassVar[str] = "Expressions of +, - and * with small numbers, step by step."
    difficulties: ClassVar[range] = range(2, 13)
    alphabet: ClassVar[str | None] = "0123456789+-*=;"

    def problem(self, difficulty: int, chance: random.Random) -> Problem:
        self.check_difficulty(difficulty)
        terms: list[list[int]] = []
        left = difficulty
        while left:
            sign = chance.choice((1, -1)) if terms else 1
            if left >= 2 and chance.random() < PRODUCTS:
                terms.append([sign, chance.randint(2, 9), chance.randint(2, 9)])
            else:
                terms.append([sign, chance.randint(1, 30)])
            left -= len(terms[-1]) - 1
        written = _write(terms)
        question = f"What is {written}? Answer with the number and nothing else."
        # Neither the order of terms nor that of factors makes another problem.
        sorted_terms = sorted([sign, *sorted(factors)] for sign, *factors in terms)
        key = "arithmetic:" + _write(sorted_terms)
        return Problem(self.name, f"{written}=", question, difficulty, key, {"terms": terms})

    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        terms = problem.data["terms"]
        answer = str(sum(map(_value, terms)))
        return response_of(";".join(_steps(terms)) if thought else "", answer)

    def verify(self, problem: Problem, response: str) -> Verdict:
        parts = take_apart(response)
        terms = problem.data["terms"]
        valid = _is_valid(parts.thought.strip(), terms)
        return verdict_on(parts, str(sum(map(_value, terms))), trace_valid=valid)


def _value(term: Term) -> int:
    sign, first, *second = term
    return sign * first * (second[0] if second else 1)


def _write(terms: Sequence[Term]) -> str:
    signed = ("+-"[term[0] < 0] + "*".join(map(str, term[1:])) for term in terms)
    return "".join(signed).removeprefix("+")


def _steps(terms: Sequence[Term]) -> list[str]:
    steps: list[str] = []
    total = 0
    for place, term in enumerate(terms):
        value = _value(term)
        if len(term) == 3:
            steps.append(f"{term[1]}*{term[2]}={abs(value)}")
        if place:
            steps.append(f"{total}{'+-'[term[0] < 0]}{abs(value)}={total + value}")
        total += value
    return steps


def _is_valid(trace: str, terms: Sequence[Term]) -> bool:
    """Whether the steps are right and use every term once: the sums in order, a product before
    it is added."""
    waiting = [sorted(term[1:]) for term in terms if len(term) == 3]
    total, added = _value(terms[0]), 1
    for step in trace.split(";"):
        match = STEP.fullmatch(step)
        if not match:
            return False
        left, right, result = int(match[1]), int(match[3]), int(match[4])
        if match[2] == "*":
            if sorted((left, right)) not in waiting or left * right != result:
                return False
            waiting.remove(sorted((left, right)))
            continue
        signed = right if match[2] == "+" else -right
        if added == len(terms) or (left, signed) != (total, _value(terms[added])):
            return False
        total, added = total + signed, added + 1
        if result != total or not _are_computed(terms[:added], terms[added:], waiting):
            return False
    return added == len(terms) and not waiting


def _are_computed(used: Sequence[Term], later: Sequence[Term], waiting: list[list[int]]) -> bool:
    """Whether the products of the terms used so far are no longer waiting to be computed. Equal
    ones are one another's: only those that later terms need may still wait."""
    needed_later = [sorted(term[1:]) for term in later if len(term) == 3]
    products = [sorted(term[1:]) for term in used if len(term) == 3]
    return all(waiting.count(one) <= needed_later.count(one) for one in products)
