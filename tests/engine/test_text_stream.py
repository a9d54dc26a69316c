"""Text in pieces is the text as a whole, wherever it is cut."""

import string
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.data.corpora import open_corpus
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.text_stream import REPLACEMENT, Part, TextStream, ThoughtSplitter

SPOKEN = "路漫漫 👩‍🔬 naïve café ½ \u00a0 \n\n吾将上下"


@cache
def bpe() -> Tokenizer:
    """Words, and half characters too: the bytes of rare ones, joined to their neighbours."""
    return Tokenizer.train_bpe([f"{SPOKEN} 求索而 the road is long\n" * 3], 400)


@cache
def byte_ids() -> dict[int, int]:
    """Every byte's token: printable ones stand for themselves, the others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    spellings = {byte: chr(byte) for byte in plain}
    spellings |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {byte: bpe().token_id(spelling) for byte, spelling in spellings.items()}


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.finish()]


BYTES = st.binary(max_size=12).map(list)
TEXT_BYTES = st.text(max_size=6).map(lambda text: list(text.encode()))
HALVES = st.sampled_from("你🔬é").map(lambda c: list(c.encode())[:-1])
IDS = st.lists(
    st.one_of(
        (BYTES | TEXT_BYTES | HALVES).map(lambda data: [byte_ids()[byte] for byte in data]),
        st.text(max_size=8).map(lambda text: bpe().encode(text)),
        st.just(SPOKEN).map(lambda text: bpe().encode(text)),
        st.integers(0, 399).map(lambda token: [token % bpe().vocab_size]),
    ),
    max_size=6,
).map(lambda rows: [token for row in rows for token in row])


@given(IDS)
def test_pieces_join_to_the_whole(ids: list[int]) -> None:
    assert "".join(streamed(bpe(), ids)) == bpe().decode(ids)


@given(st.lists(BYTES | TEXT_BYTES | HALVES, max_size=6))
def test_bytes_are_decoded_as_python_does(rows: list[list[int]]) -> None:
    data = bytes(byte for row in rows for byte in row)
    pieces = streamed(bpe(), [byte_ids()[byte] for byte in data])
    assert "".join(pieces) == data.decode("utf-8", "replace")


@given(st.text())
def test_no_piece_holds_half_a_character(text: str) -> None:
    by_bytes = [byte_ids()[byte] for byte in text.encode()]
    for ids in (by_bytes, bpe().encode(text)):
        shown = "".join(streamed(bpe(), ids))
        assert (shown, REPLACEMENT in shown) == (text, REPLACEMENT in text)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = [byte_ids()[byte] for byte in "a你b".encode()]
    assert streamed(bpe(), ids) == ["a", "", "", "你", "b", ""]


def test_what_is_certain_is_not_held_back_by_half_a_character() -> None:
    """A stream of tokens that each end in the middle of a character still flows."""
    tokenizer = Tokenizer.train_characters(["abc"])
    stream = TextStream(tokenizer)
    texts = {(1,): "我\ufffd", (1, 2): "我们\ufffd", (1, 2, 3): "我们好"}
    tokenizer.decode = lambda ids, **_: texts.get(tuple(ids), "")  # type: ignore[method-assign]
    assert [stream.push(token) for token in (1, 2, 3)] == ["我", "们", "好"]
    assert stream.finish() == ""


def test_a_true_replacement_character_comes_too() -> None:
    ids = bpe().encode("a\ufffd\ufffdb\ufffd")
    assert "".join(streamed(bpe(), ids)) == "a\ufffd\ufffdb\ufffd"


@given(st.lists(st.integers(0, 900), max_size=30))
def test_ids_beyond_the_vocabulary_are_silent(ids: list[int]) -> None:
    """Even inside a character."""
    known = [token for token in ids if token < bpe().vocab_size]
    assert "".join(streamed(bpe(), ids)) == bpe().decode(known)
    torn = [byte_ids()[byte] for byte in "你".encode()]
    assert streamed(bpe(), [torn[0], 5000, *torn[1:]]) == ["", "", "", "你", ""]


def test_decoders_that_write_the_first_word_differently() -> None:
    """Metaspace: a text's first word loses its space, every other keeps it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = {"▁the": 0, "▁road": 1, "▁is": 2, "s": 3, "▁": 4, "?": 5}
    backend = Backend(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    assert streamed(tokenizer, [0, 1, 3, 2]) == ["the", " road", "s", " is", ""]
    assert "".join(streamed(tokenizer, [4, 4, 0, 1])) == tokenizer.decode([4, 4, 0, 1])


def test_of_our_own_text() -> None:
    """A whole poem, token by token."""
    poem = next(iter(open_corpus("tang-poems").documents()))
    tokenizer = Tokenizer.train_bpe([poem[:40]], 300)
    pieces = streamed(tokenizer, tokenizer.encode(poem))
    assert "".join(pieces) == poem
    assert not any(REPLACEMENT in piece for piece in pieces)


# Thoughts

MARKS = ["<think>", "</think>", "</thi", "<th", "<", "</think", "think>", " ", "\n", "\n\n", "\t"]
MARKED = st.lists(
    st.sampled_from(MARKS) | st.text(string.ascii_letters + "<>/ \n", max_size=4), max_size=9
).map("".join)


def split(text: str, open_: bool, cuts: Sequence[int] = ()) -> tuple[str, str]:
    """(thought, answer) of a text that comes in pieces of these lengths, then the rest."""
    splitter = ThoughtSplitter(open_)
    given: list[tuple[Part, str]] = []
    for length in cuts:
        given += splitter.push(text[:length])
        text = text[length:]
    given += [*splitter.push(text), *splitter.finish()]
    assert all(piece for _, piece in given), "an empty piece says nothing"
    parts = [part for part, _ in given]
    assert parts == sorted(parts, key=list(Part).index), "a thought after the answer"
    thought, answer = ("".join(piece for p, piece in given if p is part) for part in Part)
    return thought, answer


def plainly(text: str, open_: bool) -> tuple[str, str]:
    """What splitting means, of a text that is all there."""
    body = text.lstrip()
    if not open_:
        if not body.startswith("<think>"):
            return "", body
        body = body[len("<think>") :]
    if "</think>" not in body:
        return body.strip(), ""
    end = body.index("</think>")
    return body[:end].strip(), body[end + len("</think>") :].lstrip()


@given(MARKED, st.booleans(), st.lists(st.integers(0, 5), max_size=40))
def test_thoughts_however_they_are_cut(text: str, open_: bool, cuts: list[int]) -> None:
    assert split(text, open_, cuts) == plainly(text, open_)


@given(MARKED, st.booleans())
def test_one_character_at_a_time(text: str, open_: bool) -> None:
    assert split(text, open_, [1] * len(text)) == split(text, open_)


@pytest.mark.parametrize(
    ("text", "open_", "expected"),
    [
        ("", False, ("", "")),
        ("  \n", False, ("", "")),
        ("An answer.\n", False, ("", "An answer.\n")),
        ("<think>\nSo.\n</think>\n\nYes.", False, ("So.", "Yes.")),
        ("\n <think>So.</think>Yes.", False, ("So.", "Yes.")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("So.\n</think>\n\nYes.", True, ("So.", "Yes.")),
        ("So, <think> is a mark.</think>Yes", True, ("So, <think> is a mark.", "Yes")),
        ("Never closed </thi", True, ("Never closed </thi", "")),
        ("<think>Never closed  \n", False, ("Never closed", "")),
        ("a </thi s </think> b", True, ("a </thi s", "b")),
        ("<</think>", True, ("<", "")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("Yes. <think>no</think>", False, ("", "Yes. <think>no</think>")),
        ("</think>Yes.", False, ("", "</think>Yes.")),
        ("<thin ice", False, ("", "<thin ice")),
        ("<thin", False, ("", "<thin")),
        ("a\n\n b</think>", True, ("a\n\n b", "")),
    ],
)
def test_thoughts(text: str, open_: bool, expected: tuple[str, str]) -> None:
    assert split(text, open_) == expected == split(text, open_, [1] * len(text))


def test_words_of_a_thought_come_at_once() -> None:
    splitter = ThoughtSplitter(open=True)
    given = [list(splitter.push(piece)) for piece in ("\n", "So", " it", " ", "is", "</", "think>")]
    thought = Part.THOUGHT
    assert given == [[], [(thought, "So")], [(thought, " it")], [], [(thought, " is")], [], []]
    assert list(splitter.push("\n\nYes")) == [(Part.ANSWER, "Yes")]
    assert list(splitter.push(" ")) == [(Part.ANSWER, " ")]
    assert list(splitter.finish()) == []
