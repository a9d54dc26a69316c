"""From corpora to shards in one call: whole, once, and made anew when the inputs change."""

from __future__ import annotations

import json

import pytest

from qiusuo.data import prepare
from qiusuo.data.errors import DataError
from qiusuo.data.loader import Loader
from qiusuo.data.prepare import prepare_corpus
from qiusuo.data.tokenizer import Tokenizer

from .conftest import make_documents

BPE = {"kind": "bpe", "vocab_size": 400}


@pytest.fixture
def texts(tmp_path):
    """Two corpora of the user's own."""
    for name, seed in (("alpha", 0), ("beta", 1)):
        lines = [json.dumps({"text": text}) + "\n" for text in make_documents(80, seed)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def sources(texts) -> list[tuple[str, float]]:
    return [(str(texts / "alpha.jsonl"), 1.0), (str(texts / "beta.jsonl"), 2.5)]


def test_prepared_data_is_ready_for_a_loader(texts) -> None:
    data = prepare_corpus(sources(texts), BPE, texts / "out", fim_rate=0.5)
    assert [weight for _, weight in data.train] == [1.0, 2.5]
    assert [s.folder.name for s in data.validation] == ["0-alpha", "1-beta"]
    assert {s.meta.fim_rate for s, _ in data.train} == {0.5}
    assert {s.meta.fim_rate for s in data.validation} == {0.0}
    written = [shards.documents for shards in [*dict(data.train), *data.validation]]
    assert sum(written) == 160
    assert min(written) > 0
    batch = next(Loader(data.train, batch_size=2, sequence_length=16))
    assert int(batch.tokens_BS.max()) < data.tokenizer.vocab_size


def test_second_call_only_opens(texts, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_corpus(sources(texts), BPE, texts / "out")

    def never(*args: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(prepare, "_prepare", never)
    heavier = [(name, 7.0) for name, _ in sources(texts)]
    second = prepare_corpus(heavier, BPE, texts / "out")
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert [weight for _, weight in second.train] == [7.0, 7.0]
    for change in ({"seed": 1}, {"fim_rate": 0.1}, {"validation_fraction": 0.2}):
        with pytest.raises(AssertionError, match="prepared again"):
            prepare_corpus(sources(texts), BPE, texts / "out", **change)
    with pytest.raises(AssertionError, match="prepared again"):
        prepare_corpus(sources(texts), {"kind": "characters"}, texts / "out")
    (texts / "alpha.jsonl").write_text('{"text": "other"}\n' * 2)
    with pytest.raises(AssertionError, match="prepared again"):
        prepare_corpus(sources(texts), BPE, texts / "out")


def test_failed_preparation_keeps_the_old_and_leaves_no_rubbish(texts, monkeypatch) -> None:
    first = prepare_corpus(sources(texts), BPE, texts / "out")
    before = sorted(texts.iterdir())

    def broken(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_shards", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(sources(texts), BPE, texts / "out", seed=9)
    assert sorted(texts.iterdir()) == before
    again = prepare_corpus(sources(texts), BPE, texts / "out")
    assert again.train[0][0].fingerprint == first.train[0][0].fingerprint
    changed = prepare_corpus(sources(texts), BPE, texts / "out", seed=9)
    assert changed.train[0][0].fingerprint != first.train[0][0].fingerprint
    assert sorted(texts.iterdir()) == before


def test_vocabulary_comes_from_training_text_alone(texts) -> None:
    (texts / "one.txt").write_text("a" * 90 + "z" * 10)
    data = prepare_corpus([(texts / "one.txt", 1)], {"kind": "characters"}, texts / "out")
    assert data.validation[0].meta.unknown == 10
    assert data.train[0][0].meta.unknown == 0


def test_own_tokenizer_and_copies(texts, bpe: Tokenizer) -> None:
    bpe.save(texts / "tok")
    twice = [*sources(texts), sources(texts)[0]]
    spec = {"path": str(texts / "tok")}
    with pytest.raises(DataError, match="the corpus is empty"):
        # All of the third corpus is a copy of the first.
        prepare_corpus(twice, spec, texts / "out", deduplicate=1.0)
    lines = (texts / "alpha.jsonl").read_text() * 2
    (texts / "alpha.jsonl").write_text(lines)
    for threshold in (1.0, 0.9):
        said: list[str] = []
        data = prepare_corpus(
            sources(texts), spec, texts / "out", deduplicate=threshold, progress=said.append
        )
        assert "alpha: 160 documents, 80 dropped as copies" in said
        assert data.tokenizer.fingerprint == bpe.fingerprint


def test_no_validation(texts) -> None:
    data = prepare_corpus(sources(texts), BPE, texts / "out", validation_fraction=0)
    assert data.validation == []
    assert sum(shards.documents for shards, _ in data.train) == 160


def test_what_cannot_be_prepared(texts) -> None:
    def refuse(tokenizer, match: str, folder="out", corpora=None) -> None:
        with pytest.raises(DataError, match=match):
            prepare_corpus(
                sources(texts) if corpora is None else corpora, tokenizer, texts / folder
            )

    refuse({"kind": "bpee"}, "unknown kind of tokenizer 'bpee': did you mean 'bpe'")
    refuse({"kind": "bpe"}, "needs a vocab_size")
    refuse({"kind": "bpe", "vocab_sise": 9}, "unknown tokenizer setting 'vocab_sise'.*'vocab_size'")
    refuse({"path": str(texts / "nowhere")}, "no tokenizer at")
    refuse(BPE, "no corpus to prepare", corpora=[])
    (texts / "mine").mkdir()
    (texts / "mine" / "thesis.txt").write_text("precious")
    refuse(BPE, "holds something else", folder="mine")
    assert (texts / "mine" / "thesis.txt").read_text() == "precious"
