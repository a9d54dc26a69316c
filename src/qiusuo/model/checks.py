"""Checks of what a config says, and the one error for all of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

# Beyond these a config is no model's but a mistake, or made to take all memory.
LARGEST = 2**31
MOST_LAYERS, MOST_EXPERTS = 1024, 65536


class ConfigError(ValueError):
    """A configuration that cannot be a model; the message names the key and the remedy."""


def check_numbers(
    holder: Any,
    keys: Iterable[str],
    *,
    whole: bool = False,
    least: int | None = None,
    prefix: str = "",
) -> None:
    """Every key above zero, or at least ``least``, and below ``LARGEST``."""
    for key in keys:
        value = getattr(holder, key)
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right or not (value > 0 if least is None else value >= least):
            kind = "positive" if least is None else "not negative"
            raise ConfigError(
                f"{prefix}{key} must be a {'whole ' if whole else ''}number, {kind}, not {value!r}"
            )
        check_most(prefix + key, value, LARGEST - 1)


def check_most(name: str, value: float, most: int) -> None:
    if value > most:
        raise ConfigError(f"{name} {value} is beyond what any model has (at most {most:,})")


def check_table(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be an object, not {value!r}")


def check_token_ids(holder: Any, keys: Iterable[str]) -> None:
    """Each the number of a token, or none; several in a tuple."""
    for key in keys:
        value = getattr(holder, key)
        for number in value if isinstance(value, tuple) else (value,):
            right = type(number) is int and 0 <= number < LARGEST
            if not right and (number is not None or isinstance(value, tuple)):
                raise ConfigError(f"{key} must be the number of a token, not {number!r}")


def check_booleans(holder: Any, keys: Iterable[str]) -> None:
    for key in keys:
        if not isinstance(getattr(holder, key), bool):
            raise ConfigError(f"{key} must be true or false, not {getattr(holder, key)!r}")


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint at the right spelling of a misspelt key, or nothing."""
    near = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
