"""Choosing parts of a model by name: what a recipe lists, and what that means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from qiusuo.model.checks import nearest
from qiusuo.training.recipe import RecipeError


def named_by(patterns: Iterable[str], names: Sequence[str], what: str) -> list[str]:
    """The names that any pattern fits, in their own order. A pattern is the end of a name, whole
    words of it, and may hold * and ?: "q_proj", "self_attn.*", "layers.3.*". RecipeError for one
    that fits nothing; ``what`` says in its message what the names are of."""
    found: set[str] = set()
    for pattern in patterns:
        fits = {n for n in names if any(fnmatchcase(n, p) for p in (pattern, f"*.{pattern}"))}
        if not fits:
            words = {word for name in names for word in name.split(".")}
            raise RecipeError(f"{pattern!r} fits the name of no {what}{nearest(pattern, words)}")
        found |= fits
    return [name for name in names if name in found]
