"""Text in, the same text out; and no text becomes a special token by itself."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from qiusuo.data import tokenizer as tokenizer_module
from qiusuo.data.corpora import open_corpus
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import SMALLEST_BPE, SPECIAL_TOKENS

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
TRICKY = st.lists(TEXT | st.sampled_from((*SPECIAL_TOKENS, "<unk>", "\n", "｜", "<"))).map("".join)


@settings(deadline=None, max_examples=150)
@given(text=TRICKY)
def test_bpe_round_trips_any_text_without_special_tokens(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(index >= len(SPECIAL_TOKENS) for index in ids)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_characters_round_trip(
    characters: Tokenizer, documents: list[str], data: st.DataObject
) -> None:
    alphabet = sorted(set("".join(documents)))
    text = data.draw(st.text(st.sampled_from(alphabet)))
    ids = characters.encode(text)
    assert len(ids) == len(text)
    assert characters.decode(ids) == text


def test_special_tokens_have_the_ids_of_their_places(bpe: Tokenizer, characters: Tokenizer) -> None:
    for tokenizer in (bpe, characters):
        assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(19))
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
        text = "".join(SPECIAL_TOKENS)
        assert tokenizer.encode(text, allow_special=True) == list(range(19))


def test_skip_special_leaves_thoughts(bpe: Tokenizer) -> None:
    ids = bpe.encode("<｜Assistant｜><think>a</think>b<｜end▁of▁sentence｜>", allow_special=True)
    assert bpe.decode(ids, skip_special=True) == "<think>a</think>b"


def test_unknown_character(characters: Tokenizer) -> None:
    assert characters.encode("é") == [characters.unknown_id]
    # Spelling the unknown token is not the same as being unknown.
    assert len(characters.encode("<unk>")) == 5


def test_min_frequency_drops_rare_characters() -> None:
    tokenizer = Tokenizer.train_characters(["aab", "ab c"], min_frequency=2)
    assert tokenizer.vocab_size == len(SPECIAL_TOKENS) + 1 + 2
    assert tokenizer.decode(tokenizer.encode("abc"), skip_special=True) == "ab"


def test_training_is_deterministic(bpe: Tokenizer, documents: list[str]) -> None:
    assert Tokenizer.train_bpe(iter(documents), 400).fingerprint == bpe.fingerprint
    assert Tokenizer.train_bpe(documents[:100], 400).fingerprint != bpe.fingerprint


def test_pretokenizer_splits_as_deepseek_v3(bpe: Tokenizer) -> None:
    words = bpe.backend.pre_tokenizer.pre_tokenize_str("It's 12345 中文ok,\n\n  x .a")
    assert ["It's 12345 中文ok,\n\n  x .a"[a:b] for _, (a, b) in words] == [
        *("It", "'s", " ", "123", "45", " ", "中文", "ok", ",\n\n", " ", " x", " .", "a"),
    ]


def test_long_text_is_encoded_in_pieces_as_in_one(
    characters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = next(open_corpus("tinyshakespeare").documents())[:60_000]
    text += "\r\n\n \n中文\n1\n\n\n　x\n_y\n"
    bpe = Tokenizer.train_bpe([text[:20_000]], 500)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 50)
    for tokenizer in (bpe, characters):
        assert len(tokenizer._pieces(text)) > 500
        whole = tokenizer.backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == whole


def test_batch_equals_single(bpe: Tokenizer, documents: list[str]) -> None:
    texts = [*documents[:20], "", "<think>"]
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]


def test_save_and_load(bpe: Tokenizer, tmp_path) -> None:
    bpe.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == bpe.fingerprint
    assert loaded.chat_template == bpe.chat_template
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 2)
    (tmp_path / "chat_template.jinja").write_text("mine")
    assert Tokenizer.load(tmp_path).chat_template == "mine"
    bpe.save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == bpe.chat_template
    alone = tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(alone).eos_id == 1
    assert Tokenizer.load(alone).chat_template is None


@pytest.mark.long
def test_transformers_loads_the_same(bpe: Tokenizer, documents: list[str], tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert peer(documents[0], add_special_tokens=False)["input_ids"] == bpe.encode(documents[0])
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (0, 1, 2)
    messages = [{"role": "user", "content": "hi"}]
    ids = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == bpe.apply_chat_template(messages)


def foreign_tokenizer(folder, added: list[dict]) -> Tokenizer:
    """Someone else's: a byte-level vocabulary with other added tokens, and a config."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend.model = models.BPE(vocab=alphabet, merges=[])
    for token in added:
        backend.add_tokens([tokenizers.AddedToken(**token)])
    folder.joinpath("tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    config = {
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": [{"name": "default", "template": "T"}],
        "model_max_length": int(1e30),
    }
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def test_foreign_tokenizer(tmp_path) -> None:
    added = [
        {"content": "<tool>", "special": False, "normalized": True},
        {"content": "    ", "special": False},
        {"content": "<|im_end|>", "special": True},
    ]
    tokenizer = foreign_tokenizer(tmp_path, added)
    assert tokenizer.vocab_size == 259
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 258, None)
    assert tokenizer.chat_template == "T"
    assert tokenizer.model_max_length is None
    # Runs of spaces are text and keep their token; markers in text are spelt out.
    text = "a    b<tool><|im_end|>"
    ids = tokenizer.encode(text)
    assert set(ids) & {256, 257, 258} == {257}
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, allow_special=True)[-2:] == [256, 258]


def test_configs_as_deepseek_writes_them(bpe: Tokenizer, tmp_path) -> None:
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    assert json.loads(file.read_text(encoding="utf-8"))["add_bos_token"] is True
    rest = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    end = {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>", **rest}
    templates = [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "T"}]
    config = {
        "add_bos_token": False,
        "bos_token": {**end, "content": "<｜begin▁of▁sentence｜>"},
        "eos_token": end,
        "pad_token": end,
        "unk_token": None,
        "legacy": True,
        "chat_template": templates,
        "model_max_length": 131072,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    file.write_text(json.dumps(config), encoding="utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 1)
    assert (loaded.chat_template, loaded.model_max_length) == ("T", 131072)
    # Whether a bare text has a beginning is kept; `encode` adds none either way.
    assert loaded.encode("a") == bpe.encode("a")
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").add_bos_token is False
    file.write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")
    with pytest.raises(DataError, match="names '</s>' as its eos_token"):
        Tokenizer.load(tmp_path)


def test_errors_say_what_to_do(bpe: Tokenizer, tmp_path) -> None:
    with pytest.raises(DataError, match="did you mean '<｜User｜>'"):
        bpe.token_id("<｜user｜>")
    with pytest.raises(DataError, match=f"at least {SMALLEST_BPE}"):
        Tokenizer.train_bpe(["a"], 100)
    with pytest.raises(DataError, match="empty"):
        Tokenizer.train_bpe([], 1000)
    with pytest.raises(DataError, match="empty"):
        Tokenizer.train_characters([""])
    with pytest.raises(DataError, match="not valid Unicode"):
        bpe.encode("\ud800")
    with pytest.raises(DataError, match="not int"):
        bpe.encode_batch([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="outside the vocabulary"):
        bpe.decode([bpe.vocab_size])
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
