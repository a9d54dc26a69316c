"""The events of a response against those of DeepSeek's own package."""

import json
import re

import deepseek_recipe
import pytest

from qiusuo.engine.answer_events import Event, Flaw, Kind
from qiusuo.engine.asking import Usage
from qiusuo.server.api.errors import ApiError
from qiusuo.server.api.responses_events import CUT_OFF, ResponseEvents
from qiusuo.server.api.responses_items import sealed, unsealed
from qiusuo.server.api.responses_request import ResponsesRequest
from qiusuo.server.api.streaming import named_frame
from tests.server.api import recipe
from tests.server.api.talkers import WEATHER
from tests.server.api.test_chat_chunks import NONE, ONE, PARIS, call, content, thought

TOOL = {"type": "function", **WEATHER["function"]}
BODY = {"model": recipe.MODEL, "input": "hi", "stream": True}
PLAIN = {"reasoning": {"effort": "none"}}
TOOLS = {"tools": [TOOL]}
ASKED = {
    "instructions": "Be kind.",
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {
        "verbosity": "low",
        "format": {
            "type": "json_schema",
            "name": "mood",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"mood": {"type": "string"}},
                "required": ["mood"],
                "additionalProperties": False,
            },
        },
    },
    "max_output_tokens": 30,
    "temperature": 0.5,
    "top_p": 0.25,
    "user": "somebody",
}
CUT_CALL = [Event(Kind.CALL_BEGIN, index=0, name="get_weather")]
CUT_CALL += [Event(Kind.ARGUMENTS, piece, 0) for piece in PARIS[:-1]]
CUT_CALL += [Event(Kind.CALL_END, index=0, flaw=Flaw.UNFINISHED)]
CUT_MARKS = recipe.TOOL_CALLS.format(ONE).split("</｜DSML｜invoke>")[0]
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
    "everything that is repeated": (ASKED, ["t", "</think>", "{}"], "Stop",
                                    thought("t") + content("{}")),
}  # fmt: skip


def ours(body: dict, events: list[Event], reason: str, tokens: int) -> list[dict]:
    told = ResponseEvents("the-id", 1, "the-model", ResponsesRequest.model_validate(BODY | body))
    made = list(told.begin())
    for event in events:
        made += told.push(event)
    made += told.finish(reason, Usage(20, tokens, 0, 16))
    assert made[-1]["response"] == told.response
    return made


def theirs(body: dict, pieces: list[str], finish: str) -> list[dict]:
    text = json.dumps(BODY | body)
    echo = deepseek_recipe.ResponsesRequest(text).echo()
    request = deepseek_recipe.ResponsesRequest(text).convert(recipe_options())
    generator = deepseek_recipe.ResponsesRequest.chunk_generator(request, "the-id", "the-model")
    processor = deepseek_recipe.StreamProcessor(generator.with_echo(echo), request.parsing_options)
    usage = deepseek_recipe.PromptUsage(prompt_tokens=20, prompt_cache_hit_tokens=16)
    made = processor.push(deepseek_recipe.InferenceChunk.ready(prompt_usage=usage))
    for piece in pieces:
        made += processor.push(deepseek_recipe.InferenceChunk.text(piece, 1))
    reason = getattr(deepseek_recipe.InferenceFinishReason, finish)
    made += processor.push(deepseek_recipe.InferenceChunk.finish(reason))
    made += processor.finish()
    return [json.loads(one.to_json()) for one in made]


def recipe_options() -> deepseek_recipe.ConversionOptions:
    return deepseek_recipe.ConversionOptions(
        thinking_max_tokens_upper_bound=65_536, non_thinking_max_tokens_upper_bound=65_536
    )


def alike(events: list[dict]) -> list[dict]:
    """Without what is another each time, and without our three differences: the name of a response
    begins with `resp_`, a thought is sealed where it is asked for only, and OpenAI's newer field of
    the tokens written to a cache is there."""
    text = json.dumps(events)
    text = re.sub(r'"(call_\d\d)_\w{24}"', r'"\1"', text)
    text = re.sub(r'"(created_at|completed_at)": \d+', r'"\1": 0', text)
    text = re.sub(r'"encrypted_content": ("[^"]*"|null)', '"encrypted_content": 0', text)
    text = re.sub(r'"reasoning_tokens": \d+', '"reasoning_tokens": 0', text)
    return json.loads(
        text.replace(', "cache_write_tokens": 0', "").replace("resp_the-id", "the-id")
    )


@pytest.mark.parametrize("case", CASES)
def test_events_are_those_of_deepseeks_package(case: str) -> None:
    body, pieces, finish, events = CASES[case]
    made = ours(body, events, {"Stop": "stop", "Length": "length"}[finish], len(pieces))
    wanted = theirs(body, pieces, finish)
    if "text" in body:  # kept in 32 bits there
        wanted = json.loads(json.dumps(wanted), parse_float=lambda one: round(float(one), 4))
    assert alike(made) == alike(wanted)
    assert [one["sequence_number"] for one in made] == list(range(len(made)))


def test_what_the_server_cut_off_has_failed() -> None:
    made = ours(PLAIN, content("Hel"), "deadline", 1)
    assert made[-1]["type"] == "response.failed"
    response = made[-1]["response"]
    assert response["error"] == {"code": "server_error", "message": CUT_OFF}
    assert (response["status"], response["usage"]["output_tokens"]) == ("failed", 1)
    [item] = response["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Hel")


def test_a_failure_ends_what_was_begun() -> None:
    told = ResponseEvents("i", 1, "m", ResponsesRequest.model_validate(BODY))
    made = [*told.begin(), *told.push(Event(Kind.THOUGHT, "hm"))]
    made += told.fail(ApiError(503, "gone"))
    kinds = [one["type"].removeprefix("response.") for one in made]
    assert kinds[-2:] == ["output_item.done", "failed"]
    assert made[-1]["response"]["error"]["message"] == "gone"
    assert made[-1]["response"]["usage"] is None


def test_a_frame_has_the_name_of_its_event() -> None:
    assert named_frame({"type": "response.created"}) == (
        b'event: response.created\ndata: {"type":"response.created"}\n\n'
    )


def test_a_seal_holds_a_thought_and_nothing_else() -> None:
    assert unsealed(sealed("求索 \n")) == "求索 \n"
    assert unsealed("gAAAAA another server's") == ""
    assert unsealed(sealed("x") + "!") == ""
    assert unsealed("qiusuo-1:/w==") == ""
