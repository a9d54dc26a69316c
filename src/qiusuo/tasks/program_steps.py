"""The steps that programs are asked to do: each in words, as Python to show, and as it is computed.

A step takes a list of whole numbers, a text or a whole number, and gives one of them. `{k}` in its
words and its code is a small number. The code is what solutions say; what is right is computed by
the function beside it, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

Kind = Literal["numbers", "text", "number"]
VOWELS = "aeiou"


class Step(NamedTuple):
    """One thing to do to x; ``{k}`` in words and code stands for a number from ``least`` to
    ``most``, where those are given."""

    takes: Kind
    gives: Kind
    words: str
    code: str  # of x
    apply: Callable[[Any, int], Any]
    least: int = 0  # k from here on,
    most: int = 0  # up to here


def _digits(number: int) -> list[int]:
    return [int(digit) for digit in str(abs(number))]


_NUMBERS = (
    ("keep the even numbers", "[n for n in x if n % 2 == 0]",
     lambda x, k: [n for n in x if n % 2 == 0]),
    ("keep the odd numbers", "[n for n in x if n % 2]", lambda x, k: [n for n in x if n % 2]),
    ("keep the numbers over {k}", "[n for n in x if n > {k}]",
     lambda x, k: [n for n in x if n > k], 2, 9),
    ("keep the numbers under {k}", "[n for n in x if n < {k}]",
     lambda x, k: [n for n in x if n < k], 5, 15),
    ("add {k} to each number", "[n + {k} for n in x]", lambda x, k: [n + k for n in x], 1, 9),
    ("multiply each number by {k}", "[n * {k} for n in x]", lambda x, k: [n * k for n in x], 2, 9),
    ("square each number", "[n * n for n in x]", lambda x, k: [n * n for n in x]),
    ("take each number's remainder by {k}", "[n % {k} for n in x]",
     lambda x, k: [n % k for n in x], 3, 9),
    ("reverse the list", "x[::-1]", lambda x, k: x[::-1]),
    ("sort the list, smallest first", "sorted(x)", lambda x, k: sorted(x)),
    ("sort the list, largest first", "sorted(x, reverse=True)",
     lambda x, k: sorted(x, reverse=True)),
    ("leave out numbers that came before", "list(dict.fromkeys(x))",
     lambda x, k: list(dict.fromkeys(x))),
    ("leave out the first number", "x[1:]", lambda x, k: x[1:]),
    ("take the first {k} numbers", "x[:{k}]", lambda x, k: x[:k], 2, 4),
    ("take every second number, from the first on", "x[::2]", lambda x, k: x[::2]),
    ("make a list of the running sums", "[sum(x[:i + 1]) for i in range(len(x))]",
     lambda x, k: list(accumulate(x))),
    ("take from each number but the first the one before it",
     "[b - a for a, b in zip(x, x[1:])]", lambda x, k: [b - a for a, b in pairwise(x)]),
    ("write the list twice, one after the other", "x + x", lambda x, k: x + x),
)  # fmt: skip
_REDUCED = (
    ("give the sum", "sum(x)", lambda x, k: sum(x)),
    ("give how many numbers there are", "len(x)", lambda x, k: len(x)),
    ("give the largest number, 0 if there is none", "max(x, default=0)",
     lambda x, k: max(x, default=0)),
    ("give the smallest number, 0 if there is none", "min(x, default=0)",
     lambda x, k: min(x, default=0)),
    ("give how many numbers are over {k}", "sum(n > {k} for n in x)",
     lambda x, k: sum(n > k for n in x), 2, 9),
)  # fmt: skip
_NUMBER = (
    ("add {k}", "x + {k}", lambda x, k: x + k, 1, 20),
    ("multiply by {k}", "x * {k}", lambda x, k: x * k, 2, 9),
    ("square it", "x * x", lambda x, k: x * x),
    ("take the remainder by {k}", "x % {k}", lambda x, k: x % k, 5, 12),
    ("add up its digits, without the sign", "sum(int(d) for d in str(abs(x)))",
     lambda x, k: sum(_digits(x))),
)  # fmt: skip
_TEXT = (
    ("reverse the text", "x[::-1]", lambda x, k: x[::-1]),
    ("put it in capitals", "x.upper()", lambda x, k: x.upper()),
    ("leave out the vowels (a e i o u, small ones alone)",
     "''.join(c for c in x if c not in 'aeiou')",
     lambda x, k: "".join(c for c in x if c not in VOWELS)),
    ("write each character twice", "''.join(c + c for c in x)",
     lambda x, k: "".join(c + c for c in x)),
    ("leave out the first character", "x[1:]", lambda x, k: x[1:]),
    ("leave out the spaces", "x.replace(' ', '')", lambda x, k: x.replace(" ", "")),
    ("put its characters in order, as sorted() does", "''.join(sorted(x))",
     lambda x, k: "".join(sorted(x))),
    ("leave out characters that came before", "''.join(dict.fromkeys(x))",
     lambda x, k: "".join(dict.fromkeys(x))),
    ("reverse the order of its words", "' '.join(x.split()[::-1])",
     lambda x, k: " ".join(x.split()[::-1])),
    ("begin each word with a capital", "' '.join(w[:1].upper() + w[1:] for w in x.split())",
     lambda x, k: " ".join(w[:1].upper() + w[1:] for w in x.split())),
    ("take the first {k} characters", "x[:{k}]", lambda x, k: x[:k], 3, 6),
)  # fmt: skip
_COUNTED = (
    ("give its length", "len(x)", lambda x, k: len(x)),
    ("give how many vowels it has (a e i o u, small ones alone)",
     "sum(c in 'aeiou' for c in x)", lambda x, k: sum(c in VOWELS for c in x)),
    ("give how many words it has", "len(x.split())", lambda x, k: len(x.split())),
)  # fmt: skip
_ACROSS: tuple[tuple[Kind, Kind, tuple], ...] = (
    ("number", "numbers", ("make a list of its digits, without the sign",
                           "[int(d) for d in str(abs(x))]", lambda x, k: _digits(x))),
    ("number", "text", ("write it as text", "str(x)", lambda x, k: str(x))),
    ("text", "numbers", ("make a list of the lengths of its words",
                         "[len(w) for w in x.split()]", lambda x, k: [len(w) for w in x.split()])),
    ("numbers", "text", ("write the numbers as text, with spaces between",
                         "' '.join(map(str, x))", lambda x, k: " ".join(map(str, x)))),
)  # fmt: skip

STEPS: tuple[Step, ...] = (
    *(Step("numbers", "numbers", *step) for step in _NUMBERS),
    *(Step("numbers", "number", *step) for step in _REDUCED),
    *(Step("number", "number", *step) for step in _NUMBER),
    *(Step("text", "text", *step) for step in _TEXT),
    *(Step("text", "number", *step) for step in _COUNTED),
    *(Step(takes, gives, *step) for takes, gives, step in _ACROSS),
)
