"""One kind of refusal for the whole room: it names the thing, what was expected, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Text, tokens or files that cannot be used as asked; the message says what to do."""


def unknown(what: str, name: str, known: Iterable[str]) -> DataError:
    """A `DataError` for a misspelt name, with the nearest right spellings or, failing that, all.

    >>> str(unknown("corpus", "tang-peoms", ["tang-poems", "austen"]))
    "unknown corpus 'tang-peoms': did you mean 'tang-poems'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return DataError(f"unknown {what} {name!r}: did you mean {' or '.join(map(repr, near))}?")
    listed = ", ".join(names[:40]) or "(none)"
    return DataError(f"unknown {what} {name!r}: known are {listed}")
