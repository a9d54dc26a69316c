"""What a chat template may take: so many steps, so many seconds, texts so long.

A template comes with the weights, from anyone, and Jinja's sandbox keeps it from the machine but
not from its time and memory: three nested loops, or ``"a" * 10**10``, would do. So every pass of a
loop, every call and every filter is counted, and what makes text longer is told before it is made
or, where it can at most double, after. What is left is a list that holds itself many times over.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

MOST_STEPS = 1_000_000
MOST_SECONDS = 20.0
LONGEST = 1 << 24  # characters, or elements: more than any context holds
# A width in a format that is large, or comes from somewhere else.
WIDE = re.compile(r"%[^A-Za-z%]*(\*|[0-9]{6})|\{[^{}]*:[^{}]*([0-9]{6}|\{)")
COUNTED, MEASURED = "_counted", "_measured"


class LimitError(RuntimeError):
    """A template that takes more than any conversation needs."""


class Budget:
    """What is left for one rendering."""

    def __init__(self) -> None:
        self.steps, self.deadline = MOST_STEPS, time.monotonic() + MOST_SECONDS

    def spend(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise LimitError(f"it takes more than {MOST_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise LimitError(f"it takes longer than {MOST_SECONDS:.0f} seconds")


_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def limited() -> Iterator[None]:
    """Hold a new budget while one template is compiled or rendered."""
    token = _budget.set(Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with a budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]
        self.limit_filters()

    def limit_filters(self) -> None:
        """To be called again when filters were added."""
        for name, function in self.filters.items():
            if not hasattr(function, "limited"):
                self.filters[name] = _limited_filter(name, function)
        self.filters[COUNTED], self.filters[MEASURED] = _counted, measured

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **options: Any) -> str:
        return super()._generate(_Counting().visit(source), *args, **options)

    def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
        _budget.get().spend()
        if isinstance(text := getattr(function, "__self__", None), str):
            args = _checked_method(text, function.__name__, args)
        return measured(super().call(context, function, *args, **options))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget.get().spend()
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and hasattr(other, "__len__"):
                    _check_length(one * len(other))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_length(left.bit_length() * max(right, 0))
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return measured(super().call_binop(context, operator, left, right))


class _Counting(jinja2.visitor.NodeTransformer):
    """Puts what counts into loops, and what measures around ``~``."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(cast(jinja2.nodes.Expr, node.iter), COUNTED)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MEASURED)


def _filtered(node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Filter:
    made = jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
    assert node.environment is not None
    made.set_environment(node.environment)
    return made


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for item in items:
        budget.spend()
        yield item


def measured(value: Any) -> Any:
    """The value, if it is no text, list or number of a length that none needs."""
    if isinstance(value, str | list | tuple | dict):
        _check_length(len(value))
    elif isinstance(value, int):
        _check_length(value.bit_length())
    return value


def joined(pieces: Iterable[str]) -> str:
    """One text, given up as soon as it is too long."""
    budget, kept, length = _budget.get(), [], 0
    for piece in pieces:
        length += len(piece)
        _check_length(length)
        budget.spend()
        kept.append(piece)
    return "".join(kept)


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def limited_filter(*args: Any, **options: Any) -> Any:
        _budget.get().spend()
        # Before the value may stand the environment or the context.
        place = 1 if hasattr(function, "jinja_pass_arg") else 0
        value, rest = args[place], args[place + 1 :]
        for number in (*rest, *options.values()):
            if isinstance(number, int):
                _check_length(number)
        if name == "format":
            _check_format(str(value))
        if name == "replace":
            _check_replaced(str(value), *map(str, (*rest, *options.values())))
        if name == "join" and not isinstance(value, str):
            value = list(value)
            words = sum(len(word) for word in value if isinstance(word, str))
            _check_length(words + len(value) * sum(map(len, map(str, rest))))
            args = (*args[:place], value, *rest)
        return measured(function(*args, **options))

    limited_filter.limited = True  # type: ignore[attr-defined]
    return limited_filter


def _checked_method(text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a text's method, where they do not make it too long."""
    for number in args:
        if isinstance(number, int):
            _check_length(number)
    if name == "expandtabs":
        _check_length(len(text) * max([8, *(n for n in args if isinstance(n, int))]))
    if name == "replace":
        _check_replaced(text, *args)
    if name == "join" and args:
        args = (list(args[0]),)
        _check_length(sum(len(word) + len(text) for word in args[0] if isinstance(word, str)))
    return args


def _check_replaced(text: str, old: Any = "", new: Any = "", *_: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_length(len(text) + text.count(old) * len(new))


def _check_format(text: str) -> None:
    if WIDE.search(text.replace("%%", "")):
        raise LimitError("it formats with a width that no text has")


def _check_length(length: int) -> None:
    if length > LONGEST:
        raise LimitError(f"it makes something of more than {LONGEST:,} characters or elements")
