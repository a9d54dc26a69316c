"""What to watch while rules are the reward: the ways in which verse may pass every rule and be bad.

Nothing in the rules forbids to write one poem for ever, to end each on 风, or to copy a Tang poem.
A policy finds that: in a pilot, poems on the most common rhyme character rose from 4% to 77%
while the count of distinct lines showed nothing. So these stand beside the reward in a log. They
judge lines without stops, as `verse_lines` gives them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

WINDOW = 64  # characters compared at most: longer than any regular poem's 56


def top_rhyme_character(poems: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The rhyme character that most poems use, and the share of the poems that use it."""
    uses = Counter(char for lines in poems for char in {line[-1] for line in lines[1::2]})
    if not uses:
        return "", 0.0
    char, count = uses.most_common(1)[0]
    return char, count / len(poems)


def trigrams_of(lines: Sequence[str]) -> list[str]:
    """Every three characters that follow each other within a line."""
    return [line[place : place + 3] for line in lines for place in range(len(line) - 2)]


def distinct_trigrams(poems: Iterable[Sequence[str]]) -> float:
    """Distinct trigrams of characters within lines, as a share of all; 1.0 if there are none."""
    found = [gram for lines in poems for gram in trigrams_of(lines)]
    return len(set(found)) / len(found) if found else 1.0


class Corpus:
    """Texts to compare with: an index of every place in them, sorted by what follows (a suffix
    array of characters), so that the longest common run is exact and takes no time.

    Only Han characters count; a run may cross the stops between lines and not a text's end. The
    built-in Tang poems (1.4 million characters) take two seconds and, while it is built, 80 MB; a
    poem's overlap then takes a millisecond.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.text = "\n".join(map(_han, texts))
        self.places = _suffix_array(self.text)

    def longest_overlap(self, lines: Sequence[str]) -> str:
        """The longest run of the poem's characters that stands in the corpus (64 at most)."""
        poem = _han("".join(lines))
        best = ""
        for start in range(len(poem)):
            found = self._longest_prefix(poem[start : start + WINDOW])
            best = max(best, found, key=len)
        return best

    def copied_lines(self, lines: Sequence[str]) -> float:
        """Share of the lines that stand in the corpus as they are."""
        return sum(line in self for line in lines) / len(lines) if lines else 0.0

    def novelty(self, lines: Sequence[str]) -> float:
        """Share of the trigrams within lines that the corpus does not have; 1.0 without any."""
        grams = trigrams_of(lines)
        return sum(gram not in self for gram in grams) / len(grams) if grams else 1.0

    def __contains__(self, run: str) -> bool:
        return self._longest_prefix(run[:WINDOW]) == run[:WINDOW]

    def _longest_prefix(self, run: str) -> str:
        """The longest beginning of `run` in the corpus: a neighbour in sorted order has it."""
        index = bisect_left(self.places, run, key=self._following)
        beside = self.places[max(index - 1, 0) : index + 1]
        return max((_common_start(run, self._following(p)) for p in beside), key=len, default="")

    def _following(self, place: int) -> str:
        return self.text[place : place + WINDOW]


def _common_start(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    length = next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other))
    )
    return one[:length]


def _han(text: str) -> str:
    return "".join(char for char in text if "\u4e00" <= char <= "\u9fff")


def _suffix_array(text: str) -> np.ndarray:
    """Places sorted by the `WINDOW` characters from each on, by doubling: the order by 2k
    characters is that of the pairs (rank by k here, rank by k at k further on)."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    if not len(codes):
        return np.zeros(0, dtype=np.int64)
    rank = np.unique(codes, return_inverse=True)[1].astype(np.int64) + 1
    order = np.argsort(rank, kind="stable")
    width = 1
    while width < WINDOW:
        pairs = rank * (len(codes) + 1)
        pairs[:-width] += rank[width:]
        order = np.argsort(pairs, kind="stable")
        ordered = pairs[order]
        rank[order] = np.concatenate(([1], 1 + np.cumsum(ordered[1:] != ordered[:-1])))
        if rank[order[-1]] == len(codes):
            break
        width *= 2
    return order
