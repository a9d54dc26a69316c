"""Tokens to thought, content and calls: what a client of an answer sees."""

import re
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.tool_format import ToolFormat
from qiusuo.data.vocabularies import TOOL_TOKENS
from qiusuo.engine.answer_events import Event, Flaw, Kind, merged
from qiusuo.engine.answer_stream import AnswerStream
from qiusuo.engine.tool_calls import format_of

CALLS, CALLS_END, CALL, CALL_END, *_, SEP = TOOL_TOKENS
DEEPSEEK, HERMES = ToolFormat.DEEPSEEK, ToolFormat.HERMES


@cache
def bpe() -> Tokenizer:
    """Marks are tokens, most words are several, and a Chinese character is three."""
    return Tokenizer.train_bpe(["the road is long and the answer far\n" * 3], 330)


@cache
def characters() -> Tokenizer:
    """A vocabulary without the marks spells them out."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    letters = sorted(set("".join(TOOL_TOKENS) + 'abcdefghijklmnopqrstuvwxyzQ_,</>{}":`? 1.\n吾'))
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def stream_of(
    tokenizer: Tokenizer,
    text: str,
    thought_open: bool | None = False,
    stops: Sequence[str] = (),
    tools: ToolFormat | None = None,
    reason: str = "stop",
) -> tuple[list[Event], AnswerStream]:
    stream = AnswerStream(tokenizer, thought_open, stops, tools)
    given: list[Event] = []
    for token in tokenizer.encode(text, allow_special=True):
        given += stream.push(token)
        if stream.stopped is not None:
            break
    return merged([*given, *stream.finish(reason)]), stream


def thought(text: str) -> Event:
    return Event(Kind.THOUGHT, text)


def content(text: str) -> Event:
    return Event(Kind.CONTENT, text)


def call(index: int, name: str, arguments: str, flaw: Flaw | None = None) -> list[Event]:
    return [
        Event(Kind.CALL_BEGIN, index=index, name=name),
        Event(Kind.ARGUMENTS, arguments, index),
        Event(Kind.CALL_END, index=index, flaw=flaw),
    ]


V31 = f'{CALLS}{CALL}far{SEP}{{"a": "b"}}{CALL_END}{CALLS_END}'
V3 = f'{CALLS}{CALL}function{SEP}far\n```json\n{{"a": "b"}}\n```{CALL_END}{CALLS_END}'
QWEN = '<tool_call>\n{"name": "far", "arguments": {"a": "b"}}\n</tool_call>'
FAR = call(0, "far", '{"a": "b"}')


@pytest.mark.parametrize("tokenizer", [bpe, characters])
@pytest.mark.parametrize(
    ("text", "open_", "tools", "expected"),
    [
        ("", False, None, []),
        ("the road", False, None, [content("the road")]),
        ("<think>\nlong\n</think>\n\nfar", False, None, [thought("long"), content("far")]),
        ("long\n</think>\n\nfar", True, None, [thought("long"), content("far")]),
        ("long", True, None, [thought("long")]),
        (f"long</think>far.{V31}", True, DEEPSEEK, [thought("long"), content("far."), *FAR]),
        (f"long\n</think>\n\n{V3}", True, DEEPSEEK, [thought("long"), *FAR]),
        (f"<think>\n\n</think>\n\nfar.\n{QWEN}", False, HERMES, [content("far."), *FAR]),
        (f"far {V31}", False, None, [content(f"far {V31}")]),
        (f"far {QWEN}", False, DEEPSEEK, [content(f"far {QWEN}")]),
        (f"{V31}</think>far", True, DEEPSEEK, [thought(V31), content("far")]),
        (" <think>a</think> b\n", None, None, [content(" <think>a</think> b\n")]),
        (f"\n{V31}", None, DEEPSEEK, [content("\n"), *FAR]),
    ],
)
def test_what_an_answer_is_made_of(
    tokenizer: Callable[[], Tokenizer],
    text: str,
    open_: bool | None,
    tools: ToolFormat | None,
    expected: list[Event],
) -> None:
    given, stream = stream_of(tokenizer(), text, open_, tools=tools)
    assert given == expected
    assert stream.stopped is None


@pytest.mark.parametrize(
    ("text", "open_", "tools", "expected", "stopped"),
    [
        ("the road Q: 1", False, None, [content("the road ")], True),
        ("Q: far</think>the Q: a", True, None, [thought("Q: far"), content("the ")], True),
        ("<think>Q:</think>is", False, None, [thought("Q:"), content("is")], False),
        (V31.replace('"b"', '"Q:"') + "Q:", False, DEEPSEEK, call(0, "far", '{"a": "Q:"}'), True),
        ("the Q", False, None, [content("the Q")], False),
        (f"the Q{V31}: 1", False, DEEPSEEK, [content("the Q"), *FAR, content(": 1")], False),
        (f"the Q: 1{V31}", False, DEEPSEEK, [content("the ")], True),
        ("Q: 1</think>", None, None, [], True),
    ],
)
def test_stop_strings_are_those_of_the_content(
    text: str, open_: bool | None, tools: ToolFormat | None, expected: list[Event], stopped: bool
) -> None:
    given, stream = stream_of(bpe(), text, open_, ["Q:"], tools)
    assert given == expected
    assert stream.stopped == ("Q:" if stopped else None)


def test_a_line_end_does_not_stop_a_call() -> None:
    assert stream_of(bpe(), V3, stops=["\n", "`"], tools=DEEPSEEK)[0] == FAR
    assert stream_of(bpe(), QWEN, stops=["\n", "{"], tools=HERMES)[0] == FAR


def test_a_stop_string_that_only_the_end_makes_certain() -> None:
    """The line end might have been that before a call."""
    stream = AnswerStream(bpe(), False, ["\n"], HERMES)
    given = [event for token in bpe().encode("far\n") for event in stream.push(token)]
    assert (merged(given), stream.stopped) == ([content("far")], None)
    assert (stream.finish("length"), stream.stopped) == ([], "\n")


def test_nothing_comes_after_a_stop_string() -> None:
    _, stream = stream_of(bpe(), "the road", stops=["the"])
    assert stream.push(bpe().encode("road")[0]) == [] == stream.finish("stop")
    assert stream.tokens == len(bpe().encode("the"))


def test_an_answer_that_is_cut_off_inside_a_call() -> None:
    text = V31[: V31.index('b"')]
    assert stream_of(bpe(), text, tools=DEEPSEEK, reason="length")[0] == call(
        *(0, "far", '{"a": "', Flaw.UNFINISHED)
    )
    assert stream_of(bpe(), text, tools=DEEPSEEK)[0] == call(0, "far", '{"a": "', Flaw.INVALID)


def test_half_a_character_at_the_end() -> None:
    first, *_ = bpe().encode("吾")
    stream = AnswerStream(bpe(), False)
    assert (stream.push(first), stream.finish("length")) == ([], [content("\ufffd")])


@pytest.mark.parametrize("tokenizer", [bpe, characters])
@pytest.mark.parametrize(
    ("inside", "after", "open_"),
    [
        ("", "the road", False),
        ("<think>", "", False),
        ("<think>the road</think>", "is long", False),
        ("\n<think>\n\n</think>", "\n\nis long", False),
        ("the road</think>", "is long", True),
        ("the road", "", True),
        ("</think>", "", True),
        ("", "</think>the <think> road", False),
        ("", "<think>the</think>", None),
    ],
)
def test_tokens_of_a_thought_are_counted(
    tokenizer: Callable[[], Tokenizer], inside: str, after: str, open_: bool | None
) -> None:
    """Its marks with it, so that the rest are those of the answer."""
    _, stream = stream_of(tokenizer(), inside + after, open_)
    counts = [len(tokenizer().encode(text, allow_special=True)) for text in (inside, after)]
    assert [stream.reasoning_tokens, stream.tokens] == [counts[0], sum(counts)]


def test_whether_it_is_in_a_thought() -> None:
    for open_ in (True, False):
        stream = AnswerStream(bpe(), open_)
        seen = [stream.in_thought]
        for token in bpe().encode("<think>the</think>.", allow_special=True):
            stream.push(token)
            seen.append(stream.in_thought)
        assert seen == [open_, *[True] * (len(seen) - 3), False, False]
    assert not AnswerStream(bpe(), None).in_thought


BITS = [
    "<think>",
    "</think>",
    V31,
    V3,
    QWEN,
    "Q: ",
    "Q",
    "\n",
    " ",
    "the road",
    "吾",
    "<",
    "</th",
    CALL,
]


@given(
    st.lists(st.sampled_from(BITS), max_size=8).map("".join),
    st.sampled_from([True, False, None]),
    st.sampled_from([None, *ToolFormat]),
    st.lists(st.sampled_from(["Q:", "road", "\n\n", "Q"]), max_size=2),
    st.sampled_from(["stop", "length"]),
)
def test_what_is_seen_does_not_depend_on_the_vocabulary(
    text: str, open_: bool | None, tools: ToolFormat | None, stops: list[str], reason: str
) -> None:
    """One character a token, or long ones: the same events, and the same end."""
    long, short = (
        stream_of(tokenizer(), text, open_, stops, tools, reason) for tokenizer in (bpe, characters)
    )
    assert long[0] == short[0]
    assert long[1].stopped == short[1].stopped
    joined = "".join(event.text for event in long[0])
    if not stops and tools is None:
        squeezed = re.sub(r"</?think>|\s", "", joined)
        assert squeezed == re.sub(r"</?think>|\s", "", text)


def test_a_model_made_here_calls_as_v31_does() -> None:
    assert format_of(bpe()) is DEEPSEEK
