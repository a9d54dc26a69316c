"""Numbers as people read them: thousands separated, few digits, a unit that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def format_fact(fact: Any) -> str:
    """A value of `summary.json` in words: 1234567 → "1,234,567", with its unit if it has one."""
    if isinstance(fact, Mapping):
        return _format_mapping(fact)
    if isinstance(fact, list | tuple):
        return "; ".join(format_fact(item) for item in fact)
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if isinstance(fact, int):
        return f"{fact:,}"
    if isinstance(fact, float):
        return format_number(fact)
    return "–" if fact is None else str(fact)


def _format_mapping(fact: Mapping[str, Any]) -> str:
    if "value" in fact:
        return f"{format_fact(fact['value'])} {fact.get('unit') or ''}".strip()
    if "name" in fact:
        more = [str(fact[key]) for key in ("license", "source") if fact.get(key)]
        return f"{fact['name']} ({', '.join(more)})" if more else str(fact["name"])
    return ", ".join(f"{key} {format_fact(value)}" for key, value in fact.items())


def format_number(value: float, digits: int = 4) -> str:
    """`value` to about `digits` significant digits, with thousands separated."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.{digits - 2}e}"
    places = digits - 1 - math.floor(math.log10(size)) if size else 0
    return f"{value:,.{max(places, 0)}f}"


def format_duration(seconds: float) -> str:
    """`seconds` for a person: "48 s", "12 min 5 s", "3 h 20 min", "2 d 4 h"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    whole = round(seconds)
    for size, unit, smaller, name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit} {rest} {name}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def format_large(count: float) -> str:
    """`count` with three digits and a letter: 3145728 → "3.15 M"."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            scaled = count / (1e3 if letter == "k" else size)
            return f"{format_number(scaled, 3)} {letter}"
    return format_number(count, 3) if count % 1 else f"{count:,.0f}"


def format_bytes(count: float) -> str:
    """`count` bytes for people, as data/cache.py shows sizes: "1.5 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
