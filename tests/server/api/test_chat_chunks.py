"""Chunks and whole answers against those of DeepSeek's own package."""

import json

import deepseek_recipe
import pytest

from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.asking import Message, Usage
from qiusuo.engine.sampler import Drawn
from qiusuo.server.api.chat_chunks import ChatShape, finish_reason, usage_told
from qiusuo.server.api.streaming import to_json
from qiusuo.server.api.token_texts import TokenTexts
from tests.server.api import recipe
from tests.server.api.talkers import WEATHER, tokenizer

BODY = {"model": recipe.MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
PLAIN = {"thinking": {"type": "disabled"}}
USAGE = {"stream_options": {"include_usage": True}}


def thought(*pieces: str) -> list[Event]:
    return [Event(Kind.THOUGHT, piece) for piece in pieces]


def content(*pieces: str) -> list[Event]:
    return [Event(Kind.CONTENT, piece) for piece in pieces]


def call(index: int, *arguments: str) -> list[Event]:
    return [
        Event(Kind.CALL_BEGIN, index=index, name="get_weather"),
        *(Event(Kind.ARGUMENTS, piece, index) for piece in arguments),
        Event(Kind.CALL_END, index=index),
    ]


PARIS = ("{", '"city"', ": ", '"', "Paris", '"', "}")  # the pieces in which the package tells it
ONE = recipe.INVOKE.format("get_weather", recipe.PARAMETER.format("city", "Paris"))
NONE = recipe.INVOKE.format("get_weather", "")
TOOLS = {"tools": [WEATHER]}
CASES = {
    "thinking": ({}, ["let", " me", "</think>", "Hel", "lo"], [1] * 5, "Stop",
                 thought("let", " me") + content("Hel", "lo")),
    "thinking, usage": (USAGE, ["let", " me", "</think>", "Hel", "lo"], [1] * 5, "Stop",
                        thought("let", " me") + content("Hel", "lo")),
    "plain": (PLAIN, ["Hel", "lo"], [1] * 2, "Stop", content("Hel", "lo")),
    "plain, usage": (PLAIN | USAGE, ["Hel", "lo"], [1] * 2, "Stop", content("Hel", "lo")),
    "cut in the thought": ({}, ["Hel", "lo"], [1] * 2, "Length", thought("Hel", "lo")),
    "nothing": (PLAIN, [], [], "Stop", []),
    "nothing, thinking": ({}, [], [], "Length", []),
    "filtered": (PLAIN, ["Hel"], [1], "ContentFilter", content("Hel")),
    "call": (PLAIN | TOOLS, [recipe.TOOL_CALLS.format(ONE)], [9], "Stop", call(0, *PARIS)),
    "calls after a thought": (
        TOOLS,
        ["let", " me", "</think>", "words", "\n\n", recipe.TOOL_CALLS.format(ONE + NONE)],
        [1, 1, 1, 1, 1, 9],
        "Stop",
        thought("let", " me") + content("words") + call(0, *PARIS) + call(1, "{}"),
    ),
}  # fmt: skip


def shape(body: dict, texts: TokenTexts | None = None) -> ChatShape:
    return ChatShape(
        id="the-id",
        created=1,
        model="the-model",
        fingerprint="fp_0",
        thinking="thinking" not in body,
        null_usage="stream_options" in body,
        texts=texts,
    )


def reason(finish: str, events: list[Event]) -> str:
    if any(event.kind is Kind.CALL_BEGIN for event in events):
        return "tool_calls"
    return {"Stop": "stop", "Length": "length", "ContentFilter": "content_filter"}[finish]


def usage(tokens: int) -> dict:
    return usage_told(Usage(20, tokens, 0, 16), thinking=False)


def like(value, ours: bool):
    """Without what chance and the clock decide."""
    if isinstance(value, dict):
        return {key: "..." if key == "created" else like(one, ours) for key, one in value.items()}
    if isinstance(value, list):
        return [like(one, ours) for one in value]
    if isinstance(value, str) and value.startswith("call_0"):
        assert len(value) == len("call_00_") + 24
        return value[: len("call_00_")]
    return value


@pytest.mark.parametrize("name", CASES)
def test_chunks_are_those_of_the_package_byte_for_byte(name: str) -> None:
    more, pieces, tokens, finish, events = CASES[name]
    expected = recipe.chunks(BODY | more, pieces, tokens, finish)
    mine = shape(more)
    made = [mine.opening(0)]
    made += [chunk for event in events if (chunk := mine.piece(0, event)) is not None]
    made.append(mine.closing(0, reason(finish, events)) | {"usage": usage(sum(tokens))})
    assert len(made) == len(expected)
    for chunk, theirs in zip(made, expected, strict=True):
        assert to_json(like(chunk, True)) == json.dumps(
            like(theirs, False), ensure_ascii=False, separators=(",", ":")
        )


@pytest.mark.parametrize("name", CASES)
def test_a_whole_answer_is_that_of_the_package(name: str) -> None:
    more, pieces, _, finish, events = CASES[name]
    expected = recipe.accumulated(BODY | more, pieces, finish)
    made: list[dict] = []
    for event in events:
        if event.kind is Kind.CALL_BEGIN:
            made.append({"function": {"name": event.name, "arguments": ""}})
        elif event.kind is Kind.ARGUMENTS:
            made[-1]["function"]["arguments"] += event.text
    message = Message(
        content="".join(event.text for event in events if event.kind is Kind.CONTENT),
        reasoning_content="".join(one.text for one in events if one.kind is Kind.THOUGHT) or None,
        tool_calls=made,
        token_ids=[],
        finish_reason=reason(finish, events),
        usage=Usage(0, 0, 0, 0),
    )
    told = shape(more).whole([message], usage(len(pieces)))
    assert to_json(like(told, True)) == json.dumps(
        like(expected, False), ensure_ascii=False, separators=(",", ":")
    )


def test_logprobs_are_those_of_the_package() -> None:
    tokens = tokenizer()
    theirs = deepseek_recipe.Tokenizer.from_str(tokens.backend.to_str())
    body = BODY | {"logprobs": True, "top_logprobs": 1}
    request = recipe.converted(body)
    generator = deepseek_recipe.ChatCompletionRequest.chunk_generator(request, "i", "m")
    processor = deepseek_recipe.StreamProcessor(generator, request.parsing_options, theirs)
    processor.push(deepseek_recipe.InferenceChunk.ready())
    texts = TokenTexts(tokens)
    mine = shape({}, texts)
    halves = tokens.encode("龘")  # not in the vocabulary: bytes
    assert len(halves) > 1
    written = tokens.encode("求索 Hello")
    for ids, kind, text in ((written, Kind.THOUGHT, "求索 Hello"), (halves, Kind.CONTENT, "龘")):
        made: list[dict] = []
        for token in ids:
            chunk = deepseek_recipe.InferenceChunk.tokens([token], [(-0.5, [(token, -0.5)])])
            made += [json.loads(one.to_json()) for one in processor.push(chunk)]
        expected: dict = {}
        for one in made:
            for key, listed in (one["choices"][0]["logprobs"] or {}).items():
                expected.setdefault(key, []).extend(listed)
        drawn = tuple(Drawn(token, -0.5, ((token, -0.5),)) for token in ids)
        chunk = mine.piece(0, Event(kind, text, drawn=drawn))
        assert chunk["choices"][0]["logprobs"] == expected
        end = tokens.encode("</think>", allow_special=True)
        processor.push(deepseek_recipe.InferenceChunk.tokens(end, [(-0.5, [])]))


def test_usage_adds_up_and_tells_of_thoughts_where_there_are_some() -> None:
    told = usage_told(Usage(20, 5, 3, 16), thinking=True)
    assert told["prompt_cache_hit_tokens"] + told["prompt_cache_miss_tokens"] == 20
    assert told["total_tokens"] == 25
    assert told["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert "completion_tokens_details" not in usage_told(Usage(20, 5, 0, 16), thinking=False)


@pytest.mark.parametrize("cut", ["deadline", "error", "cancelled", ""])
def test_what_the_server_cut_off_is_not_told_as_whole(cut: str) -> None:
    assert finish_reason(cut) == "insufficient_system_resource"
