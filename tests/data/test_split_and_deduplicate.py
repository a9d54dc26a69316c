"""Which documents are trained on, which validate, which are copies."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.data.corpora import Corpus, open_corpus
from qiusuo.data.deduplicate import ExactDuplicates, NearDuplicates, shingles
from qiusuo.data.errors import DataError
from qiusuo.data.split import split_corpus

from .conftest import make_documents


def corpus_of(texts: list[str]) -> Corpus:
    return Corpus("test", "memory", "none", lambda: iter(texts), lambda: "0")


@settings(deadline=None, max_examples=100)
@given(
    texts=st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=30),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 1 << 40),
)
def test_every_document_is_on_one_side(texts: list[str], fraction: float, seed: int) -> None:
    if len(set(texts)) == 1:
        with pytest.raises(DataError, match="over and over"):
            split_corpus(corpus_of(texts), validation_fraction=fraction, seed=seed)
        return
    split = split_corpus(corpus_of(texts), validation_fraction=fraction, seed=seed)
    train, validation = list(split.train()), list(split.validation())
    assert sorted(train + validation) == sorted(texts)
    assert train
    assert validation
    assert not set(train) & set(validation)
    again = split_corpus(corpus_of(texts), validation_fraction=fraction, seed=seed)
    assert list(again.train()) == train


def test_fraction_and_stability() -> None:
    texts = make_documents(2000)
    split = split_corpus(corpus_of(texts), validation_fraction=0.1)
    validation = set(split.validation())
    assert 150 < len(validation) < 250
    fewer = split_corpus(corpus_of(texts[:1000]), validation_fraction=0.1)
    assert set(fewer.validation()) == validation & set(texts[:1000])
    other = split_corpus(corpus_of(texts), validation_fraction=0.1, seed=1)
    assert set(other.validation()) != validation
    whole = split_corpus(corpus_of(texts), validation_fraction=0)
    assert list(whole.train()) == texts
    assert not list(whole.validation())


def test_one_document_is_cut_as_nanogpt_does() -> None:
    split = split_corpus(open_corpus("tinyshakespeare"))
    [train], [validation] = split.train(), split.validation()
    assert (len(train), len(validation)) == (1_003_854, 111_540)
    assert train + validation == next(open_corpus("tinyshakespeare").documents())


def test_splits_that_cannot_be_made() -> None:
    with pytest.raises(DataError, match="too short to hold out"):
        split_corpus(corpus_of(["a"]))
    with pytest.raises(DataError, match=r"must be in \[0, 1\), not 1"):
        split_corpus(corpus_of(["a", "b"]), validation_fraction=1)
    with pytest.raises(DataError, match="seed must not be negative"):
        split_corpus(corpus_of(["a", "b"]), seed=-1)


def test_corpus_that_changes_is_noticed() -> None:
    texts = ["a", "b", "c"]
    split = split_corpus(corpus_of(texts))
    texts.append("d")
    with pytest.raises(DataError, match="changed while it was read: 4 documents, before 3"):
        list(split.train())


def test_dropped_documents_are_on_no_side() -> None:
    texts = make_documents(50)
    split = split_corpus(corpus_of(texts * 2), keep=ExactDuplicates().keep)
    assert split.dropped == 50
    assert sorted([*split.train(), *split.validation()]) == sorted(texts)
    # The one that remains is still cut by characters.
    one = split_corpus(corpus_of(["0123456789", "0123456789 "]), keep=ExactDuplicates().keep)
    assert (list(one.train()), list(one.validation())) == (["012345678"], ["9"])


def test_exact_duplicates() -> None:
    texts = ["Hello  world", "hello world\n", "ＡＢＣ", "abc", "床前明月光", "床前明月光，"]
    exact = ExactDuplicates()
    assert list(exact.filter(texts)) == ["Hello  world", "ＡＢＣ", "床前明月光", "床前明月光，"]
    assert (exact.kept, exact.dropped) == (4, 2)


def test_shingles_know_words_and_characters() -> None:
    assert shingles("The cat sat, DOWN") == ["cat\x1fsat\x1fdown", "the\x1fcat\x1fsat"]
    assert shingles("明月光a b") == sorted(["明\x1f月\x1f光", "月\x1f光\x1fa", "光\x1fa\x1fb"])
    assert shingles("床前") == ["床\x1f前"]
    assert shingles("") == [""]


@pytest.mark.parametrize("alphabet", ["word{} ", "{}"])
def test_near_duplicates(alphabet: str) -> None:
    generator = random.Random(0)
    units = [alphabet.format(chr(0x4E00 + i) if alphabet == "{}" else i) for i in range(2000)]
    originals = [generator.choices(units, k=200) for _ in range(30)]
    close = [[*text[:100], *generator.choices(units, k=2), *text[100:]] for text in originals]
    far = [[*text[:100], *generator.choices(units, k=100)] for text in originals]
    near = NearDuplicates(0.8)
    kept = list(near.filter("".join(text) for text in originals + close + far))
    assert kept == ["".join(text) for text in originals + far]
    assert (near.kept, near.dropped) == (60, 30)


def test_threshold_must_make_sense() -> None:
    with pytest.raises(DataError, match="threshold must be in"):
        NearDuplicates(0.0)
