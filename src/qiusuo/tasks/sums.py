"""Addition chains again, with a thought that reaches further: the whole remaining sum, rewritten.

    07+35+2+42=  ->  <think>321+2+42=521+42=941</think>941

Each segment is the one before it with its first two numbers added and the rest copied; the first
segment does this to the prompt. In the thoughts of `chains` a step must find the next term of the
prompt, and so count how many it has used; a model that has seen five terms cannot count to ten.
Here a step looks at the segment just written and nowhere else, and is the same step whatever
the number of terms. The price is length: 10 terms take 140 characters, 30 take 1,300.

Problems, keys and so splits are those of `chains`: tests of one are in no training of the other.
"""

from __future__ import annotations

import random
from itertools import accumulate
from typing import ClassVar

from qiusuo.tasks.chains import Chains


class Sums(Chains):
    """Difficulty is the number of terms, each from 1 to 99."""

    name: ClassVar[str] = "sums"
    description: ClassVar[str] = "The sums of chains, with the rest of the sum rewritten each step."

    def _trace(self, terms: list[int], chance: random.Random) -> str:
        return self._rewritten(terms)

    def _is_valid(self, trace: str, terms: list[int]) -> bool:
        return trace == self._rewritten(terms)

    def _rewritten(self, terms: list[int]) -> str:
        """The remaining sum after each addition.

        >>> Sums()._rewritten([70, 53, 2])
        '321+2=521'
        """
        written = list(map(self._write, terms))
        totals = list(accumulate(terms))
        return "=".join(
            "+".join([self._write(totals[done]), *written[done + 1 :]])
            for done in range(1, len(terms))
        )
