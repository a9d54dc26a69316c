"""The guard of verse: what it pays for, against the same counted anew, and how it goes on."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest

from qiusuo.data.corpora import open_corpus
from qiusuo.tasks.parity import Parity
from qiusuo.tasks.task import Problem, Verdict
from qiusuo.tasks.verse import Verse, make_problem, read_poem
from qiusuo.tasks.verse_novelty import COMMON, VerseNovelty
from qiusuo.tasks.verse_rules import FORMS, verse_lines

TOWER = "白日依山尽，\n黄河入海流。\n欲穷千里目，\n更上一层楼。"
POEM = f"《登鹳雀楼》王之涣\n{TOWER}\n"
ASKED = make_problem(FORMS["五绝"], "尤", "登鹳雀楼")


def right(verse: str) -> Verdict:
    return Verdict(1.0, verse, "right")


def written() -> list[tuple[Problem, str]]:
    """Quatrains of the corpus, some of them twice."""
    verses = [read_poem(poem)[1].strip() for poem in islice(open_corpus("tang-poems").read(), 900)]
    form = FORMS["五绝"]
    some = [verse for verse in verses if verse_lines(verse, form)]
    chance = random.Random(0)
    problem = make_problem(form, None, "春")
    return [(problem, chance.choice(some)) for _ in range(150)]


def by_counting(window: int, known: set[str], before: list[tuple[str, ...]], lines) -> float:
    """The figure, from the poems of late alone."""
    late = before[-window:]
    grams = {line[at : at + 3] for line in lines for at in range(len(line) - 2)}
    fresh = [gram for gram in grams if not any(gram in line for poem in late for line in poem)]
    worth = []
    for char in {line[-1] for line in lines[1::2]}:
        uses = 1 + sum(any(line[-1] == char for line in poem[1::2]) for poem in late)
        worth.append(min(1.0, max(1.0, COMMON * window) / uses))
    own = [line for line in lines if line not in known]
    return len(fresh) / len(grams) * sum(worth) / len(worth) * len(own) / len(lines)


@pytest.mark.parametrize("window", [5, 60, 1000])
def test_the_figure_is_what_counting_gives(window: int) -> None:
    poems = written()
    copied = poems[3][1]
    guard = VerseNovelty([copied], window)
    known = set(verse_lines(copied, FORMS["五绝"]) or ())
    before: list[tuple[str, ...]] = []
    figures = []
    for problem, verse in poems:
        lines = verse_lines(verse, FORMS["五绝"])
        assert lines
        expected = by_counting(window, known, before, lines)
        figures.append(guard.judge(problem, right(verse)))
        assert figures[-1] == pytest.approx(expected)
        before.append(lines)
    assert min(figures) == 0
    assert max(figures) > 0.9


def test_a_collapse_costs_what_it_hides() -> None:
    """One rhyme character for ever, in lines that are new each time."""
    chance = random.Random(0)
    guard = VerseNovelty(window=200)

    def verse(end: str) -> str:
        lines = ["".join(chr(chance.randint(0x4E00, 0x8000)) for _ in range(5)) for _ in range(4)]
        lines[3] = lines[3][:4] + end
        return "{}，\n{}。\n{}，\n{}。".format(*lines)

    same = [guard.judge(ASKED, right(verse("风"))) for _ in range(200)]
    assert same[0] == 1
    assert same[-1] < 0.6  # one of its two rhyme characters is worth next to nothing
    varied = [guard.judge(ASKED, right(verse(chr(0x5000 + at)))) for at in range(200)]
    assert varied[-1] == 1


def test_copies_and_repetitions_get_nothing() -> None:
    guard = Verse(poems=[POEM]).guard()
    assert guard.judge(ASKED, right(TOWER)) == 0
    fresh = Verse().guard([])
    assert fresh.judge(ASKED, right(f"《登鹳雀楼》\n{TOWER}")) == 1
    assert fresh.judge(ASKED, right(TOWER)) == 0


@pytest.mark.parametrize("answer", [None, "", "《", "白日", TOWER * 2, "《春》\n" + TOWER])
def test_what_is_no_poem_gets_nothing_and_is_forgotten(answer: str | None) -> None:
    guard = Verse().guard()
    assert guard.judge(ASKED, Verdict(0.0, answer, "not the asked form")) == 0
    assert guard.state_dict() == {"recent": []}


def test_a_guard_goes_on_where_it_stopped() -> None:
    poems = written()
    whole = VerseNovelty(window=40)
    figures = [whole.judge(problem, right(verse)) for problem, verse in poems]
    first, second = VerseNovelty(window=40), VerseNovelty(window=40)
    head = [first.judge(problem, right(verse)) for problem, verse in poems[:70]]
    second.judge(*[(problem, right(verse)) for problem, verse in poems][-1])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    tail = [second.judge(problem, right(verse)) for problem, verse in poems[70:]]
    assert head + tail == figures
    assert second.state_dict() == whole.state_dict()


def test_other_tasks_have_no_guard() -> None:
    assert Parity().guard() is None
