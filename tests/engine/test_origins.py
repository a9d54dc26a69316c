"""Which tokens the events of an answer account for. Where every token is one character (or a mark)
the tokens of an event must spell its text, whatever was held back or left out before it."""

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qiusuo
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.tool_format import ToolFormat
from qiusuo.data.vocabularies import THINK_BEGIN, THINK_END, TOOL_TOKENS
from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.answer_stream import AnswerStream
from qiusuo.engine.limits import Limits
from qiusuo.engine.sampler import Drawn
from tests.engine.test_answer_stream import V3, V31, bpe
from tests.model.shapes import tiny_model

DEEPSEEK, HERMES = ToolFormat.DEEPSEEK, ToolFormat.HERMES
QWEN = '<tool_call>\n{"name": "far", "arguments": {"a": "far"}}\n</tool_call>'
SIGNS = "abcdefghijklmnopqrstuvwxyz0 \n<>/{}\"':,.`_?吾"


@cache
def letters() -> Tokenizer:
    """A token is a character or a mark."""
    return Tokenizer.train_characters([SIGNS])


@cache
def spelled() -> Tokenizer:
    """Every token is a character."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    all_signs = sorted(set(SIGNS + "".join(TOOL_TOKENS)))
    backend = Backend(models.BPE({sign: i for i, sign in enumerate(all_signs)}, []))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def streamed(
    tokenizer: Tokenizer, ids: list[int], open_: bool | None, stops, tools, reason="stop", **kinds
) -> list[Event]:
    """The events as they come; the place of a token is its log probability."""
    stream = AnswerStream(tokenizer, open_, stops, tools, keep_drawn=True, **kinds)
    plain = AnswerStream(tokenizer, open_, stops, tools, **kinds)
    events: list[Event] = []
    for place, token in enumerate(ids):
        given_ = stream.push(token, Drawn(token, float(place)))
        same = plain.push(token)
        assert [(e.kind, e.text) for e in given_] == [(e.kind, e.text) for e in same]
        events += given_
        if stream.stopped is not None:
            break
    events += stream.finish(reason)
    places = [one.logprob for event in events for one in event.drawn]
    assert places == sorted(set(places))  # each once, and in order
    return events


pieces = st.sampled_from(
    [
        *(THINK_BEGIN, THINK_END, *TOOL_TOKENS, "<tool_call>", "</tool_call>", V31, V3, QWEN),
        *("a", "b", " ", "\n", "\n\n", "<", "</", "<think", "far", "function", "```", "json", "`"),
        *("stop", "st", "吾", '{"name": "far"', '"far"', "}", "{", "call me"),
    ]
)


@given(
    st.lists(pieces, max_size=14).map("".join),
    st.sampled_from([False, True]),
    st.sampled_from([None, DEEPSEEK, HERMES]),
    st.sampled_from([(), ("stop",), ("\n\n", "b")]),
    st.sampled_from([letters, spelled]),
    st.sampled_from(["stop", "length"]),
    st.booleans(),
)
@example(
    f"{THINK_BEGIN}\n{THINK_BEGIN}a{THINK_END}\n\na{V31}",
    False,
    DEEPSEEK,
    (),
    letters,
    "stop",
    False,
)
@example(f"far {V3} function ```json far", False, DEEPSEEK, (), spelled, "stop", False)
@example(f"a\n{QWEN}\n\n{QWEN} call me far", True, HERMES, (), spelled, "stop", False)
@settings(max_examples=400)
def test_an_events_tokens_spell_its_text(text, open_, tools, stops, make, reason, continued):
    tokenizer = make()
    ids = tokenizer.encode(text, allow_special=True)
    kinds = {"continued": continued}
    for event in streamed(tokenizer, ids, open_, stops, tools, reason, **kinds):
        written = tokenizer.decode([one.token for one in event.drawn])
        if event.kind not in (Kind.THOUGHT, Kind.CONTENT):
            assert not written
        elif written.endswith(tuple(TOOL_TOKENS)) and make is letters:  # a stop may cut a mark
            assert written.startswith(event.text)
        elif tools is HERMES:  # white space between a call and a stray mark may be of no event
            assert written.lstrip() == event.text.lstrip(), (ids, event)
        else:
            assert written == event.text, (ids, event)


@given(st.text("the road is long and far\n吾。", max_size=40), st.sampled_from([(), ("far",)]))
def test_plain_text_of_longer_tokens(text, stops):
    """Half characters wait for the whole one, and come with it."""
    ids = bpe().encode(text)
    events = streamed(bpe(), ids, None, stops, None)
    told = [one.token for event in events for one in event.drawn]
    given_ = "".join(event.text for event in events)
    assert bpe().decode(told).startswith(given_)
    shorter = bpe().decode(told[:-1])
    assert not told or len(shorter.rstrip("\ufffd")) < len(given_)
    for event in events:
        assert event.text


def test_a_token_on_both_sides_of_a_mark_is_told_once():
    """Where marks are spelled, one token may end a thought and begin the answer."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    words = {word: i for i, word in enumerate(["a b</thi", "nk>c", "d", "e</think>", "\n"])}
    backend = Backend(models.WordLevel(words, unk_token="d"))
    backend.decoder = decoders.Fuse()
    tokenizer = Tokenizer(backend)
    events = streamed(tokenizer, [0, 1, 2], True, (), None)
    told = [(event.kind, event.text, [one.token for one in event.drawn]) for event in events]
    assert told == [
        (Kind.THOUGHT, "a b", [0]),
        (Kind.CONTENT, "c", [1]),
        (Kind.CONTENT, "d", [2]),
    ]
    events = streamed(tokenizer, [2, 4, 3, 4, 2], True, (), None)
    told = [(event.kind, event.text, [one.token for one in event.drawn]) for event in events]
    assert told == [
        (Kind.THOUGHT, "d", [2]),
        (Kind.THOUGHT, "\ne", [4, 3]),
        (Kind.CONTENT, "d", [2]),
    ]


@pytest.mark.parametrize("thinking_budget", [None, 4])
def test_a_model_tells_the_same_at_once_and_as_it_comes(thinking_budget):
    tokenizer = letters()
    model = tiny_model(0, eos_token_id=None, vocab_size=tokenizer.vocab_size)
    lm = qiusuo.LanguageModel(model, tokenizer, Limits(cache_bytes=1 << 20))
    question = [{"role": "user", "content": "a"}]
    options = dict(temperature=2.0, seed=5, max_tokens=40, thinking=True, stop=("zz",))
    heard: list[Event] = []
    message = lm.chat(
        question, thinking_budget=thinking_budget, logprobs=2, on_event=heard.append, **options
    )
    for kind, drawn, text in (
        (Kind.THOUGHT, message.reasoning_drawn, message.reasoning_content or ""),
        (Kind.CONTENT, message.content_drawn, message.content),
    ):
        assert [one for event in heard if event.kind is kind for one in event.drawn] == drawn
        assert tokenizer.decode([one.token for one in drawn]) == text
    assert message.reasoning_drawn
    assert all(len(one.top) == 2 for one in message.reasoning_drawn if thinking_budget is None)
    without = lm.chat(question, thinking_budget=thinking_budget, **options)
    assert without.token_ids == message.token_ids
    assert not without.reasoning_drawn + without.content_drawn
