"""`qiusuo chat`: how it drafts, what it takes, and what it tells of an answer at a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import qiusuo
from qiusuo.chat import Conversation
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.limits import Limits
from tests.commands import Ask, asker, refused
from tests.model.shapes import tiny_model

TEXT = "路漫漫其修远兮，吾将上下而求索。 The road is long: abcdefghijklmnopqrstuvwxyz?\n"
WORDS = ("chat", "m", "--max-tokens", "9", "-m", "The road is long", "-m", "the road?")


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QIUSUO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    return asker(monkeypatch, capsys)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([TEXT], 300)


def made(tokenizer: Tokenizer, place: str = "m", seed: int = 0, **changes) -> str:
    settings = {"vocab_size": tokenizer.vocab_size, "eos_token_id": None} | changes
    model = tiny_model(seed, **{"max_position_embeddings": 400} | settings)
    save_huggingface(model, Path(place), tokenizer=tokenizer)
    return place


def test_no_draft_changes_an_answer(ask: Ask, tokenizer: Tokenizer) -> None:
    made(tokenizer, num_nextn_predict_layers=1)
    made(tokenizer, "small", seed=1, num_hidden_layers=1)
    plain = ask(*WORDS, "--draft", "none")
    assert plain.code == 0
    for draft in ("auto", "mtp", "ngram", "small"):
        assert ask(*WORDS, "--draft", draft, "--cache-gb", "0.002") == plain


def test_beginnings_are_kept_in_a_folder(ask: Ask, tokenizer: Tokenizer) -> None:
    made(tokenizer)
    first = ask(*WORDS, "--keep-prefixes", "kept")
    [mark] = Path("kept").iterdir()
    assert list(mark.iterdir())
    assert ask(*WORDS, "--keep-prefixes", "kept") == first == ask(*WORDS)


def test_a_thought_is_closed_by_its_budget(ask: Ask, tokenizer: Tokenizer) -> None:
    made(tokenizer)
    lm = qiusuo.load("m")
    turns = [{"role": "user", "content": "road?"}]
    message = lm.chat(turns, thinking=True, thinking_budget=5, max_tokens=20)
    words = ("chat", "m", "-m", "road?", "--max-tokens", "20", "--thinking")
    answer = ask(*words, "--thinking-budget", "5")
    thought = f"<think>\n{message.reasoning_content}\n</think>\n\n"
    assert answer.out == f"{thought}{message.content}\n"
    assert ask(*words).out != answer.out


def test_draws_without_a_seed_are_new_ones(ask: Ask, tokenizer: Tokenizer) -> None:
    made(tokenizer)
    warm = ("chat", "m", "-m", "road?", "--max-tokens", "30", "--temperature", "3")
    assert ask(*warm).out != ask(*warm).out
    assert ask(*warm, "--seed", "7").out == ask(*warm, "--seed", "7").out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--draft", "nowhere"), 1, "nowhere is not there"),
        (("--draft", "mtp"), 2, "this model has no MTP module to draft with"),
        (("--draft", "other"), 2, "the draft model has a vocabulary of 97"),
        (("--cache-gb", "0"), 2, "--cache-gb must be a number above 0, not 0.0"),
        (("--cache-gb", "nan"), 2, "--cache-gb must be a number above 0, not nan"),
        (("--cache-gb", "0.000001"), 2, "cache_bytes 1,000 is less than one page"),
        (("--keep-prefixes", "m/config.json"), 2, "prefix_folder m/config.json cannot be written"),
        (("--thinking-budget", "-1"), 2, "'--thinking-budget'"),
    ],
)
def test_refused(ask: Ask, tokenizer: Tokenizer, words: tuple[str, ...], code: int, message: str):
    made(tokenizer)
    save_huggingface(tiny_model(), Path("other"))
    answer = ask(*WORDS, *words)
    if code == 1:
        assert message in refused(answer)
    assert (answer.code, answer.out) == (code, "")
    assert message in " ".join(answer.err.split())
    assert "Traceback" not in answer.err


def test_what_is_told_of_an_answer(ask: Ask, tokenizer: Tokenizer) -> None:
    """At a terminal: what was written, and how much of the conversation did not need reading."""
    made(tokenizer)
    lm = qiusuo.load("m", limits=Limits(page_tokens=4, cache_bytes=1 << 20))
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system=None, width=200)
    options = {"max_tokens": 6, "thinking": True, "thinking_budget": 2}
    conversation = Conversation(lm, options, console)
    for question in ("The road is long", "and the road?"):
        conversation.ask(question)
    lines = [line for line in shown.getvalue().splitlines() if " a second" in line]
    first, second = lines
    assert first.startswith("6 tokens (")
    assert " of thought), " in first
    assert "cut at --max-tokens; read " in first
    assert first.endswith(", of them 0 from the cache")
    numbers = [int(word) for word in second.replace(",", "").split() if word.isdigit()]
    read, cached = numbers[-2:]
    assert read > cached > 0
    assert cached % 4 == 0
