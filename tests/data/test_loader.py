"""Rows for training and validation: which tokens they hold, and that a saved loader goes on."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.data.batch import Batch
from qiusuo.data.errors import DataError
from qiusuo.data.loader import Loader
from qiusuo.data.randomness import fractions, permutation
from qiusuo.data.shards import Shards, write_shards
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.validation import validation_batches

from .conftest import make_documents


@pytest.fixture(scope="session")
def corpora(bpe: Tokenizer, tmp_path_factory) -> dict[str, Shards]:
    """Several documents in several files, one large document, and a small corpus."""
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "many": write_shards(make_documents(60), bpe, folder / "many", tokens_per_shard=500),
        "one": write_shards(["".join(make_documents(60))], bpe, folder / "one"),
        "few": write_shards(make_documents(3, seed=1), bpe, folder / "few"),
    }


def whole(shards: Shards) -> np.ndarray:
    return shards.slice(0, shards.tokens).astype(np.int64)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.tokens_BS, b.tokens_BS) and torch.equal(a.documents_BS, b.documents_BS)


def test_shapes_and_types(corpora: dict[str, Shards]) -> None:
    batch = next(Loader([(corpora["many"], 1)], batch_size=3, sequence_length=8, lookahead=2))
    assert batch.tokens_BS.shape == batch.documents_BS.shape == batch.valid_BS.shape == (3, 11)
    assert (batch.tokens_BS.dtype, batch.documents_BS.dtype) == (torch.int64, torch.int32)
    assert batch.valid_BS.all()


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(["many", "one", "few"]),
    length=st.integers(1, 40),
    lookahead=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_rows_hold_whole_documents_in_a_row(corpora, name, length, lookahead, seed) -> None:
    """Inside a row, tokens of one document are a piece of it, and a new one starts with bos."""
    shards = corpora[name]
    texts = [shards.document(i).tolist() for i in range(shards.documents)]
    loader = Loader(
        [(shards, 1)], batch_size=4, sequence_length=length, lookahead=lookahead, seed=seed
    )
    for batch in itertools.islice(loader, 3):
        rows = zip(batch.tokens_BS.tolist(), batch.documents_BS.tolist(), strict=True)
        for tokens, numbers in rows:
            pairs = zip(tokens, numbers, strict=True)
            runs = [
                [token for token, _ in run] for _, run in itertools.groupby(pairs, lambda p: p[1])
            ]
            for run, following in itertools.pairwise(runs):
                assert run[-1] == 1
                assert following[0] == 0
            for run in runs[1:-1]:
                assert run in texts
            for run in runs:
                assert any(run == t[i : i + len(run)] for t in texts for i in range(len(t)))


@pytest.mark.parametrize("name", ["many", "one"])
def test_an_epoch_shows_each_token_once(corpora, name: str) -> None:
    """The predicted places of an epoch's windows overlap nowhere and leave only the ends out."""
    shards, length = corpora[name], 16
    loader = Loader([(shards, 1)], batch_size=1, sequence_length=length, seed=3)
    shown: Counter[int] = Counter()
    rows = []
    for batch in loader:
        if loader.state_dict()["sources"][0]["epoch"] == 1:
            break
        rows.append(tuple(batch.tokens_BS[0].tolist()))
        shown.update(batch.tokens_BS[0, 1:].tolist())
    available = Counter(whole(shards).tolist())
    assert shown <= available
    assert shards.tokens - shown.total() < 2 * length
    assert len(set(rows)) == len(rows)
    starts = rows[:10]
    again = Loader([(shards, 1)], batch_size=1, sequence_length=length, seed=4)
    assert [tuple(next(again).tokens_BS[0].tolist()) for _ in range(10)] != starts


def test_one_document_in_windows(corpora) -> None:
    tokens = whole(corpora["one"])
    loader = Loader([(corpora["one"], 1)], batch_size=5, sequence_length=16, lookahead=1)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, 18)
    starts = []
    for batch in itertools.islice(loader, 4):
        assert not batch.documents_BS.any()
        for row in batch.tokens_BS.numpy():
            starts.append(int(np.flatnonzero((windows == row).all(axis=1))[0]))
    assert len({start % 16 for start in starts}) == 1
    assert starts != sorted(starts)


def test_corpus_of_just_one_window(bpe: Tokenizer, corpora, tmp_path) -> None:
    shards = write_shards(["ab"], bpe, tmp_path / "a")
    loader = Loader([(shards, 1)], batch_size=3, sequence_length=shards.tokens - 1)
    assert next(loader).tokens_BS.tolist() == [whole(shards).tolist()] * 3
    with pytest.raises(DataError, match=r"has 4 tokens, fewer than one window of 5"):
        Loader([(shards, 1)], batch_size=1, sequence_length=4)


SETTINGS = {
    "weights": st.lists(st.floats(0.1, 10), min_size=1, max_size=3),
    "batch_size": st.integers(1, 5),
    "length": st.integers(1, 30),
    "lookahead": st.integers(0, 2),
    "seed": st.integers(0, 1000),
    "before": st.integers(0, 40),
}


@settings(deadline=None, max_examples=60)
@given(**SETTINGS)
def test_saved_loader_goes_on(
    corpora, weights, batch_size, length, lookahead, seed, before
) -> None:
    sources = list(zip(corpora.values(), weights, strict=False))

    def make() -> Loader:
        return Loader(
            sources,
            batch_size=batch_size,
            sequence_length=length,
            lookahead=lookahead,
            seed=seed,
        )

    first = make()
    for _ in range(before):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    second = make()
    for _ in range(seed % 3):  # where it stood before must not matter
        next(second)
    second.load_state_dict(state)
    for _ in range(12):
        assert same(next(first), next(second))
    assert first.state_dict() == second.state_dict()


def test_batch_size_does_not_change_the_rows(corpora) -> None:
    sources = [(corpora["many"], 1.0), (corpora["few"], 0.5)]
    small = Loader(sources, batch_size=2, sequence_length=8, seed=1)
    large = Loader(sources, batch_size=8, sequence_length=8, seed=1)
    rows = torch.cat([next(small).tokens_BS for _ in range(40)])
    assert torch.equal(rows, torch.cat([next(large).tokens_BS for _ in range(10)]))


def test_mixture_follows_the_weights(bpe: Tokenizer, tmp_path) -> None:
    sources = [
        (write_shards([letter * 400], bpe, tmp_path / letter), weight)
        for letter, weight in (("a", 1.0), ("b", 3.0), ("c", 4.0))
    ]
    loader = Loader(sources, batch_size=1000, sequence_length=2)
    batch = next(loader)
    letters = Counter(bpe.decode(row[1:2]) for row in batch.tokens_BS.tolist())
    assert abs(letters["a"] - 125) < 35
    assert abs(letters["b"] - 375) < 50


def test_state_of_another_loader_is_refused(corpora) -> None:
    def make(sources=(("many", 1.0),), **options) -> Loader:
        options = {"batch_size": 2, "sequence_length": 8, **options}
        return Loader([(corpora[name], weight) for name, weight in sources], **options)

    state = make().state_dict()
    for other in (
        make(batch_size=3),
        make(sequence_length=9),
        make(lookahead=1),
        make(seed=1),
        make(sources=[("one", 1.0)]),
        make(sources=[("many", 2.0)]),
        make(sources=[("many", 1.0), ("one", 1.0)]),
    ):
        with pytest.raises(DataError, match="resume with the same data and settings"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="state format 2"):
        make().load_state_dict({**state, "format": 2})
    with pytest.raises(DataError, match="position 9999 of epoch 0"):
        make().load_state_dict({**state, "sources": [{"epoch": 0, "position": 9999}]})


def test_what_cannot_be_loaded(corpora, characters: Tokenizer, tmp_path) -> None:
    many = corpora["many"]
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"weight of .*many must be positive"):
            Loader([(many, weight)], batch_size=1, sequence_length=1)
    with pytest.raises(DataError, match="at least one source"):
        Loader([], batch_size=1, sequence_length=1)
    with pytest.raises(DataError, match="must be at least 1"):
        Loader([(many, 1)], batch_size=0, sequence_length=1)
    other = write_shards(["the quick brown fox"], characters, tmp_path / "other")
    with pytest.raises(DataError, match="vocabulary mismatch"):
        Loader([(many, 1), (other, 1)], batch_size=1, sequence_length=4)
    with pytest.raises(DataError, match="seed must not be negative"):
        Loader([(many, 1)], batch_size=1, sequence_length=4, seed=-1)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(["many", "one", "few"]),
    batch_size=st.integers(1, 5),
    length=st.integers(1, 50),
    lookahead=st.integers(0, 2),
    limit=st.none() | st.integers(1, 300),
)
def test_validation_predicts_each_token_once(
    corpora, name, batch_size, length, lookahead, limit
) -> None:
    shards = corpora[name]
    tokens = whole(shards)
    targets = min(len(tokens) - 1, limit or len(tokens))
    inputs, nexts, further, documents = [], [], [], []
    for batch in validation_batches(
        shards,
        batch_size=batch_size,
        sequence_length=length,
        lookahead=lookahead,
        limit_tokens=limit,
    ):
        assert batch.tokens_BS.shape[1] == length + 1 + lookahead
        assert len(batch.tokens_BS) <= batch_size
        counted = batch.valid_BS[:, 1 : length + 1]
        inputs += batch.tokens_BS[:, :length][counted].tolist()
        documents += batch.documents_BS[:, :length][counted].tolist()
        nexts += batch.tokens_BS[:, 1 : length + 1][counted].tolist()
        assert (batch.documents_BS[~batch.valid_BS] == -1).all()
        if lookahead:
            deep = slice(2, length + 2)
            further += batch.tokens_BS[:, deep][batch.valid_BS[:, deep]].tolist()
    assert inputs == tokens[:targets].tolist()
    assert nexts == tokens[1 : targets + 1].tolist()
    starts = np.searchsorted(shards.offsets_D, np.arange(targets), side="right") - 1
    assert documents == starts.tolist()
    if lookahead:
        assert further == tokens[2 : targets + 1].tolist()


def test_validation_that_cannot_be(corpora) -> None:
    for options in ({"limit_tokens": 0}, {"batch_size": 0}, {"sequence_length": 0}):
        with pytest.raises(DataError, match="must be at least 1"):
            validation_batches(corpora["few"], **{"batch_size": 1, "sequence_length": 1, **options})


def test_random_streams_are_pinned() -> None:
    """A resumed run must meet the same rows whatever version of NumPy it finds."""
    assert permutation((7, 0, 1, 0), 8).tolist() == [3, 6, 5, 0, 1, 4, 2, 7]
    drawn = fractions((7, 3), 3, start=5).tolist()
    assert drawn == [0.5492214508943064, 0.9222717935149415, 0.9058464757974818]
    assert fractions((7, 3), 2, start=6).tolist() == drawn[1:]
