"""Tokens on disk: what goes in comes out, and nothing half-written is taken for whole."""

from __future__ import annotations

import errno
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.data import shard_writer
from qiusuo.data.errors import DataError
from qiusuo.data.fill_in_the_middle import SHORTEST
from qiusuo.data.shards import Shards, write_shards
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import FIM_BEGIN, FIM_END, FIM_HOLE

from .conftest import make_documents


@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), min_size=1),
    tokens_per_shard=st.integers(1, 60),
)
def test_documents_come_back(
    bpe: Tokenizer, tmp_path_factory, texts: list[str], tokens_per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("shards") / "s"
    shards = write_shards(texts, bpe, folder, tokens_per_shard=tokens_per_shard)
    whole = np.concatenate([[0, *bpe.encode(text), 1] for text in texts])
    for number, text in enumerate(texts):
        ids = shards.document(number).tolist()
        assert (ids[0], ids[-1]) == (bpe.bos_id, bpe.eos_id)
        assert bpe.decode(ids[1:-1]) == text
    assert shards.slice(0, shards.tokens).tolist() == whole.tolist()
    assert shards.slice(1, shards.tokens - 1).tolist() == whole[1:-1].tolist()
    index = np.arange(shards.tokens)[::-1].reshape(1, -1)
    assert shards.gather(index).tolist() == [whole[::-1].tolist()]
    assert shards.documents == len(texts)
    assert shards.tokens == len(whole)
    assert shards.characters == sum(map(len, texts))
    assert shards.meta.utf8_bytes == sum(len(text.encode()) for text in texts)


def test_many_batches_are_one_corpus(bpe: Tokenizer, documents, tmp_path, monkeypatch) -> None:
    first = write_shards(documents, bpe, tmp_path / "a")
    monkeypatch.setattr(shard_writer, "BATCH_CHARACTERS", 100)
    calls: list[tuple[int, int]] = []
    second = write_shards(
        iter(documents), bpe, tmp_path / "b", progress=lambda *counts: calls.append(counts)
    )
    assert second.fingerprint == first.fingerprint
    assert calls[-1] == (200, second.tokens)
    assert len(calls) > 50


def test_fingerprint_knows_where_documents_end(bpe: Tokenizer, tmp_path) -> None:
    # Same ids in a row, other documents.
    one = write_shards(["ab"], bpe, tmp_path / "a")
    other = write_shards(["ab"], bpe, tmp_path / "b")
    third = write_shards(["ba"], bpe, tmp_path / "c")
    assert one.fingerprint == other.fingerprint != third.fingerprint


def test_small_and_large_vocabularies(bpe: Tokenizer, tmp_path) -> None:
    assert write_shards(["a"], bpe, tmp_path / "a").meta.dtype == "uint16"
    bpe.__dict__["vocab_size"] = (1 << 16) + 1  # the cached value
    try:
        shards = write_shards(["a"], bpe, tmp_path / "b")
    finally:
        del bpe.__dict__["vocab_size"]
    assert shards.meta.dtype == "uint32"
    assert shards.document(0).tolist() == [0, *bpe.encode("a"), 1]


def test_unknown_characters_are_counted(tmp_path) -> None:
    tokenizer = Tokenizer.train_characters(["abc"])
    shards = write_shards(["abz", "z"], tokenizer, tmp_path / "a")
    assert (shards.meta.unknown, shards.characters) == (2, 4)


def test_bits_per_character(characters: Tokenizer, tmp_path) -> None:
    shards = write_shards(["the fox"], characters, tmp_path / "a")
    # Nine tokens, eight of them predicted, for seven characters.
    assert shards.bits_per_character(math.log(2)) == pytest.approx(8 / 7)


def test_fill_in_the_middle_at_its_rate(bpe: Tokenizer, tmp_path) -> None:
    texts = ["short", *(text for text in make_documents(600) if len(text) >= SHORTEST)]
    shards = write_shards(texts, bpe, tmp_path / "a", fim_rate=0.3, seed=5)
    begin, hole, end = map(bpe.token_id, (FIM_BEGIN, FIM_HOLE, FIM_END))
    cut = 0
    for number, text in enumerate(texts):
        ids = shards.document(number).tolist()[1:-1]
        if ids[0] != begin:
            assert bpe.decode(ids) == text
            continue
        cut += 1
        h, e = ids.index(hole), ids.index(end)
        prefix, suffix, middle = ids[1:h], ids[h + 1 : e], ids[e + 1 :]
        assert "".join(map(bpe.decode, (prefix, middle, suffix))) == text
    assert 0.24 < cut / len(texts) < 0.36
    assert shards.document(0)[1] != begin
    assert shards.characters == sum(map(len, texts))
    again = write_shards(texts, bpe, tmp_path / "b", fim_rate=0.3, seed=5)
    other = write_shards(texts, bpe, tmp_path / "c", fim_rate=0.3, seed=6)
    assert again.fingerprint == shards.fingerprint != other.fingerprint
    every = write_shards(texts[1:], bpe, tmp_path / "d", fim_rate=1.0)
    assert all(every.document(i)[1] == begin for i in range(every.documents))


def test_wrong_tokenizer_is_refused(bpe: Tokenizer, characters: Tokenizer, tmp_path) -> None:
    write_shards(["a"], bpe, tmp_path / "a")
    assert Shards.open(tmp_path / "a", bpe).documents == 1
    with pytest.raises(DataError, match="vocabulary mismatch"):
        Shards.open(tmp_path / "a", characters)


def test_failure_while_writing_leaves_nothing(bpe: Tokenizer, tmp_path, monkeypatch) -> None:
    def broken():
        yield "a"
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        write_shards(broken(), bpe, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"the disk is full while writing .*/a: free some space"):
        write_shards(["a"], bpe, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written(bpe: Tokenizer, tmp_path) -> None:
    with pytest.raises(DataError, match="the corpus is empty"):
        write_shards([], bpe, tmp_path / "a")
    write_shards(["a"], bpe, tmp_path / "a")
    with pytest.raises(DataError, match="exists already"):
        write_shards(["b"], bpe, tmp_path / "a")
    with pytest.raises(DataError, match=r"fim_rate must be in \[0, 1\]"):
        write_shards(["b"], bpe, tmp_path / "b", fim_rate=2)
    with pytest.raises(DataError, match="names no eos_token"):
        write_shards(["b"], Tokenizer(bpe.backend), tmp_path / "b")
    with pytest.raises(DataError, match="document 1 is outside the 1"):
        Shards.open(tmp_path / "a").document(1)


def test_damaged_folders_are_refused(bpe: Tokenizer, documents, tmp_path) -> None:
    with pytest.raises(DataError, match="no shards in"):
        Shards.open(tmp_path)

    def damaged(name: str, content: bytes, match: str) -> None:
        folder = tmp_path / name
        write_shards(documents, bpe, folder)
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=match):
            Shards.open(folder)

    whole = tmp_path / "whole"
    write_shards(documents, bpe, whole)
    tokens = (whole / "tokens-00000.npy").read_bytes()
    damaged("tokens-00000.npy", tokens[:-2], "is damaged")
    damaged("offsets.npy", b"", "is damaged")
    damaged("meta.json", b"{", "is damaged")
    damaged_meta = json.loads((whole / "meta.json").read_text()) | {"format": 99}
    (whole / "meta.json").write_text(json.dumps(damaged_meta))
    with pytest.raises(DataError, match="shard format 99"):
        Shards.open(whole)
    damaged_meta |= {"format": 1, "documents": 3}
    (whole / "meta.json").write_text(json.dumps(damaged_meta))
    with pytest.raises(DataError, match=r"sizes differ from meta\.json"):
        Shards.open(whole)
