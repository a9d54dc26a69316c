"""Writing TOML: Python reads it (`tomllib`) but does not write it.

Only what a recipe holds: tables, lists, strings, whole and real numbers, truth values. TOML
has no null, so a None in a table is left out (absent means default); in a list it would shift
its neighbours, so there it is an error. Whatever is written reads back equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qiusuo.runs.durable import RunError

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\t": "\\t",
    "\n": "\\n",
    "\f": "\\f",
    "\r": "\\r",
}


def dump_toml(document: Mapping[str, Any]) -> str:
    """`document` as TOML text, such that `tomllib.loads` gives it back without its Nones.

    Raises RunError naming the key for a value that TOML cannot hold.
    """
    return "\n".join(_table(_without_none(document, ()), ())).lstrip("\n") + "\n"


def _without_none(value: Any, path: tuple[str, ...]) -> Any:
    """Tuples become lists, None values of tables go; everything else is checked on writing."""
    if isinstance(value, Mapping):
        clean = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise RunError(f"recipe key {key!r} in {_name(path)} is not a string")
            if item is not None:
                clean[key] = _without_none(item, (*path, key))
        return clean
    if isinstance(value, list | tuple):
        return [_without_none(item, (*path, str(i))) for i, item in enumerate(value)]
    return value


def _table(table: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    # Plain values come first: after a [header] they would belong to that header's table.
    for key, value in table.items():
        if not _has_header(value):
            yield f"{_key(key)} = {_inline(value, (*path, key))}"
    for key, value in table.items():
        if not _has_header(value):
            continue
        inner = (*path, key)
        header = ".".join(_key(part) for part in inner)
        if isinstance(value, dict):
            # A table of nothing but tables is implied by their headers.
            if not value or not all(_has_header(item) for item in value.values()):
                yield f"\n[{header}]"
            yield from _table(value, inner)
        else:
            for item in value:
                yield f"\n[[{header}]]"
                yield from _table(item, inner)


def _has_header(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, dict) for item in value)
    return isinstance(value, dict)


def _inline(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value, path)
    if isinstance(value, int | float):
        # Python's "nan", "-inf" and "1e-05" are TOML as they are; a subclass's repr is not.
        return repr(int(value) if isinstance(value, int) else float(value))
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item, path) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{_key(key)} = {_inline(item, (*path, key))}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    raise RunError(
        f"recipe value {_name(path)} is {value!r} of type {type(value).__name__}; "
        "a recipe holds strings, numbers, true/false, lists and tables"
    )


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key, (key,))


def _string(text: str, path: tuple[str, ...]) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RunError(f"recipe text {_name(path)} is not valid Unicode: {error}") from error
    escaped = (
        _ESCAPES.get(char) or (f"\\u{ord(char):04x}" if char < " " or char == "\x7f" else char)
        for char in text
    )
    return '"' + "".join(escaped) + '"'


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path) or "the recipe"
