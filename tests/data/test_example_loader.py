"""Rows of whole examples: nothing lost or cut, in an order that a saved state goes on with."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.data.batch import Batch
from qiusuo.data.errors import DataError
from qiusuo.data.example_loader import ExampleLoader, batch_of_examples
from qiusuo.data.examples import Example, StoredExamples

PAD = 9999


def made(source: int, index: int, longest: int) -> Example:
    """Its tokens tell which one it is: length, source and index, then places."""
    length = 3 + (index * 7 + source * 5) % (longest - 2)
    tokens = [length, source, index, *range(100, 97 + length)]
    return Example(tokens, [(place + index) % 3 > 0 for place in range(length - 1)] + [True])


class Endless:
    """A function of the number, as a generator of tasks is."""

    length = None

    def __init__(self, source: int, longest: int) -> None:
        self.source, self.longest = source, longest
        self.fingerprint = f"endless {source} {longest}"

    def example(self, index: int) -> Example:
        return made(self.source, index, self.longest)


def finite(source: int, count: int, longest: int) -> StoredExamples:
    return StoredExamples(made(source, index, longest) for index in range(count))


def read_back(batch: Batch, longest: int) -> list[list[tuple[int, int]]]:
    """Which examples each row holds; fails unless each is whole and what follows is padding."""
    rows = []
    for tokens, documents, valid in zip(
        batch.tokens_BS.tolist(), batch.documents_BS.tolist(), batch.valid_BS.tolist(), strict=True
    ):
        row, place = [], 0
        while place < len(tokens) and documents[place] >= 0:
            length, source, index = tokens[place : place + 3]
            end = place + length
            example = made(source, index, longest)
            assert tokens[place:end] == example.tokens
            assert documents[place:end] == [len(row)] * length
            assert valid[place:end] == [False, *example.counted[1:]]
            row.append((source, index))
            place = end
        assert set(tokens[place:]) <= {PAD}
        assert set(documents[place:]) <= {-1}
        assert not any(valid[place:])
        rows.append(row)
    return rows


sizes = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 7),
        "sequence_length": st.integers(12, 70),
        "lookahead": st.integers(0, 2),
        "seed": st.integers(0, 1000),
        "pad_id": st.just(PAD),
    }
)


def mixture(longest: int, count: int) -> list[tuple[Endless | StoredExamples, float]]:
    return [(Endless(0, longest), 1.0), (finite(1, count, longest), 2), (Endless(2, longest), 0.5)]


@settings(max_examples=60)
@given(options=sizes, count=st.integers(1, 40), batches=st.integers(1, 12))
def test_each_example_comes_whole_and_once_an_epoch(options, count: int, batches: int) -> None:
    longest = min(13, options["sequence_length"] + 1)
    loader = ExampleLoader(mixture(longest, count), **options)
    shown: Counter[tuple[int, int]] = Counter()
    for batch in itertools.islice(loader, batches):
        span = options["sequence_length"] + 1 + options["lookahead"]
        assert batch.tokens_BS.shape == (options["batch_size"], span)
        assert (batch.documents_BS[:, options["sequence_length"] + 1 :] == -1).all()
        for row in read_back(batch, longest):
            assert row
            shown.update(row)
    state = loader.state_dict()
    given_out = shown + Counter(map(tuple, state["waiting"]))
    for source in (0, 2):  # an endless source is counted through, without gap or repetition
        assert {i: n for (s, i), n in given_out.items() if s == source} == dict.fromkeys(
            range(state["sources"][source]["position"]), 1
        )
    drawn = sorted(n for (s, _), n in given_out.items() if s == 1)
    epochs, rest = state["sources"][1]["epoch"], state["sources"][1]["position"]
    assert sum(drawn) == epochs * count + rest
    assert not drawn or drawn[-1] <= epochs + 1
    assert epochs == 0 or (len(drawn) == count and drawn[0] >= epochs)
    assert given_out.total() == state["drawn"]


@settings(max_examples=40)
@given(options=sizes, count=st.integers(1, 40), before=st.integers(0, 9))
def test_a_saved_loader_goes_on_bit_for_bit(options, count: int, before: int) -> None:
    longest = min(13, options["sequence_length"] + 1)
    loader = ExampleLoader(mixture(longest, count), **options)
    for _ in range(before):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = ExampleLoader(mixture(longest, count), **options)
    next(resumed)  # a loader that stands elsewhere forgets where
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for one, other in itertools.islice(zip(loader, resumed, strict=True), 6):
        assert torch.equal(one.tokens_BS, other.tokens_BS)
        assert torch.equal(one.documents_BS, other.documents_BS)
        assert torch.equal(one.valid_BS, other.valid_BS)
    assert resumed.state_dict() == loader.state_dict()


def test_epochs_differ_in_order_and_seeds_too() -> None:
    def order(seed: int) -> list[int]:
        source = StoredExamples(Example([5, index, 5, 5], [True] * 4) for index in range(50))
        loader = ExampleLoader(
            [(source, 1)], batch_size=10, sequence_length=7, seed=seed, pad_id=PAD
        )
        return [int(t) for b in itertools.islice(loader, 10) for t in b.tokens_BS[:, 1]]

    shown = order(1)
    assert shown != order(2)
    assert len(set(shown[:25])) == 25
    assert shown[:25] != shown[25:50]


def test_rows_are_nearly_full_and_the_mixture_is_as_asked() -> None:
    loader = ExampleLoader(mixture(13, 40), batch_size=64, sequence_length=64, pad_id=PAD)
    batches = list(itertools.islice(loader, 20))
    held = torch.cat([batch.documents_BS for batch in batches]) >= 0
    assert held.float().mean() > 0.97
    sources = Counter(s for b in batches for row in read_back(b, 13) for s, _ in row)
    total = sources.total()
    for source, share in ((0, 1 / 3.5), (1, 2 / 3.5), (2, 0.5 / 3.5)):
        assert abs(sources[source] / total - share) < 0.02


def test_the_order_is_pinned() -> None:
    """A resumed run must meet the same rows in a later version."""
    loader = ExampleLoader(mixture(13, 40), batch_size=2, sequence_length=30, seed=7, pad_id=PAD)
    next(loader)
    assert read_back(next(loader), 13) == [[(0, 0), (0, 14), (1, 18)], [(1, 35), (2, 11), (1, 14)]]


def test_a_row_has_room_for_what_the_main_model_predicts() -> None:
    """The tokens behind are for multi-token prediction: an example must not end among them."""
    full = StoredExamples([Example(list(range(9)), [True] * 9, "talk.jsonl line 3")])
    batch = next(ExampleLoader([(full, 1)], batch_size=1, sequence_length=8, lookahead=2, pad_id=0))
    assert batch.tokens_BS.tolist() == [[*range(9), 0, 0]]
    assert batch.documents_BS.tolist() == [[0] * 9 + [-1] * 2]
    assert batch.valid_BS.tolist() == [[False] + [True] * 8 + [False] * 2]


def test_a_batch_of_given_rows() -> None:
    a, b = Example([1, 2], [False, True]), Example([3, 4, 5], [True, False, True])
    batch = batch_of_examples([[a, b], [b], []], span=6, pad_id=0)
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 4, 5, 0], [3, 4, 5, 0, 0, 0], [0] * 6]
    assert batch.documents_BS.tolist() == [[0, 0, 1, 1, 1, -1], [0, 0, 0, -1, -1, -1], [-1] * 6]
    assert batch.valid_BS.tolist() == [
        [False, True, False, False, True, False],
        [False, False, True, False, False, False],
        [False] * 6,
    ]


def test_what_does_not_fit_or_teaches_nothing_is_refused() -> None:
    talk = Example(list(range(10)), [True] * 10, "talk.jsonl line 3")
    short = Example([1, 2], [True, True])
    options = {"batch_size": 1, "sequence_length": 8, "pad_id": 0}
    with pytest.raises(
        DataError,
        match=r"^talk.jsonl line 3 has 10 tokens, and a row has room for 9: set "
        r"sequence_length to at least 9, or leave it out$",
    ):
        ExampleLoader([(StoredExamples([short, talk]), 1)], **options)

    class Growing(Endless):
        def example(self, index: int) -> Example:
            return Example([1] * (index + 2), [True] * (index + 2))

    loader = ExampleLoader([(StoredExamples([short]), 1), (Growing(0, 9), 1)], **options)
    with pytest.raises(DataError, match="example 8 of source 1 has 10 tokens"):
        list(itertools.islice(loader, 100))
    for tokens, counted, match in (
        ([1, 2, 3], [True, False, False], "x has no token to be predicted"),
        ([], [], "x has no token to be predicted"),
        ([1, 2, 3], [True, True], "x has 3 tokens and 2 marks"),
    ):
        with pytest.raises(DataError, match=match):
            StoredExamples([Example(tokens, counted, "x")])
    with pytest.raises(DataError, match="there are no examples"):
        StoredExamples([])
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(DataError, match="weight of source 0 must be positive"):
            ExampleLoader([(StoredExamples([short]), weight)], **options)
    with pytest.raises(DataError, match="at least one source"):
        ExampleLoader([], **options)
    with pytest.raises(DataError, match="must be at least 1"):
        ExampleLoader([(StoredExamples([short]), 1)], **{**options, "batch_size": 0})
    with pytest.raises(DataError, match="seed must not be negative"):
        ExampleLoader([(StoredExamples([short]), 1)], **options, seed=-1)


def test_another_loaders_state_is_refused() -> None:
    def make(examples: list[Example], **changed: int) -> ExampleLoader:
        options = {"batch_size": 1, "sequence_length": 8, "pad_id": 0, **changed}
        return ExampleLoader([(StoredExamples(examples), 1)], **options)

    examples = [Example([1, 2, 3], [False, True, True]), Example([4, 5, 6], [False, True, True])]
    state = make(examples).state_dict()
    make(examples).load_state_dict(state)
    for other in (
        [examples[0]],
        examples[::-1],
        [examples[0], Example([4, 5, 7], [False, True, True])],
        [examples[0], Example([4, 5, 6], [False, False, True])],
        [examples[0], Example([4, 5], [False, True]), Example([6, 5], [False, True])],
    ):
        with pytest.raises(DataError, match="saved with sources"):
            make(other).load_state_dict(state)
    for changed in ("batch_size", "sequence_length", "lookahead", "seed", "pad_id"):
        with pytest.raises(DataError, match=f"saved with {changed}"):
            make(examples, **{changed: 9}).load_state_dict(state)
    with pytest.raises(DataError, match="unknown loader state format 0"):
        make(examples).load_state_dict({**state, "format": 0})
