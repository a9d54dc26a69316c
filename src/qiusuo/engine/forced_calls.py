"""Answers that must be calls of tools: the grammar that forces one, in the model's own format.

What stands around a call's name and arguments is not written down here for every format: the
model's own template is asked to write two calls, and what it puts before, inside, between and
behind them is the frame. Marks that are tokens of the vocabulary are forced as these tokens, all
else as text; a name is one of the tools', and the arguments are JSON of its schema. So what is
forced is what the model was taught to write, and what its parser reads back.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qiusuo.data.errors import DataError, unknown
from qiusuo.data.template_guard import spelling_pattern
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.tool_format import MARKS, Frame, frame_written
from qiusuo.engine.constraint import Constraint, Grammars, Matcher
from qiusuo.engine.sampling import Sampling

Tool = Mapping[str, Any]

NEVER = -100.0  # added to a logit

# As `json.dumps` writes it: free white space is where a weak model stays for ever.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def forced_matchers(
    grammars: Grammars,
    tokenizer: Tokenizer,
    tools: Sequence[Tool],
    must_call: str | bool,
    count: int,
    after_thought: bool = False,
) -> tuple[Matcher, ...]:
    """``count`` matchers, each at the start of an answer that calls: one tool or several where
    ``must_call`` is True, exactly once the one that it names. ``after_thought`` leaves room for
    the line ends that models write behind a thought. DataError, naming the tool, for one that is
    not there or has a schema that cannot be followed, and where the template writes no calls."""
    chosen = [tool.get("function", tool) for tool in tools]
    if must_call is not True:
        names = [tool.get("name") for tool in chosen]
        if must_call not in names:
            raise unknown("tool", str(must_call), list(map(str, names)))
        chosen = [chosen[names.index(must_call)]]
    if not chosen:
        raise DataError("a call is asked for and there are no tools: give some")
    frame = frame_of(tokenizer)
    own = copy.copy(grammars)  # the same vocabulary and store of grammars
    own.never_W = grammars.never_W.copy()
    own.never_W[[tokenizer.special_tokens[mark] for mark in _marks(tokenizer, frame)]] = False

    def matcher(functions: Sequence[Tool]) -> Matcher:
        grammar = _grammar(tokenizer, frame, functions, must_call is True, after_thought)
        return own.matcher(Constraint("grammar", grammar))

    try:
        return tuple(matcher(chosen) for _ in range(count))
    except DataError:
        for function in chosen:  # say which of them
            try:
                matcher([function])
            except DataError as error:
                raise DataError(f"tool {function.get('name')!r}: {error}") from error
        raise


def never_calling(tokenizer: Tokenizer, sampling: Sampling) -> Sampling:
    """The same without the marks that begin a call: told of no tools, a model that sees earlier
    calls may go on calling. Where a vocabulary spells its marks, nothing keeps it from that."""
    known = tokenizer.special_tokens
    marks = [mark for begins, _ in MARKS.values() for mark in begins if mark in known]
    never = {known[mark]: NEVER for mark in marks}
    return replace(sampling, logit_bias={**sampling.logit_bias, **never})


def frame_of(tokenizer: Tokenizer) -> Frame:
    """DataError where this model's template writes no calls in a format that is read back."""
    frame = frame_written(tokenizer.chat_template) if tokenizer.chat_template else None
    if frame is None:
        raise DataError(
            "this model's chat template writes no calls of tools in a known format: do not ask for "
            "one"
        )
    return frame


def _marks(tokenizer: Tokenizer, frame: Frame) -> set[str]:
    """The frame's marks that are tokens of the vocabulary."""
    pattern = spelling_pattern(tokenizer.special_tokens)
    return {mark for text in vars(frame).values() for mark in pattern.findall(text)}


def _grammar(
    tokenizer: Tokenizer,
    frame: Frame,
    functions: Sequence[Tool],
    several: bool,
    after_thought: bool,
) -> str:
    """In llguidance's Lark: ``<[7]>`` is the token with this id, ``%json`` a schema."""
    opening, naming, between, closing = (
        _piece(tokenizer, text)
        for text in (frame.opening, frame.naming, frame.between, frame.closing)
    )
    calls = [
        f"{_text(json.dumps(_name(one), ensure_ascii=False)[1:-1])} {naming} arguments_{place}"
        for place, one in enumerate(functions)
    ]
    rules = [
        f"start: {'SPACE? ' if after_thought else ''}{opening} call "
        f"{f'({between} call)*' if several else ''} {closing}",
        f"call: {' | '.join(calls)}",
        *(f"arguments_{place}: %json {_schema(one)}" for place, one in enumerate(functions)),
    ]
    return "\n".join(rules + ["SPACE: /\\n{1,2}/"] * after_thought)


def _piece(tokenizer: Tokenizer, text: str) -> str:
    """A part of the frame: its marks as tokens, the rest as text."""
    parts, place = [], 0
    for match in spelling_pattern(tokenizer.special_tokens).finditer(text):
        parts += [_text(text[place : match.start()]), f"<[{tokenizer.special_tokens[match[0]]}]>"]
        place = match.end()
    return " ".join(filter(None, [*parts, _text(text[place:])]))


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _name(function: Tool) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"a tool needs a name, not {name!r}")
    return name


def _schema(function: Tool) -> str:
    """The tool's parameters, which are an object whatever else they are."""
    schema = function.get("parameters")
    if schema is not None and not isinstance(schema, Mapping):
        raise DataError(f"its parameters must be a JSON schema, not {type(schema).__name__}")
    kind = (schema or {}).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise DataError(f"its parameters must be a schema of an object, not of type {kind!r}")
    try:
        return json.dumps(
            {**(schema or {}), "type": "object", "x-guidance": WRITTEN}, ensure_ascii=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"its parameters cannot be read as a JSON schema: {error}") from error
