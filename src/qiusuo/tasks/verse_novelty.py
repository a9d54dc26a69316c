"""A reward for being new, beside the reward of the rules: what keeps a poet from one poem for ever.

Rules pay for the thousandth poem on 风 as for the first, and a policy moves where the pay is safe
(`verse_guards` says how far). So each poem also gets a figure from 0 to 1, the product of

* the share of its trigrams that no poem of late has had,
* what its rhyme characters are worth: one in up to `COMMON` of the poems of late is worth 1, one in
  77% of them 0.05 / 0.77,
* the share of its lines that no poem of the corpus has word for word.

"Of late" is a window of the last poems judged, so what is overdone becomes new again. Poems are
judged in the order in which they come, and of two that are alike the second one is not new: judge
the poems of a step in a fixed order, and the figures are the same again.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from qiusuo.tasks.task import Problem, Verdict
from qiusuo.tasks.verse_guards import trigrams_of
from qiusuo.tasks.verse_rules import FORMS, verse_lines, without_head

WINDOW = 1024  # poems: four steps of 256 rollouts
COMMON = 0.05  # the most common rhyme character of Tang quatrains is in 4 to 6 of 100
RUN = re.compile(r"[\u4e00-\u9fff]+")


class VerseNovelty:
    """The guard of `Verse`. `verses` are those whose lines are not to be copied, title apart."""

    def __init__(self, verses: Iterable[str] = (), window: int = WINDOW) -> None:
        self.known = frozenset(line for verse in verses for line in RUN.findall(verse))
        self.window = window
        self._recent: deque[tuple[str, ...]] = deque()
        self._trigrams: Counter[str] = Counter()  # in how many poems of late
        self._rhymes: Counter[str] = Counter()

    def judge(self, problem: Problem, verdict: Verdict) -> float:
        """How new the answer is; it then is one of the poems of late. What is not of the asked
        form gets 0 and is forgotten."""
        form = FORMS[problem.data["form"]]
        verse = without_head(verdict.answer or "", problem.data["title"])
        lines = None if verse is None else verse_lines(verse, form)
        if lines is None:
            return 0.0
        novelty = self.novelty(lines)
        self._remember(lines)
        return novelty

    def novelty(self, lines: Sequence[str]) -> float:
        """The figure for lines without stops, which are not remembered."""
        trigrams, rhymes = set(trigrams_of(lines)), _rhymes(lines)
        fresh = sum(gram not in self._trigrams for gram in trigrams) / len(trigrams)
        # Of the whole window: while it fills, no character is in much of it.
        allowed = max(1.0, COMMON * self.window)
        rare = fmean(min(1.0, allowed / (1 + self._rhymes[char])) for char in rhymes)
        own = sum(line not in self.known for line in lines) / len(lines)
        return fresh * rare * own

    def state_dict(self) -> dict[str, Any]:
        """The poems of late, as JSON takes them. The corpus is not in it."""
        return {"recent": [list(lines) for lines in self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._recent.clear()
        self._trigrams.clear()
        self._rhymes.clear()
        for lines in state["recent"]:
            self._remember(tuple(lines))

    def _remember(self, lines: tuple[str, ...]) -> None:
        self._recent.append(lines)
        self._trigrams.update(set(trigrams_of(lines)))
        self._rhymes.update(_rhymes(lines))
        if len(self._recent) > self.window:
            gone = self._recent.popleft()
            for counts, what in (
                (self._trigrams, set(trigrams_of(gone))),
                (self._rhymes, _rhymes(gone)),
            ):
                counts.subtract(what)
                for one in what:
                    if not counts[one]:
                        del counts[one]


def _rhymes(lines: Sequence[str]) -> set[str]:
    return {line[-1] for line in lines[1::2]}
