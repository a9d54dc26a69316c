"""The guards beside the reward, against the same found by trying everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.tasks.verse_guards import WINDOW, Corpus, distinct_trigrams, top_rhyme_character

FEW = st.text("山水风月", max_size=30)


def longest_common_run(one: str, texts: list[str]) -> int:
    return max(
        (
            end - start
            for start in range(len(one))
            for end in range(start + 1, len(one) + 1)
            if any(one[start:end] in text for text in texts)
        ),
        default=0,
    )


@given(st.lists(FEW, max_size=4), FEW)
def test_the_longest_overlap_is_the_longest_there_is(texts: list[str], poem: str) -> None:
    corpus = Corpus(texts)
    found = corpus.longest_overlap([poem])
    assert len(found) == longest_common_run(poem, texts)
    assert found in poem
    assert not found or any(found in text for text in texts)


@given(st.lists(FEW, max_size=4), FEW)
def test_novelty_counts_unseen_trigrams(texts: list[str], poem: str) -> None:
    grams = [poem[at : at + 3] for at in range(len(poem) - 2)]
    unseen = [gram for gram in grams if not any(gram in text for text in texts)]
    expected = len(unseen) / len(grams) if grams else 1.0
    assert Corpus(texts).novelty([poem]) == expected


def test_a_run_crosses_lines_and_not_poems() -> None:
    corpus = Corpus(["白日依山尽，\n黄河入海流。", "欲穷千里目，\n更上一层楼。"])
    assert corpus.longest_overlap(["依山尽黄河", "入春夜风雨"]) == "依山尽黄河入"
    assert corpus.longest_overlap(["入海流欲穷"]) == "入海流"


def test_runs_are_compared_for_a_window() -> None:
    long = "".join(chr(0x4E00 + place) for place in range(2 * WINDOW))
    assert Corpus([long, long]).longest_overlap([long]) == long[:WINDOW]


def test_copied_lines() -> None:
    corpus = Corpus(["白日依山尽，\n黄河入海流。"])
    assert corpus.copied_lines(["黄河入海流", "春夜闻风雨"]) == 0.5
    assert corpus.copied_lines([]) == 0.0


def test_a_collapse_shows() -> None:
    varied = [("一二三四尽", "一二三四流"), ("五六七八目", "五六七八楼")]
    same = [("一二三四尽", "一二三四风"), ("五六七八目", "五六七八风")]
    assert top_rhyme_character(varied)[1] == 0.5
    assert top_rhyme_character(same) == ("风", 1.0)
    assert top_rhyme_character([]) == ("", 0.0)
    # Counted once a poem, however often it ends a line there.
    assert top_rhyme_character([("a", "风", "a", "风"), ("a", "山")])[1] == 0.5
    assert distinct_trigrams([("一二三四",)]) == 1.0
    assert distinct_trigrams([("一二三四",)] * 4) == pytest.approx(0.25)
    assert distinct_trigrams([]) == 1.0
