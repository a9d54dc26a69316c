"""An answer that goes on with the assistant's last message gives what is new, and only that."""

from functools import cache

import pytest

import qiusuo
from qiusuo.data.chat_template import default_template
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import THINK_END
from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.answer_stream import AnswerStream
from qiusuo.engine.constraint import Constraint
from qiusuo.engine.limits import Limits
from tests.conformance.test_templates import template
from tests.engine.oracle import greedy
from tests.engine.test_answer_stream import V31
from tests.model.shapes import tiny_model

TEXTS = ["the road is long and the answer far, b a\n" * 4]
USER = {"role": "user", "content": "the road"}
TEMPLATES = {
    "ours": default_template(),
    "v3": template("deepseek-v3"),
    "r1": template("deepseek-r1"),
    "v3.1": template("deepseek-v3.1"),
}


@cache
def language_model(name: str) -> qiusuo.LanguageModel:
    tokenizer = Tokenizer.train_bpe(TEXTS, 320)
    tokenizer.chat_template = TEMPLATES[name]
    model = tiny_model(
        0, eos_token_id=None, vocab_size=tokenizer.vocab_size, max_position_embeddings=512
    )
    return qiusuo.LanguageModel(model, tokenizer, Limits(cache_bytes=1 << 20))


def turn(content: str | None, thought: str | None = None) -> dict[str, str | None]:
    return {"role": "assistant", "content": content, "reasoning_content": thought, "prefix": True}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_is_what_the_model_says_next(name):
    lm = language_model(name)
    tokenizer = lm.tokenizer
    turns = [USER, turn("far, ")]
    prompt = tokenizer.apply_chat_template(turns, continue_last=True)
    assert tokenizer.decode(prompt).endswith("far, ")
    message = lm.chat(turns, continue_last=True, max_tokens=12, ignore_eos=True)
    expected = greedy(lm.model, prompt, 12)
    assert message.token_ids == expected
    words = [token for token in expected if token not in lm.stop_ids]
    assert message.content == tokenizer.decode(words)
    assert message.usage.prompt_tokens == len(prompt)
    assert message.reasoning_content is None


def stream(name: str, turns: list, text: str, **options) -> list[tuple[Kind, str]]:
    """What is told of a text that the model would write after these turns."""
    lm = language_model(name)
    asked = qiusuo.engine.asking.prepare_chat(lm, turns, continue_last=True, **options)
    one = AnswerStream(lm.tokenizer, asked.thought_open, (), asked.calls, continued=asked.continued)
    events: list[Event] = []
    for token in lm.tokenizer.encode(text, allow_special=True):
        events += one.push(token)
    events += one.finish("stop")
    thought = "".join(event.text for event in events if event.kind is Kind.THOUGHT)
    return [thought, "".join(event.text for event in events if event.kind is Kind.CONTENT)]


THINKS = dict(thinking=True)


@pytest.mark.parametrize(
    ("name", "last", "options", "text", "thought", "content"),
    [
        ("v3.1", turn("far"), {}, " and long", "", " and long"),
        ("v3.1", turn("far"), THINKS, "\n\na", "", "\n\na"),
        ("v3.1", turn("far"), {}, "<think>a</think>", "", "<think>a</think>"),
        ("v3.1", turn("", "far"), THINKS, " and</think>b", " and", "b"),
        ("v3.1", turn("", "far"), {}, "\nb", "", "b"),
        ("v3.1", turn("b", "far"), THINKS, " a", "", " a"),
        ("v3.1", turn("<think>"), {}, " far</think> b", "far", "b"),
        ("v3.1", turn(""), THINKS, "far</think> b", "far", "b"),
        ("v3.1", turn(""), {}, "\nb", "", "b"),
        ("r1", turn("", "far"), THINKS, "\nand\n</think>\n\nb", "\nand", "b"),
        ("r1", turn("b", "far"), THINKS, "\n", "", "\n"),
        ("v3", turn("b"), {}, "  ", "", "  "),
        ("ours", turn("", "far"), THINKS, "</think>b", "", "b"),
    ],
)
def test_thought_and_content_go_on_where_they_stood(name, last, options, text, thought, content):
    assert stream(name, [USER, last], text, **options) == [thought, content]


def test_calls_after_words_that_were_there():
    tools = [{"type": "function", "function": {"name": "far", "description": "", "parameters": {}}}]
    text = f" and\n{V31}"
    told = stream("v3.1", [USER, turn("long")], text, tools=tools)
    assert told == ["", " and\n"]


def test_a_thought_that_goes_on_has_its_budget_and_the_constraint_waits():
    lm = language_model("ours")
    message = lm.chat(
        [USER, turn("", "the road")],
        continue_last=True,
        thinking=True,
        thinking_budget=6,
        constraint=Constraint("choice", ["far", "long"]),
        max_tokens=40,
    )
    assert message.reasoning_content
    assert message.usage.reasoning_tokens == 7  # and the mark
    assert lm.tokenizer.token_id(THINK_END) == message.token_ids[6]
    assert message.content in ("far", "long")


def test_what_cannot_be_continued():
    with pytest.raises(DataError, match="role 'user'"):
        language_model("v3").chat([USER], continue_last=True)
    with pytest.raises(DataError, match="no place for the last message's thought"):
        language_model("v3").chat([USER, turn("", "a")], continue_last=True, thinking=True)
