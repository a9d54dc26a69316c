"""Addition chains: two-digit numbers summed up, with running sums as the thought.

    07+35+2+42=  ->  <think>07+35=321+2=521+42=941</think>941

The digits are reversed (07 is 70), as in the literature on small models: a sum then grows from its
first digit, and a carry only ever looks back. Every `=` is followed by the sum so far, to which the
next term is added. A thought may also take two terms at once (`07+35+2=521+42=941`); of the
solutions with a thought, `SKIPPING` have such steps. What reinforcement finds here is to prefer
the slow and reliable way over the direct answer, which is why empty thoughts belong into the data.

`chains-plain` is the same with digits in the usual order, for models that have read numbers before.
"""

from __future__ import annotations

import random
import re
from typing import ClassVar

from qiusuo.tasks.task import Problem, Task, Verdict, response_of, take_apart, verdict_on

SKIPPING = 0.3  # share of thoughts that take two terms at once where they can
SUM = re.compile(r"\d{1,6}(?:\+\d{1,6})*")
REVERSED = " All numbers, the answer too, are written with the last digit first: 021 is 120."


class Chains(Task):
    """Difficulty is the number of terms, each from 1 to 99."""

    name: ClassVar[str] = "chains"
    description: ClassVar[str] = "Sums of several numbers from 1 to 99, digits reversed."
    difficulties: ClassVar[range] = range(2, 31)
    alphabet: ClassVar[str | None] = "0123456789+="
    digits_reversed: ClassVar[bool] = True

    def problem(self, difficulty: int, chance: random.Random) -> Problem:
        self.check_difficulty(difficulty)
        terms = [chance.randint(1, 99) for _ in range(difficulty)]
        written = "+".join(map(self._write, terms))
        how = REVERSED if self.digits_reversed else ""
        question = f"What is {written}?{how} Answer with the number and nothing else."
        # The order of the terms does not make another problem, nor that of the digits.
        key = "chains:" + "+".join(map(str, sorted(terms)))
        return Problem(self.name, f"{written}=", question, difficulty, key, {"terms": terms})

    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        terms = problem.data["terms"]
        answer = self._write(sum(terms))
        return response_of(self._trace(terms, chance) if thought else "", answer)

    def verify(self, problem: Problem, response: str) -> Verdict:
        parts = take_apart(response)
        terms = problem.data["terms"]
        valid = self._is_valid(parts.thought.strip(), terms)
        return verdict_on(parts, self._write(sum(terms)), trace_valid=valid)

    def _trace(self, terms: list[int], chance: random.Random) -> str:
        step = 2 if chance.random() < SKIPPING else 1
        done = step
        trace = "+".join(map(self._write, terms[: 1 + step]))
        while done < len(terms) - 1:
            fresh = terms[1 + done : 1 + done + step]
            sum_so_far = sum(terms[: 1 + done])
            trace += "=" + "+".join(map(self._write, [sum_so_far, *fresh]))
            done += step
        return f"{trace}={self._write(sum(terms))}"

    def _is_valid(self, trace: str, terms: list[int]) -> bool:
        """Whether the trace adds every term once, in order, and writes every sum right."""
        sums = trace.split("=")
        if not 2 <= len(sums) <= len(terms) or not all(map(SUM.fullmatch, sums)):
            return False
        added: list[str] = []
        for place, written in enumerate(sums):
            numbers = written.split("+")
            # The last sum stands alone, no other does.
            if (len(numbers) == 1) != (place == len(sums) - 1):
                return False
            if place and numbers.pop(0) != self._write(sum(terms[: len(added)])):
                return False
            added += numbers
        return added == [self._write(term) for term in terms]

    def _write(self, number: int) -> str:
        return str(number)[::-1] if self.digits_reversed else str(number)


class PlainChains(Chains):
    """Chains with the digits of a number in the usual order."""

    name: ClassVar[str] = "chains-plain"
    description: ClassVar[str] = "Sums of several numbers from 1 to 99."
    digits_reversed: ClassVar[bool] = False
