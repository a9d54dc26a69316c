"""What the name of a tensor says: which layer it belongs to, and where it stands in a list."""

from __future__ import annotations

DIGITS = 9  # longer numbers count nothing that could be there


def layer_of(name: str) -> int:
    """The layer a tensor belongs to; -1 for those outside the layers."""
    parts = name.split(".")
    numbered = len(parts) > 2 and parts[:2] == ["model", "layers"] and is_number(parts[2])
    return int(parts[2]) if numbered else -1


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key to sort names by: layer 2 before layer 10."""
    return [(0, int(p), "") if is_number(p) else (1, 0, p) for p in name.split(".")]


def is_number(word: str) -> bool:
    return word.isdecimal() and len(word) <= DIGITS
