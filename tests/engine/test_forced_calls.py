"""Forced calls: a model of random logits writes calls that the parsers, the templates themselves
and a small reader of schemas find right."""

import json
from functools import cache

import pytest
import torch

import qiusuo
from qiusuo.data.chat_template import default_template, render_chat
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import ASSISTANT_TOKEN, EOS_TOKEN, TOOL_TOKENS
from qiusuo.engine.answer_events import Flaw, Kind
from qiusuo.engine.answer_stream import AnswerStream
from qiusuo.engine.constraint import Constraint, Grammars
from qiusuo.engine.forced_calls import forced_matchers
from qiusuo.engine.limits import Limits
from qiusuo.engine.sampler import BadLogits, Row, draw
from qiusuo.engine.sampling import Sampling
from qiusuo.engine.tool_calls import format_of
from tests.conformance.test_templates import template
from tests.model.shapes import tiny_model

HERMES = """{%- for m in messages -%}<|im_start|>{{ m.role }}
{%- if m.tool_calls -%}{%- for call in m.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}{%- else %}
{{ m.content }}{%- endif -%}<|im_end|>
{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
CLOCK = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock-2", "description": "", "parameters": CLOCK}},
]
FORMATS = {
    "v3": template("deepseek-v3"),
    "r1": template("deepseek-r1"),
    "v3.1": template("deepseek-v3.1"),
    "distill-qwen": template("deepseek-r1-distill-qwen"),
    "ours": default_template(),
    "hermes": HERMES,
}
USER = {"role": "user", "content": "?"}


@cache
def marked(name: str) -> Tokenizer:
    """A vocabulary to which the marks are tokens, with this template."""
    tokenizer = Tokenizer.train_bpe(['{"city": "far", "name": "arguments"} json clock ' * 9], 360)
    if name == "hermes":
        tokenizer.backend.add_special_tokens(["<tool_call>", "</tool_call>"])
        tokenizer = Tokenizer(tokenizer.backend, eos_token=EOS_TOKEN)
        assert "<tool_call>" in tokenizer.special_tokens
    tokenizer.chat_template = FORMATS[name]
    return tokenizer


@cache
def spelled(name: str) -> Tokenizer:
    """A vocabulary to which they are text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    ascii_signs = {chr(code) for code in range(32, 127)}
    letters = sorted(ascii_signs | set("".join(TOOL_TOKENS)) | {"\n"})
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([EOS_TOKEN])
    return Tokenizer(backend, chat_template=FORMATS[name], eos_token=EOS_TOKEN)


@cache
def grammars_of(make, name: str) -> Grammars:
    tokenizer = make(name)
    ends = frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
    return Grammars(tokenizer, tokenizer.vocab_size, ends)


def write(make, name: str, must_call: str | bool, seed: int, after_thought: bool = False) -> list:
    """What a model of random logits answers, without an end token."""
    grammars = grammars_of(make, name)
    [matcher] = forced_matchers(grammars, make(name), TOOLS, must_call, 1, after_thought)
    generator = torch.Generator().manual_seed(seed)
    sampling, answer = Sampling(temperature=1.0, seed=seed), []
    while not matcher.finished:
        logits = 3 * torch.randn(1, grammars.vocab_size, generator=generator)
        row = Row(sampling, [], answer, len(answer), allowed_W=matcher.allowed())
        (drawn,) = draw(logits, [row])
        assert not isinstance(drawn, BadLogits), drawn
        matcher.advance(drawn.token)
        if drawn.token not in grammars.end_ids:
            answer.append(drawn.token)
        assert len(answer) < 5000
    return answer


def parsed(tokenizer: Tokenizer, answer: list[int]) -> list[tuple[str, str]]:
    """Name and arguments of each call; there must be nothing else, and no flaw."""
    stream = AnswerStream(tokenizer, False, (), format_of(tokenizer))
    events = [event for token in answer for event in stream.push(token)] + stream.finish("stop")
    calls: list[list[str]] = []
    for event in events:
        assert event.kind is not Kind.CONTENT, event
        assert event.flaw is None
        if event.kind is Kind.CALL_BEGIN:
            calls.append([event.name or "", ""])
        elif event.kind is Kind.ARGUMENTS:
            calls[-1][1] += event.text
    return [(name, arguments) for name, arguments in calls]


def check_arguments(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "clock-2":
        assert value == {}
        return
    assert name == "weather"
    assert {"city", "days"} <= value.keys() <= {"city", "days", "unit"}
    assert len(value["city"]) <= 6
    assert type(value["days"]) is int
    assert 1 <= value["days"] <= 9
    assert value.get("unit", "C") in ("C", "F")


@pytest.mark.parametrize("make", [marked, spelled])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("must_call", [True, "weather", "clock-2"])
def test_random_logits_write_calls_that_are_read_back(make, name, must_call):
    counts = set()
    for seed in range(4):
        answer = write(make, name, must_call, seed)
        calls = parsed(make(name), answer)
        counts.add(len(calls))
        for called, arguments in calls:
            assert must_call in (True, called)
            check_arguments(called, arguments)
    assert 0 not in counts
    if must_call is not True:
        assert counts == {1}


@pytest.mark.parametrize("name", ["r1", "v3.1", "ours"])
def test_what_is_forced_is_what_the_template_writes(name):
    """These templates write arguments as they are: the whole turn must come out letter by letter.
    Distils and V3 lose the last mark of a single call, and Hermes' spells arguments anew."""
    tokenizer, several = marked(name), 0
    for seed in range(8):
        answer = write(marked, name, True, seed)
        calls = [
            {"id": "1", "type": "function", "function": {"name": called, "arguments": arguments}}
            for called, arguments in parsed(tokenizer, answer)
        ]
        several += len(calls) > 1
        turns = [USER, {"role": "assistant", "tool_calls": calls}]
        text = render_chat(
            FORMATS[name], turns, bos_token="", eos_token=EOS_TOKEN, add_generation_prompt=False
        )
        turn = text.partition(ASSISTANT_TOKEN)[2].removeprefix("</think>")
        written = tokenizer.decode(answer) + EOS_TOKEN
        assert turn == written
    assert several


def test_marks_are_forced_as_tokens_and_nowhere_else():
    tokenizer = marked("v3.1")
    begin, call = (tokenizer.special_tokens[TOOL_TOKENS[i]] for i in (0, 2))
    [matcher] = forced_matchers(grammars_of(marked, "v3.1"), tokenizer, TOOLS, True, 1)
    assert matcher.allowed().nonzero().flatten().tolist() == [begin]
    matcher.advance(begin)
    assert matcher.allowed().nonzero().flatten().tolist() == [call]
    with pytest.raises(ValueError, match="does not fit"):
        matcher.advance(tokenizer.eos_id)
    # A grammar of the caller's own holds no mark, though it names the same token.
    grammar = Constraint("grammar", f'start: "a" <[{begin}]>')
    other = grammars_of(marked, "v3.1").matcher(grammar)
    for token in tokenizer.encode("a"):
        other.advance(token)
    assert not other.allowed()[begin]


def test_line_ends_may_follow_a_thought():
    texts = {marked("r1").decode(write(marked, "r1", "clock-2", s, True)) for s in range(20)}
    assert {len(text) - len(text.lstrip("\n")) for text in texts} == {0, 1, 2}


@cache
def language_model(name: str) -> qiusuo.LanguageModel:
    tokenizer = marked(name)
    model = tiny_model(
        0, eos_token_id=None, vocab_size=tokenizer.vocab_size, max_position_embeddings=2048
    )
    return qiusuo.LanguageModel(model, tokenizer, Limits(cache_bytes=1 << 22))


@pytest.mark.parametrize(("name", "thinking"), [("r1", False), ("v3.1", True), ("hermes", False)])
def test_a_model_thinks_first_and_then_calls(name, thinking):
    thinks = thinking or name == "r1"
    message = language_model(name).chat(
        [USER],
        tools=TOOLS,
        thinking=thinking,
        thinking_budget=5,
        must_call="weather",
        temperature=1.5,
        seed=3,
        max_tokens=400,
        logprobs=0,
    )
    assert message.finish_reason == "tool_calls"
    assert message.content == ""
    assert (message.usage.reasoning_tokens > 0) == thinks
    [call] = message.tool_calls
    assert call["function"]["name"] == "weather"
    check_arguments("weather", call["function"]["arguments"])
    assert not message.content_drawn
    assert len(message.reasoning_drawn) <= 5 * thinks


def test_a_call_that_is_cut_off_has_a_flaw():
    lm, heard = language_model("v3.1"), []
    message = lm.chat(
        [USER], tools=TOOLS, must_call="weather", max_tokens=14, on_event=heard.append
    )
    assert message.finish_reason == "length"
    assert [event.flaw for event in heard if event.kind is Kind.CALL_END] == [Flaw.UNFINISHED]


def test_each_answer_has_its_own_place_in_the_grammar():
    one, two = forced_matchers(grammars_of(marked, "v3"), marked("v3"), TOOLS, True, 2)
    one.advance(int(one.allowed().nonzero()[0]))
    assert two.allowed().nonzero().flatten().tolist() != one.allowed().nonzero().flatten().tolist()


def test_calls_that_are_not_allowed():
    lm = language_model("v3.1")
    begins = [lm.tokenizer.special_tokens[TOOL_TOKENS[i]] for i in (0, 2)]
    message = lm.chat(
        [USER], tools=TOOLS, allow_calls=False, logit_bias={begins[0]: 90}, max_tokens=20
    )
    assert not set(begins) & set(message.token_ids)
    assert message.usage.prompt_tokens == lm.chat([USER], max_tokens=1).usage.prompt_tokens
    with pytest.raises(DataError, match="no tools"):
        lm.chat([USER], tools=TOOLS, allow_calls=False, must_call=True)


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ({"type": "string"}, "schema of an object"),
        ([], "must be a JSON schema"),
        ({"properties": {"a": {"type": "strnig"}}}, "cannot be used"),
        ({"properties": {"a": {"pattern": "(?=a)"}}}, "cannot be used"),
    ],
)
def test_a_faulty_schema_is_told_with_its_tool(parameters, what):
    bad = {"type": "function", "function": {"name": "bad", "parameters": parameters}}
    with pytest.raises(DataError, match=f"tool 'bad': .*{what}"):
        language_model("v3.1").chat([USER], tools=[*TOOLS, bad], must_call=True)


def test_what_cannot_be_forced():
    lm = language_model("v3")
    with pytest.raises(DataError, match="unknown tool 'wether': did you mean 'weather'"):
        lm.chat([USER], tools=TOOLS, must_call="wether")
    with pytest.raises(DataError, match="no tools"):
        lm.chat([USER], must_call=True)
    bare = Tokenizer(marked("v3").backend, chat_template=PLAIN)
    with pytest.raises(DataError, match="writes no calls"):
        forced_matchers(grammars_of(marked, "v3"), bare, TOOLS, True, 1)


def test_parameters_may_be_missing():
    tools = [{"name": "now"}]
    [matcher] = forced_matchers(grammars_of(marked, "ours"), marked("ours"), tools, "now", 1)
    text = f'{TOOL_TOKENS[0]}{TOOL_TOKENS[2]}now{TOOL_TOKENS[8]}{{"a": [1, null]}}'
    for token in marked("ours").encode(text + TOOL_TOKENS[3], allow_special=True):
        assert matcher.allowed()[token]
        matcher.advance(token)
    assert not matcher.finished
