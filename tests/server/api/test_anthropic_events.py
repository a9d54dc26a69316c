"""The events of a message against those of DeepSeek's own package."""

import json
import re

import deepseek_recipe
import pytest

from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.asking import Message, Usage
from qiusuo.server.api.anthropic_events import MessageEvents, stop_reason, stop_sequence
from tests.server.api import recipe
from tests.server.api.talkers import WEATHER, talker, tokenizer
from tests.server.api.test_chat_chunks import NONE, ONE, PARIS, call, content, thought
from tests.server.api.test_responses_events import CUT_CALL, CUT_MARKS, recipe_options

FUNCTION = WEATHER["function"]
TOOL = {
    "name": "get_weather",
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}
HI = [{"role": "user", "content": "hi"}]
BODY = {"model": recipe.MODEL, "max_tokens": 100, "messages": HI, "stream": True}
PLAIN = {"thinking": {"type": "disabled"}}
TOOLS = {"tools": [TOOL]}
CASES = {
    "thinking": ({}, ["let", " me", "</think>", "Hel", "lo"], "Stop",
                 thought("let", " me") + content("Hel", "lo")),
    "plain": (PLAIN, ["Hel", "lo"], "Stop", content("Hel", "lo")),
    "cut in the answer": (PLAIN, ["Hel", "lo"], "Length", content("Hel", "lo")),
    "cut in the thought": ({}, ["Hel", "lo"], "Length", thought("Hel", "lo")),
    "nothing": (PLAIN, [], "Stop", []),
    "call": (TOOLS | PLAIN, [recipe.TOOL_CALLS.format(ONE)], "Stop", call(0, *PARIS)),
    "calls after thought and words": (
        TOOLS,
        ["let", " me", "</think>", "words", "\n\n", recipe.TOOL_CALLS.format(ONE + NONE)],
        "Stop",
        thought("let", " me") + content("words") + call(0, *PARIS) + call(1, "{}"),
    ),
    "cut in a call": (TOOLS | PLAIN, [CUT_MARKS], "Length", CUT_CALL),
    "stopped": (PLAIN | {"stop_sequences": ["ll"]}, ["He", "llo"], "Stop", content("He")),
}  # fmt: skip


def ours(events: list[Event], reason: str, stopped: str | None, tokens: int) -> list[dict]:
    told = MessageEvents("the-id", "the-model", 20)
    made = list(told.begin())
    for event in events:
        made += told.push(event)
    usage = Usage(20, tokens, 0, 16)
    made += told.finish(reason, stopped, usage)
    made.append(told.message)
    return made


def theirs(body: dict, pieces: list[str], finish: str) -> list[dict]:
    """The events, and the message that they come to."""
    request = deepseek_recipe.MessagesRequest(json.dumps(BODY | body)).convert(recipe_options())
    generator = deepseek_recipe.MessagesRequest.chunk_generator(request, "the-id", "the-model")
    processor = deepseek_recipe.StreamProcessor(generator, request.parsing_options)
    usage = deepseek_recipe.PromptUsage(prompt_tokens=20, prompt_cache_hit_tokens=16)
    made = processor.push(deepseek_recipe.InferenceChunk.ready(prompt_usage=usage))
    for piece in pieces:
        made += processor.push(deepseek_recipe.InferenceChunk.text(piece, 1))
    if not processor.finished:
        reason = getattr(deepseek_recipe.InferenceFinishReason, finish)
        made += processor.push(deepseek_recipe.InferenceChunk.finish(reason))
        made += processor.finish()
    whole = deepseek_recipe.MessagesResponse("the-id", "the-model", 1, 20, 16)
    told = [json.loads(one.to_json()) for one in made]
    for one in made:
        whole.accumulate(one)
    return [*told, json.loads(whole.to_json())]


def alike(events: list[dict]) -> list[dict]:
    """Without what is another each time, and without our three differences: the name of a message
    begins with `msg_`, a stream says "ping" only while there is nothing to say, and it begins
    before it is known what of the prompt is in the cache."""
    text = re.sub(r'"(call_\d\d)_\w{24}"', r'"\1"', json.dumps(events))
    kept = [
        one for one in json.loads(text.replace("msg_the-id", "the-id")) if one["type"] != "ping"
    ]
    del kept[0]["message"]["usage"]
    return kept


@pytest.mark.parametrize("case", CASES)
def test_events_are_those_of_deepseeks_package(case: str) -> None:
    body, pieces, finish, events = CASES[case]
    reason = {"Stop": "stop", "Length": "length"}[finish]
    if reason == "stop" and any(event.kind is Kind.CALL_BEGIN for event in events):
        reason = "tool_calls"
    stopped = "ll" if "stop_sequences" in body else None
    wanted = theirs(body, pieces, finish)
    if case == "cut in a call":  # that package leaves the input empty; its clients do not
        assert wanted[-1]["content"][0]["input"] in ({}, {"city": "Paris"})
        wanted[-1]["content"][0]["input"] = {"city": "Paris"}
    assert alike(ours(events, reason, stopped, len(pieces))) == alike(wanted)


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        ('{"a": [1, "tw', {"a": [1]}),
        ("", {}),
        ("[1]", {}),
        ('{"a": tru!', {}),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_arguments_are_an_object_as_far_as_they_go(arguments: str, made: dict) -> None:
    [*_, message] = ours(call(0, arguments), "length", None, 1)
    assert message["content"][0]["input"] == made


@pytest.mark.parametrize(
    ("reason", "stopped", "told"),
    [
        ("stop", None, "end_turn"),
        ("stop", "x", "stop_sequence"),
        ("tool_calls", None, "tool_use"),
        ("length", None, "max_tokens"),
        ("deadline", None, "max_tokens"),
        ("cancelled", None, "max_tokens"),
    ],
)
def test_reasons(reason: str, stopped: str | None, told: str) -> None:
    assert stop_reason(reason, stopped) == told


def answer(text: str, reason: str = "stop") -> Message:
    ids = tokenizer().encode(text, allow_special=True)
    return Message(text, None, [], ids, reason, Usage(1, len(ids), 0, 0))


def test_which_sequence_stopped_an_answer() -> None:
    lm = talker()
    assert stop_sequence(lm, answer("one, two!"), ["?", "two!", "o!"]) == "two!"
    assert stop_sequence(lm, answer("one, two!"), ["one"]) is None  # it was in the thought
    assert stop_sequence(lm, answer("one"), []) is None
    assert stop_sequence(lm, answer("one", "length"), ["e"]) is None
    ended = answer("one")
    ended.token_ids.append(min(lm.stop_ids))
    assert stop_sequence(lm, ended, ["e"]) is None


def test_the_first_sequence_to_be_complete_is_named() -> None:
    lm, tokens = talker(), tokenizer()
    long = max((tokens.decode([i]) for i in range(300, tokens.vocab_size)), key=len)
    said = answer(f"so {long}")
    last = tokens.decode(said.token_ids[-1:])
    assert len(last) > 2  # so that one token completes several
    assert stop_sequence(lm, said, [last, last[-2:], last[-2]]) == last[-2]
    assert stop_sequence(lm, said, [last[-2:], last]) == last
