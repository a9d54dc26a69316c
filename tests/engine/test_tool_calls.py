"""Calls of tools, read while they come, against what was written and against plain searches."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.data.chat_template import default_template, render_chat
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.tool_format import ToolFormat
from qiusuo.data.vocabularies import ASSISTANT_TOKEN, EOS_TOKEN, THINK_END, TOOL_TOKENS
from qiusuo.engine.answer_events import Event, Flaw, Kind, merged
from qiusuo.engine.tool_calls import format_of, parser_of
from tests.conformance.conversations import CONVERSATIONS

DEEPSEEK, HERMES = ToolFormat.DEEPSEEK, ToolFormat.HERMES
CALLS, CALLS_END, CALL, CALL_END, OUTPUTS, OUTPUTS_END, OUTPUT, OUTPUT_END, SEP = TOOL_TOKENS


class Call(NamedTuple):
    name: str
    arguments: str
    flaw: Flaw | None = None


Read = tuple[str, list[Call]]


def events(form: ToolFormat, text: str, cuts: Sequence[int] = (), cut: bool = False) -> list[Event]:
    """Of a text in pieces of these lengths, then the rest."""
    parser = parser_of(form)
    given: list[Event] = []
    for length in cuts:
        given += parser.push(text[:length])
        text = text[length:]
    return merged([*given, *parser.push(text), *parser.finish(cut)])


def gathered(given: Sequence[Event]) -> Read:
    """(content, calls); begins and ends must match, and every piece must say something."""
    content, calls, open_ = "", list[Call](), False
    for event in given:
        if event.kind is Kind.CONTENT:
            assert event.text
            assert not open_
            content += event.text
            continue
        assert (event.kind is Kind.CALL_BEGIN) != open_
        open_ = event.kind is not Kind.CALL_END
        if event.kind is Kind.CALL_BEGIN:
            assert event.name
            calls.append(Call(event.name, ""))
        elif event.kind is Kind.ARGUMENTS:
            assert event.text
            calls[-1] = Call(calls[-1].name, calls[-1].arguments + event.text)
        else:
            calls[-1] = Call(*calls[-1][:2], event.flaw)
        assert event.index == len(calls) - 1
    assert not open_
    return content, calls


def read(form: ToolFormat, text: str, cut: bool = False) -> Read:
    """The same in one piece and one character at a time."""
    whole = events(form, text, cut=cut)
    assert events(form, text, [1] * len(text), cut) == whole
    return gathered(whole)


# What models write, and what it means


def v3(name: str, arguments: str) -> str:
    return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{CALL_END}"


def v31(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEP}{arguments}{CALL_END}"


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


PARIS = '{"city": "Paris"}'
CITY = Call("weather", PARIS)
ADD = Call("add", '{"a": [1, {"b": "}"}]}')
BOTH_V3 = v3(*CITY[:2]) + "\n" + v3(*ADD[:2])
BOTH_V31 = v31(*CITY[:2]) + v31(*ADD[:2])
FENCED = '{"code": "```python\\n1\\n```"}'

DEEPSEEK_CASES: list[tuple[str, str, Read]] = [
    ("no calls", "Just words. \n", ("Just words. \n", [])),
    ("V3", CALLS + BOTH_V3 + CALLS_END, ("", [CITY, ADD])),
    ("V3.1", CALLS + BOTH_V31 + CALLS_END, ("", [CITY, ADD])),
    ("words first", f"See.\n\n{CALLS}{BOTH_V3}{CALLS_END}", ("See.\n\n", [CITY, ADD])),
    ("no outer pair", BOTH_V31, ("", [CITY, ADD])),
    ("no outer pair, V3", "See." + BOTH_V3, ("See.", [CITY, ADD])),
    ("no outer end", CALLS + BOTH_V3, ("", [CITY, ADD])),
    ("no end at all, V3", (CALLS + BOTH_V3).removesuffix(CALL_END), ("", [CITY, ADD])),
    ("no end at all, V3.1", (CALLS + BOTH_V31).removesuffix(CALL_END), ("", [CITY, ADD])),
    (
        "no closing fence",
        f"{CALL}function{SEP}weather\n```json\n{PARIS}{CALL_END}{CALLS_END}",
        ("", [CITY]),
    ),
    ("no inner begin, V3", CALLS + BOTH_V3.replace(CALL, ""), ("", [CITY, ADD])),
    ("no inner begin, V3.1", CALLS + BOTH_V31.replace(CALL, ""), ("", [CITY, ADD])),
    ("no inner end", CALLS + BOTH_V3.replace(CALL_END, "") + CALLS_END, ("", [CITY, ADD])),
    ("line ends between", f"{CALLS}\n{BOTH_V31}\n{CALLS_END}\n\n", ("", [CITY, ADD])),
    ("no fence", f"{CALL}function{SEP}weather\n{PARIS}{CALL_END}", ("", [CITY])),
    ("a bare fence", f"{CALL}function{SEP}weather\n```\n{PARIS}\n```\n{CALL_END}", ("", [CITY])),
    ("a bare language", f"{CALL}function{SEP}weather\njson\n{PARIS}{CALL_END}", ("", [CITY])),
    ("V3.1 with a fence", v31("weather", f"```json\n{PARIS}\n```"), ("", [CITY])),
    ("V3.1 with a language", v31("weather", f"json\n{PARIS}"), ("", [CITY])),
    ("a fence on the name's line", v3(*CITY[:2]).replace("\n", ""), ("", [CITY])),
    ("no type", f"{CALL}{SEP}weather\n{PARIS}{CALL_END}", ("", [CITY])),
    ("type outside", f"function{SEP}weather\n```json\n{PARIS}\n```", ("function", [CITY])),
    ("no separator", f"{CALL}weather {PARIS}{CALL_END}", ("", [CITY])),
    ("no separator, V3", f"{CALL}function\nweather\n```json\n{PARIS}\n```", ("", [CITY])),
    ("a tool named function", v31("function", PARIS), ("", [Call("function", PARIS)])),
    ("fences in the arguments", v3("run", FENCED), ("", [Call("run", FENCED)])),
    ("spaces around", v31(" weather ", f"\n {PARIS} \n"), ("", [CITY])),
    ("no arguments", v31("now", ""), ("", [Call("now", "{}")])),
    ("no arguments, V3", v3("now", ""), ("", [Call("now", "{}")])),
    ("only a name", f"{CALL}function{SEP}now{CALL_END}", ("", [Call("now", "{}")])),
    ("no JSON", v31("now", "at once"), ("", [Call("now", "at once", Flaw.INVALID)])),
    ("no object", v3("now", "[1]"), ("", [Call("now", "[1]", Flaw.INVALID)])),
    (
        "a brace too few",
        CALLS + v3("add", '{"a": 1') + v31(*CITY[:2]),
        ("", [Call("add", '{"a": 1', Flaw.INVALID), CITY]),
    ),
    ("two separators", f"{CALL}weather{SEP}{SEP}{PARIS}{CALL_END}", ("", [CITY])),
    ("many backticks", v31("f", "x`````"), ("", [Call("f", "x``", Flaw.INVALID)])),
    ("no name", v31("", PARIS), (PARIS, [])),
    ("words in a call", f"{CALL}I do not know.{CALL_END}", ("I do not know.", [])),
    ("words after", f"See.{CALLS}{BOTH_V31}{CALLS_END}\n\nDone.", ("See.\n\nDone.", [CITY, ADD])),
    ("words after, alone", f"{CALLS}{BOTH_V31}{CALLS_END}\n\nDone.", ("Done.", [CITY, ADD])),
    ("words after, no outer end", f"{BOTH_V31}\nI see now.", ("I see now.", [CITY, ADD])),
    ("underscores", (CALLS + BOTH_V3).replace("▁", "_"), ("", [CITY, ADD])),
    ("spaces", (CALLS + BOTH_V3).replace("▁", " "), ("", [CITY, ADD])),
    ("marks of results", f"{OUTPUTS}{OUTPUT}21{OUTPUT_END}{OUTPUTS_END}", ("21", [])),
    ("half a mark", "a <｜tool", ("a <｜tool", [])),
    ("nearly a mark", "a <｜tool▁calls▁beg b", ("a <｜tool▁calls▁beg b", [])),
]

TAGS = '{"html": "a </tool_call> b <tool_call> c"}'
QUOTES = '{"a": "\\"</tool_call>\\\\"}'
HERMES_CASES: list[tuple[str, str, Read]] = [
    ("no calls", "Just words. \n", ("Just words. \n", [])),
    ("one", hermes(*CITY[:2]), ("", [CITY])),
    ("two", f"{hermes(*CITY[:2])}\n{hermes(*ADD[:2])}", ("", [CITY, ADD])),
    ("words first", f"See.\n{hermes(*CITY[:2])}", ("See.", [CITY])),
    ("words and a blank line", f"See.\n\n{hermes(*CITY[:2])}", ("See.\n", [CITY])),
    ("words after", f"{hermes(*CITY[:2])}\n\nDone.", ("Done.", [CITY])),
    ("tags in a string", hermes("f", TAGS), ("", [Call("f", TAGS)])),
    ("quotes in a string", hermes("f", QUOTES), ("", [Call("f", QUOTES)])),
    ("no closing mark", hermes(*CITY[:2]).removesuffix("\n</tool_call>"), ("", [CITY])),
    (
        "no closing mark between",
        hermes(*CITY[:2]).replace("</tool_call>", "") + hermes(*ADD[:2]),
        ("", [CITY, ADD]),
    ),
    ("on one line", hermes(*CITY[:2]).replace("\n", ""), ("", [CITY])),
    (
        "arguments first",
        f'<tool_call>{{"arguments": {PARIS}, "name": "weather"}}</tool_call>',
        ("", [CITY]),
    ),
    (
        "parameters",
        f'<tool_call>{{"name": "weather", "parameters": {PARIS}}}</tool_call>',
        ("", [CITY]),
    ),
    (
        "other keys",
        '<tool_call>{"id": {"name": ["x", "}"]}, "name":"weather" , "n": 1, "arguments" :\n'
        f"{PARIS} }}</tool_call>",
        ("", [CITY]),
    ),
    ("arguments in a string", hermes("weather", json.dumps(PARIS)), ("", [CITY])),
    ("a plain string", hermes("f", '"x"'), ("", [Call("f", '"x"', Flaw.INVALID)])),
    ("no arguments", '<tool_call>{"name": "now"}</tool_call>', ("", [Call("now", "{}")])),
    ("an escaped name", hermes("w\\u0065ather", PARIS), ("", [CITY])),
    ("a brace too many", hermes("weather", PARIS + "}"), ("", [CITY])),
    ("a brace too few", hermes("weather", PARIS[:-1]), ("", [CITY])),
    (
        "two braces too few",
        f'<tool_call>{{"name": "f", "arguments": {{"a": 1\n</tool_call>\n{hermes(*CITY[:2])}',
        ("", [Call("f", '{"a": 1\n', Flaw.INVALID), CITY]),
    ),
    (
        "a string never closed",
        f'<tool_call>\n{{"name": "f", "arguments": {{"a": "b}}}}</tool_call>\n{hermes(*CITY[:2])}',
        ("", [Call("f", '{"a": "b}}', Flaw.INVALID), CITY]),
    ),
    (
        "a string never closed at the end",
        '<tool_call>\n{"name": "f", "arguments": {"a": "b}}</tool_call>',
        ("", [Call("f", '{"a": "b}}', Flaw.INVALID)]),
    ),
    (
        "line ends in a string",
        hermes("f", '{"a": "b\nc"}'),
        ("", [Call("f", '{"a": "b\nc"}', Flaw.INVALID)]),
    ),
    (
        "a fence",
        f"<tool_call>\n```json\n{hermes(*CITY[:2])[12:-13]}\n```\n</tool_call>",
        ("", [CITY]),
    ),
    ("no object", "Write <tool_call> here.", ("Write  here.", [])),
    ("another format", "<tool_call>\n<function=f>\n</tool_call>", ("\n<function=f>", [])),
    (
        "no name",
        f'<tool_call>{{"arguments": {PARIS}}}</tool_call>',
        (f'{{"arguments": {PARIS}}}', []),
    ),
    ("a stray closing mark", "a</tool_call>b", ("ab", [])),
    ("braces behind a call", hermes(*CITY[:2]) + "}", ("}", [CITY])),
    (
        "keys that come twice",
        f'<tool_call>{{"name": "weather", "name": "f", "arguments": {PARIS}, "parameters": {{}}}}',
        ("", [CITY]),
    ),
    (
        "a bracket that was never opened",
        f'<tool_call>{{"n": 1], "name": "weather", "arguments": {PARIS}}}</tool_call>',
        ("", [CITY]),
    ),
    ("half a mark", "1 <too", ("1 <too", [])),
    ("nothing but a mark", "<tool_call>", ("", [])),
]


@pytest.mark.parametrize(
    ("text", "expected"), [pytest.param(*case, id=name) for name, *case in DEEPSEEK_CASES]
)
def test_deepseek(text: str, expected: Read) -> None:
    assert read(DEEPSEEK, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [pytest.param(*case, id=name) for name, *case in HERMES_CASES]
)
def test_hermes(text: str, expected: Read) -> None:
    assert read(HERMES, text) == expected


@pytest.mark.parametrize(
    ("form", "text"),
    [(DEEPSEEK, v3(*ADD[:2])), (DEEPSEEK, v31(*ADD[:2])), (HERMES, hermes(*ADD[:2]))],
)
def test_an_answer_that_is_cut_off(form: ToolFormat, text: str) -> None:
    """At every place: no call before its name is there, then one that says it is unfinished."""
    begun = False
    for length in range(len(text)):
        content, calls = read(form, text[:length], cut=True)
        assert ADD.arguments.startswith("".join(call.arguments for call in calls))
        begun = begun or bool(calls)
        assert len(calls) == begun
        if calls:
            assert content == ""
            assert calls[0].name == "add"
            assert (calls[0].flaw is None) == (calls[0].arguments == ADD.arguments)
            assert calls[0].flaw in (None, Flaw.UNFINISHED)
    assert begun


def test_a_string_that_is_cut_off_in_a_fence_keeps_it() -> None:
    text = CALL + f'function{SEP}run\n```json\n{{"code": "```'
    assert read(DEEPSEEK, text, cut=True)[1] == [Call("run", '{"code": "```', Flaw.UNFINISHED)]


def test_arguments_come_as_they_are_written() -> None:
    parser = parser_of(DEEPSEEK)
    pieces = [CALLS, CALL, "function", SEP, "add", "\n", "```", "json", "\n", '{"', "a", '":', " 1"]
    given = [parser.push(piece) for piece in [*pieces, "}", "\n", "```", CALL_END]]
    assert [[event.text or event.name for event in row] for row in given] == [
        *([], [], [], [], [], ["add"], [], [], [], ['{"'], ["a"], ['":'], [" 1"], ["}"], [], []),
        [None],
    ]
    assert given[-1] == [Event(Kind.CALL_END, index=0)]
    parser = parser_of(HERMES)
    pieces = ["<tool_call>", "\n", '{"name', '":', ' "add', '",', ' "arguments', '":', ' {"a', '":']
    given = [parser.push(piece) for piece in [*pieces, " 1", "}}", "\n", "</tool_call>"]]
    assert [[event.text or event.name for event in row] for row in given] == [
        *([], [], [], [], [], ["add"], [], [], ['{"a'], ['":'], [" 1"], ["}", None], [], []),
    ]


# Any calls, in any pieces

WORDS = st.text("ab .,:`{}\n<|路", max_size=12)
NAMES = st.from_regex(r"[a-z][a-z_.-]{0,6}", fullmatch=True).filter(lambda name: name != "function")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab`"\\<>{}/\n ', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
ARGUMENTS = st.builds(json.dumps, st.dictionaries(st.text('ab`"<\n', max_size=4), JSON, max_size=3))
CALL_LISTS = st.lists(st.tuples(NAMES, ARGUMENTS).map(lambda pair: Call(*pair)), max_size=3)
CUTS = st.lists(st.integers(0, 9), max_size=60)


@given(WORDS, CALL_LISTS, st.data())
def test_deepseek_calls_come_back(words: str, calls: list[Call], data: st.DataObject) -> None:
    """Written in either way, with or without the marks that models leave out."""
    text, wrapped = words, data.draw(st.booleans())
    if calls and wrapped:
        text += CALLS
    for place, call in enumerate(calls):
        begin = CALL if place == 0 or data.draw(st.booleans()) else ""
        begin = data.draw(st.sampled_from(["", CALL])) if wrapped else begin
        end = CALL_END if not begin or place < len(calls) - 1 or data.draw(st.booleans()) else ""
        white, gap = (data.draw(st.sampled_from(["", "\n", " \n"])) for _ in range(2))
        style = data.draw(st.sampled_from(["v3", "v3.1", "no fence"]))
        text += white + begin if begin else begin
        if style == "v3":
            text += f"function{SEP}{call.name}\n```json\n{call.arguments}\n```{gap}"
        elif style == "no fence":
            text += f"function{SEP}{call.name}\n{call.arguments}{gap}"
        else:
            text += f"{call.name}{SEP}{gap}{call.arguments}"
        text += end
        if not wrapped and place == 0:
            words += white
    if calls and wrapped and data.draw(st.booleans()):
        text += CALLS_END + data.draw(st.sampled_from(["", "\n"]))
    given = gathered(events(DEEPSEEK, text, data.draw(CUTS)))
    assert given == (words, calls)


@given(WORDS, CALL_LISTS, st.data())
def test_hermes_calls_come_back(words: str, calls: list[Call], data: st.DataObject) -> None:
    text = words
    for call in calls:
        text += hermes(*call[:2]) + data.draw(st.sampled_from(["", "\n", "\n\n"]))
    if calls:
        words = words.removesuffix("\n")
    given = gathered(events(HERMES, text, data.draw(CUTS)))
    assert given == (words, calls)


MARK = re.compile("|".join(TOOL_TOKENS))
BITS = {
    DEEPSEEK: [
        *TOOL_TOKENS,
        "function",
        "name",
        "\n",
        " ",
        "```",
        "`",
        "json",
        "{}",
        '{"a": "',
        "x y",
    ],
    HERMES: [
        *(
            "<tool_call>",
            "</tool_call>",
            '{"name": "f"',
            ', "arguments": ',
            '{"a": "',
            '"',
            "}",
            "\\",
        ),
        *("\n", "x y", "```json\n", '"arguments"', ":", ",", "[", "]", "{}", "<tool", "</"),
    ],
}


@pytest.mark.parametrize("form", list(ToolFormat))
@given(data=st.data())
def test_no_matter_what_is_written(form: ToolFormat, data: st.DataObject) -> None:
    """The same events in any pieces; every call ends; no mark is part of a text."""
    text = "".join(data.draw(st.lists(st.sampled_from(BITS[form]) | WORDS, max_size=12)))
    cut = data.draw(st.booleans())
    whole = events(form, text, cut=cut)
    assert events(form, text, data.draw(CUTS), cut) == whole
    content, calls = gathered(whole)
    if form is HERMES and '"' not in content:  # in a string of what turned out to be no call
        assert "<tool_call>" not in content
    assert not MARK.search(content + "".join(call.name + call.arguments for call in calls))


@given(st.lists(st.sampled_from(BITS[DEEPSEEK]) | WORDS, max_size=12).map("".join))
def test_what_a_plain_search_finds(text: str) -> None:
    """All that is wholly framed, whatever stands around it."""
    inner = f"((?:(?!{MARK.pattern}).)*?)"
    found = re.findall(
        f"{CALL}function{SEP}([a-z]+)\n```json\n{inner}\n```{CALL_END}",
        text := f"{text}{v3(*ADD[:2])}{text}",
        re.DOTALL,
    )
    calls = gathered(events(DEEPSEEK, text))[1]
    missing = [Call(name, body.strip() or "{}")[:2] for name, body in found]
    for call in calls:
        if missing and call[:2] == missing[0]:
            missing.pop(0)
    assert not missing


# Templates

TEMPLATES = Path(__file__).parents[1] / "conformance" / "templates"
OFFICIAL = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
WITH_CALLS = [
    name
    for name, messages in CONVERSATIONS.items()
    if any(message.get("tool_calls") for message in messages)
]


def template(name: str) -> str:
    if name == "ours":
        return default_template()
    return (TEMPLATES / f"{name}.jinja").read_bytes().decode()


def asked(messages: Sequence[dict[str, Any]]) -> list[Call]:
    """Of the last turn that calls."""
    turn = [message for message in messages if message.get("tool_calls")][-1]
    functions = [call["function"] for call in turn["tool_calls"]]
    return [Call(function["name"], function["arguments"]) for function in functions]


@pytest.mark.parametrize("name", ["one call", "two calls", "three calls", "a call with words"])
@pytest.mark.parametrize("model", [*OFFICIAL, "ours"])
def test_what_a_template_writes_is_read_back(model: str, name: str) -> None:
    """The templates of V3 and the distils put the end after every call but the first, and know no
    words beside calls."""
    messages = CONVERSATIONS[name]
    text = render_chat(
        template(model),
        messages,
        bos_token="",
        eos_token=EOS_TOKEN,
        add_generation_prompt=False,
    )
    turn = text.rpartition(ASSISTANT_TOKEN)[2].removeprefix(THINK_END).replace(EOS_TOKEN, "")
    if model in ("deepseek-v3", *(m for m in OFFICIAL if "distill" in m)) and "words" in name:
        assert CALLS not in turn
        return
    words = messages[-1]["content"] or ""
    assert read(DEEPSEEK, turn) == (words, asked(messages))


@pytest.mark.parametrize("name", ["one call", "two calls", "three calls", "a call with words"])
def test_what_qwens_template_wrote_is_read_back(name: str) -> None:
    goldens = json.loads((TEMPLATES / "goldens" / "qwen3.json").read_text(encoding="utf-8"))
    text = goldens[f"{name}, False"]["text"]
    turn = text.split("<|im_start|>assistant\n")[1].partition("<|im_end|>")[0]
    turn = turn.partition("</think>\n\n")[2]
    messages = CONVERSATIONS[name]
    assert read(HERMES, turn) == (messages[-1]["content"] or "", asked(messages))


@cache
def tokenizer(chat_template: str | None) -> Tokenizer:
    made = Tokenizer.train_characters(["abc"])
    made.chat_template = chat_template
    return made


@pytest.mark.parametrize("model", [*OFFICIAL, "ours"])
def test_the_format_of_deepseeks_templates(model: str) -> None:
    assert format_of(tokenizer(template(model))) is DEEPSEEK


QWEN = """{%- for message in messages %}{%- for call in message.tool_calls %}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments ~ '}\\n</tool_call>' }}{%- endfor %}{%- endfor %}"""


@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [
        (None, None),
        ("{{ messages[0]['content'] }}", None),
        (QWEN, HERMES),
        (QWEN.replace('{"name": "', "<function="), None),  # Qwen3-Coder's share the marks alone
        ("<tool_call>" + "{{ raise_exception('no tools') }}", None),
        (f"{CALL} is how to call, but the history forgets it", None),
    ],
)
def test_the_format_of_other_templates(
    chat_template: str | None, expected: ToolFormat | None
) -> None:
    assert format_of(tokenizer(chat_template)) is expected
