"""Expressions of whole numbers: written by a model, read by a parser of our own, never evaluated.

    sum    = product (("+" | "-") product)*
    product = factor (("*" | "/") factor)*
    factor = number | "(" sum ")"

Values are exact fractions. Length, depth and the size of numbers are bounded, so any text whatever
is read or refused in little time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

MAX_LENGTH = 120
MAX_DEPTH = 12
TOKEN = re.compile(r" *(?:(0|[1-9][0-9]{0,5})(?![0-9])|([-+*/()]))")


class ExpressionError(ValueError):
    """Text that is no expression; the message says why, without the text."""


@dataclass(frozen=True)
class Expression:
    """The value of an expression and the numbers that stand in it, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def read_expression(text: str) -> Expression:
    """The expression that `text` is, wholly; spaces between its parts are free.

    `ExpressionError` for anything else: other characters, numbers of over six digits or with
    leading zeros, signs, a division by zero, over 120 characters, over 12 brackets deep.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError("the expression is too long")
    tokens: list[str] = []
    end, stop = 0, len(text.rstrip(" "))
    while end < stop:
        match = TOKEN.match(text, end)
        if not match:
            raise ExpressionError("not an expression")
        tokens.append(match[1] or match[2])
        end = match.end()
    reader = _Reader(tokens)
    value = reader.sum(0)
    if reader.place != len(tokens):
        raise ExpressionError("not an expression")
    return Expression(value, tuple(reader.numbers))


@dataclass
class _Reader:
    tokens: list[str]
    place: int = 0
    numbers: list[int] = field(default_factory=list)

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self._next() in ("+", "-"):
            sign = -1 if self._take() == "-" else 1
            value += sign * self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while self._next() in ("*", "/"):
            divides = self._take() == "/"
            right = self.factor(depth)
            if divides and not right:
                raise ExpressionError("a division by zero")
            value = value / right if divides else value * right
        return value

    def factor(self, depth: int) -> Fraction:
        token = self._take()
        if token.isdigit():
            self.numbers.append(int(token))
            return Fraction(int(token))
        if token != "(":
            raise ExpressionError("not an expression")
        if depth == MAX_DEPTH:
            raise ExpressionError("brackets too deep")
        value = self.sum(depth + 1)
        if self._take() != ")":
            raise ExpressionError("a bracket is not closed")
        return value

    def _next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self.place += 1
        return token
