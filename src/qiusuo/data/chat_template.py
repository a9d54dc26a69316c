"""Messages to the text a model was trained to see, through the template that came with it.

A chat template is a Jinja program shipped with the weights, so it is run in a sandbox, within
limits of time and memory (template_limits.py). The same
environment as elsewhere (trimmed blocks, `tojson` that leaves Chinese alone, `raise_exception`,
`strftime_now`, loop controls, `{% generation %}`) lets other models' templates run unchanged: the
official ones come out byte for byte as transformers writes them (tests/conformance/).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qiusuo.data.errors import DataError, unknown

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""`role`, `content`, and by role `reasoning_content`, `tool_calls`, `prefix`, ..."""

# A role may become part of a marker (`<|user|>`), so it is never free text.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")

# `message['content'] is not none`, `message.content is none`
ASKS_FOR_NONE = re.compile(r"\bcontent\b['\"\]]*\s+is\s+(not\s+)?none\b", re.IGNORECASE)


@functools.cache
def default_template() -> str:
    """The template of the models made here."""
    return (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = True,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation as text.

    `variables` are what a template asks for beyond that: `documents`, `reasoning_effort`, ...
    A special token that is None is undefined to the template.

    The result is only text: a message that spells a special token is not told apart from the
    template's own. To get ids, use `Tokenizer.apply_chat_template`, which does tell them apart.
    `DataError` for an unknown role, a faulty template, or what the template itself refuses.
    """
    import jinja2

    from qiusuo.data.template_limits import limited

    check_messages(messages)
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    known: dict[str, Any] = {
        "documents": None,
        "thinking": thinking,
        "enable_thinking": thinking,  # the name that Qwen's templates know
        **(variables or {}),
        **{name: token for name, token in tokens.items() if token is not None},
        "messages": as_tested(messages, template),
        "add_generation_prompt": add_generation_prompt,
        "tools": list(tools) if tools else None,
    }
    try:
        with limited():
            return _render(template, known)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:  # a foreign program may raise anything
        raise DataError(f"the chat template refuses these messages: {error}") from error


def check_messages(messages: Sequence[Message]) -> None:
    """`DataError` unless this is a list of at least one message with a known role each."""
    if isinstance(messages, str | Mapping) or not messages:
        raise DataError(
            "messages must be a list with at least one message, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"message {index} must be a mapping with a role, not {message!r:.80}")
        if message["role"] not in ROLES:
            raise unknown("role", message["role"], ROLES)


def as_tested(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """The messages without fields that say nothing, in the form that this template tests for.

    Clients send `tool_calls: null` or `[]`, where DeepSeek-R1's template asks whether the key is
    there. Beside calls they send `content: null` or no content: DeepSeek's templates ask whether it
    is none and fail without the key, Qwen's search in it and fail on none. And they send a call's
    arguments as text, which DeepSeek's templates want; Qwen2.5's writes whatever it gets as JSON.
    """
    tested = []
    for message in messages:
        present = {
            key: value
            for key, value in message.items()
            if value is not None and not (key == "tool_calls" and value == [])
        }
        if message["role"] == "assistant":
            present.setdefault("content", None if ASKS_FOR_NONE.search(template) else "")
            if "tool_calls" in present and _wants_objects(template):
                present["tool_calls"] = _with_objects(present["tool_calls"])
        tested.append(present)
    return tested


@functools.lru_cache(maxsize=32)
def _wants_objects(template: str) -> bool:
    """Whether it does not write the arguments of a call as they stand in a text.

    It is asked with a call: those that can do both look at what they get."""
    from qiusuo.data.template_limits import limited

    def written(arguments: object) -> str:
        call = {"id": "0", "type": "function", "function": {"name": "f", "arguments": arguments}}
        content = None if ASKS_FOR_NONE.search(template) else ""
        turn = {"role": "assistant", "content": content, "tool_calls": [call]}
        known = dict.fromkeys(("documents", "tools")) | {
            "bos_token": "",
            "eos_token": "",
            "messages": [{"role": "user", "content": "?"}, turn],
        }
        try:
            with limited():
                return _render(template, known)
        except Exception:  # as in `render_chat`
            return ""

    value = {"probe": 1}
    text = json.dumps(value)
    return text not in written(text) and "probe" in written(value)


def _with_objects(calls: Any) -> Any:
    """Calls with the object that their text of arguments stands for."""
    return list(map(_with_object, calls)) if isinstance(calls, Sequence) else calls


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        value = json.loads(function["arguments"])
        json.dumps(value, ensure_ascii=False).encode()  # half a character cannot be written
    except (ValueError, RecursionError):  # a model may have written anything
        return call
    if not isinstance(value, dict):
        return call
    return {**call, "function": {**function, "arguments": value}}


def _render(template: str, known: Mapping[str, Any]) -> str:
    from qiusuo.data.template_limits import joined

    return joined(_compile(template).generate(known))


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.utils

    from qiusuo.data.template_limits import LimitedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's part for other trainers; here it is its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """A template's variables; names with an underscore would reach into Python."""

        def __init__(self, *parts: Any, **values: Any) -> None:
            super().__init__()
            for name, value in dict(*parts, **values).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template cannot set {name!r}")
            super().__setitem__(name, value)

    environment = LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.limit_filters()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = Namespace
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # The order of the options is that of transformers; a template may give them by place.
    from qiusuo.data.template_limits import joined

    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return joined(encoder.iterencode(value))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
