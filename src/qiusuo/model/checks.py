"""Checks of what a config says, and the one error for all of it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


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
    """Every key above zero, or at least ``least``."""
    for key in keys:
        value = getattr(holder, key)
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right or not (value > 0 if least is None else value >= least) or value == math.inf:
            kind = "positive" if least is None else "not negative"
            raise ConfigError(
                f"{prefix}{key} must be a {'whole ' if whole else ''}number, {kind}, not {value!r}"
            )


def check_booleans(holder: Any, keys: Iterable[str]) -> None:
    for key in keys:
        if not isinstance(getattr(holder, key), bool):
            raise ConfigError(f"{key} must be true or false, not {getattr(holder, key)!r}")


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint at the right spelling of a misspelt key, or nothing."""
    near = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
