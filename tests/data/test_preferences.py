"""Pairs of answers: every shape that public sets have, and one prompt for both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qiusuo.data.errors import DataError
from qiusuo.data.examples import Example
from qiusuo.data.preferences import Preferences, read_preferences
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import BOS_TOKEN, EOS_TOKEN

U, A = "<｜User｜>", "<｜Assistant｜>"


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


SYSTEM = {"role": "system", "content": "S"}
TALK = [user("q1"), says("a1"), user("q2")]


def read(tmp_path: Path, tokenizer: Tokenizer, *records: object) -> Preferences:
    file = tmp_path / "pairs.jsonl"
    said = [r if isinstance(r, str) else json.dumps(r) for r in records]
    file.write_text("\n".join(said) + "\n", encoding="utf-8")
    return read_preferences(file, tokenizer)


def split(tokenizer: Tokenizer, example: Example) -> tuple[str, str]:
    """The prompt, and what counts, which must be all the rest."""
    start = example.counted.index(True)
    assert all(example.counted[start:])
    return tokenizer.decode(example.tokens[:start]), tokenizer.decode(example.tokens[start:])


ONE = f"{BOS_TOKEN}{U}q{A}</think>"
TWO = f"{BOS_TOKEN}{U}q1{A}</think>a1{EOS_TOKEN}{U}q2{A}</think>"


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ONE),
        ({"prompt": [user("q")], "chosen": [says("good")], "rejected": [says("bad")]}, ONE),
        ({"prompt": [user("q")], "chosen": "good", "rejected": "bad"}, ONE),
        (
            {"chosen": [user("q"), says("good")], "rejected": [user("q"), says("bad")]},
            ONE,
        ),
        (  # as ultrafeedback_binarized has it
            {
                "prompt": "q",
                "chosen": [user("q"), says("good")],
                "rejected": [user("q"), says("bad")],
                "score_chosen": 8.0,
            },
            ONE,
        ),
        ({"prompt": TALK, "chosen": [says("good")], "rejected": [says("bad")]}, TWO),
        ({"chosen": [*TALK, says("good")], "rejected": [*TALK, says("bad")]}, TWO),
        (
            {
                "prompt": "q",
                "chosen": [SYSTEM, user("q"), says("good")],
                "rejected": [SYSTEM, user("q"), says("bad")],
            },
            f"{BOS_TOKEN}S{U}q{A}</think>",
        ),
    ],
)
def test_every_shape(bpe: Tokenizer, tmp_path: Path, record: object, prompt: str) -> None:
    pairs = read(tmp_path, bpe, record)
    assert pairs.length == 1
    chosen, rejected = pairs.pair(0)
    assert split(bpe, chosen) == (prompt, f"good{EOS_TOKEN}")
    assert split(bpe, rejected) == (prompt, f"bad{EOS_TOKEN}")
    assert chosen.origin == f"{tmp_path / 'pairs.jsonl'} line 1: chosen"
    assert pairs.longest == max(len(chosen.tokens), len(rejected.tokens))


def test_both_sides_have_one_prompt(bpe: Tokenizer, tmp_path: Path) -> None:
    """A thought on one side means an empty one on the other."""
    opened = f"{BOS_TOKEN}{U}q{A}<think>"
    thoughtful = [says("good", reasoning_content="hm")]
    pairs = read(
        tmp_path,
        bpe,
        {"prompt": "q", "chosen": thoughtful, "rejected": "bad"},
        {"prompt": "q", "chosen": "bad", "rejected": thoughtful},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "thinking": True},
    )
    good, bad = f"hm</think>good{EOS_TOKEN}", f"</think>bad{EOS_TOKEN}"
    sides = [[split(bpe, example) for example in pairs.pair(i)] for i in range(3)]
    assert sides[0] == [(opened, good), (opened, bad)]
    assert sides[1] == [(opened, bad), (opened, good)]
    assert sides[2] == [(opened, f"</think>good{EOS_TOKEN}"), (opened, bad)]


def test_answers_that_call_tools(bpe: Tokenizer, tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "add", "description": "D", "parameters": {}}}
    looked = [says("", tool_calls=[call]), {"role": "tool", "content": "42"}, says("good")]
    record = {"prompt": "q", "chosen": looked, "rejected": "bad", "tools": [tool]}
    chosen, rejected = read(tmp_path, bpe, record).pair(0)
    counted = [t for t, counts in zip(chosen.tokens, chosen.counted, strict=True) if counts]
    assert bpe.decode(counted) == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        f"<｜tool▁calls▁end｜>{EOS_TOKEN}good{EOS_TOKEN}"
    )
    prompt, _ = split(bpe, rejected)
    assert "### add" in prompt
    assert bpe.decode(chosen.tokens).startswith(prompt)


def test_other_pairs_have_another_fingerprint(bpe: Tokenizer, tmp_path: Path) -> None:
    records = [{"prompt": "q", "chosen": c, "rejected": r} for c, r in ("ab", "ba", "ac")]
    prints = [read(tmp_path, bpe, record).fingerprint for record in records]
    assert len(set(prints)) == 3
    assert read(tmp_path, bpe, records[0]).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ("{", "line 2 is not valid JSON"),
        ({"prompt": "q", "chosen": "a"}, "line 2: unknown field 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "line 2: there is no prompt: add one"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "line 2: chosen and rejected are the sa"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt must be a text or a list"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "chosen: messages must be a list with"),
        (
            {"prompt": "p", "chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]},
            "do not begin with the assistant, nor with the prompt",
        ),
        (
            {"chosen": [user("q"), says("a")], "rejected": [user("r"), says("b")]},
            "must begin with the same prompt and go on with an answer each",
        ),
        (
            {"chosen": [user("q"), says("a")], "rejected": [user("q")]},
            "must begin with the same prompt and go on with an answer each",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": [says("b", weight=0)]},
            "line 2: rejected: there is no message of the assistant's to learn",
        ),
        (
            {
                "prompt": "q",
                "chosen": [says("a", reasoning_content="t"), user("r"), says("b")],
                "rejected": "c",
            },
            "line 2: chosen has 2 turns that no single prompt leads to",
        ),
        (
            {"chosen": [*TALK, says("a")], "rejected": [*TALK, user("more"), says("b")]},
            "line 2: the chat template writes different prompts for the two",
        ),
    ],
)
def test_bad_lines_are_named(bpe: Tokenizer, tmp_path: Path, record, match: str) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=match):
        read(tmp_path, bpe, good, record)
    with pytest.raises(DataError, match=r"no pairs in .*pairs.jsonl: it is empty"):
        read(tmp_path, bpe, "")
