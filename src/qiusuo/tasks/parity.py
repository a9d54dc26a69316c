"""Parity with rare chains of thought: the smallest task on which reasoning pays.

Whether a string of bits has an odd number of ones cannot be guessed from some of the bits, so a
direct answer is right half of the time. With the running parity written down bit for bit every
step is easy. A model that has seen a few such traces among many direct answers learns by
reinforcement to write them always (arXiv:2510.11495).

    000111011000=  ->  <think>000101101111</think>1
"""

from __future__ import annotations

import random
from itertools import accumulate
from operator import xor
from typing import ClassVar

from qiusuo.tasks.task import Problem, Task, Verdict, response_of, take_apart, verdict_on


class Parity(Task):
    """Difficulty is the number of bits."""

    name: ClassVar[str] = "parity"
    description: ClassVar[str] = "Is the number of ones in a string of bits odd (1) or even (0)?"
    difficulties: ClassVar[range] = range(8, 65)  # with fewer bits the test has nothing left
    alphabet: ClassVar[str | None] = "01="

    def problem(self, difficulty: int, chance: random.Random) -> Problem:
        self.check_difficulty(difficulty)
        bits = "".join(chance.choice("01") for _ in range(difficulty))
        question = (
            f"Here is a string of bits: {bits}\nIs the number of ones in it odd or even? "
            "Answer with 1 for odd or 0 for even, and nothing else."
        )
        return Problem(
            self.name, f"{bits}=", question, difficulty, f"parity:{bits}", {"bits": bits}
        )

    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        trace = running_parity(problem.data["bits"])
        return response_of(trace if thought else "", trace[-1])

    def verify(self, problem: Problem, response: str) -> Verdict:
        parts = take_apart(response)
        trace = running_parity(problem.data["bits"])
        return verdict_on(parts, trace[-1], trace_valid=parts.thought.strip() == trace)


def running_parity(bits: str) -> str:
    """After each bit, whether the ones so far are odd.

    >>> running_parity("0110")
    '0100'
    """
    return "".join(map(str, accumulate(map(int, bits), xor)))
