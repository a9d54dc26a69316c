"""Conversations: the exact text, other models' templates, and messages that try to forge turns."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.data.chat_template import default_template, render_chat
from qiusuo.data.errors import DataError
from qiusuo.data.template_guard import TemplateGuard
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import BOS_TOKEN, EOS_TOKEN, SPECIAL_TOKENS

CHATML = """
{%- for message in messages %}
    {%- generation %}{{- '<|im_start|>' + message.role + '\\n' }}{% endgeneration %}
    {%- if message.role == 'assistant' and '</think>' in message.content %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
CALL = {"function": {"name": "add", "arguments": '{"a": 1}'}}
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1", "reasoning_content": "old thought"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": None, "reasoning_content": "R", "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
]
TALK_TEXT = (
    "<｜begin▁of▁sentence｜>S<｜User｜>one<｜Assistant｜></think>1<｜end▁of▁sentence｜>"
    "<｜User｜>two<｜Assistant｜><think>R</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add"
    '<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
    "<｜tool▁output▁begin｜>42<｜tool▁output▁end｜>"
)


def render(messages, **options) -> str:
    return render_chat(
        default_template(), messages, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN, **options
    )


def test_one_turn() -> None:
    start = "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>"
    messages = [{"role": "user", "content": "hi"}]
    assert render(messages) == start + "</think>"
    assert render(messages, thinking=True) == start + "<think>"
    assert render(messages, add_generation_prompt=False) == start.removesuffix("<｜Assistant｜>")


def test_tools_and_thoughts() -> None:
    assert render(TALK) == TALK_TEXT
    assert render(TALK, thinking=True) == TALK_TEXT + "<think>"
    answered = [*TALK, {"role": "assistant", "content": "so 42"}]
    assert render(answered) == TALK_TEXT + "so 42" + EOS_TOKEN
    # Once the user goes on, thoughts are gone.
    assert "<think>" not in render([*answered, {"role": "user", "content": "thanks"}])


def test_thoughts_inside_content_count_as_thoughts() -> None:
    reply = {"role": "assistant", "content": "<think>T</think>A"}
    user = {"role": "user", "content": "u"}
    assert render([user, reply]).endswith("<｜Assistant｜><think>T</think>A" + EOS_TOKEN)
    assert "<｜Assistant｜></think>A<" in render([user, reply, user])


def test_prefix_is_left_open() -> None:
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "Once", "prefix": True},
    ]
    assert render(messages).endswith("</think>Once")


def test_tool_descriptions_keep_chinese() -> None:
    tool = {"type": "function", "function": {"name": "天气", "description": "D", "parameters": {}}}
    assert "### 天气\nDescription: D\n\nParameters: {}" in render(TALK[:2], tools=[tool])


def test_content_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "<｜User｜>ab<" in render([{"role": "user", "content": parts}])
    with pytest.raises(DataError, match="reads text only, not image_url"):
        render([{"role": "user", "content": [{"type": "image_url"}]}])


@settings(deadline=None, max_examples=50)
@given(thinking=st.booleans(), thought=st.text(max_size=5), answer=st.text(max_size=5))
def test_prompt_begins_the_finished_conversation(thinking, thought, answer) -> None:
    """What a model is trained on starts with what it will be asked with."""
    if "</think>" in answer:
        return
    user = {"role": "user", "content": "u"}
    reply = {"role": "assistant", "content": answer}
    if thinking:
        reply["reasoning_content"] = thought
    rest = f"{thought}</think>{answer}" if thinking else answer
    assert render([user], thinking=thinking) + rest + EOS_TOKEN == render([user, reply])


def test_other_models_templates() -> None:
    messages = [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "<think>x</think>\nb"},
    ]
    text = render_chat(
        CHATML, messages, bos_token=None, eos_token="<|im_end|>", tools=[{"a": "中"}]
    )
    assert text == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        '[{"a": "中"}]<|im_start|>assistant\n'
    )


def test_faulty_templates_and_messages() -> None:
    def refuse(template: str, messages, match: str) -> None:
        with pytest.raises(DataError, match=match):
            render_chat(template, messages, bos_token=None, eos_token=None)

    user = [{"role": "user", "content": "u"}]
    refuse("{% if %}", user, "not valid Jinja, line 1")
    refuse("{{ raise_exception('no!') }}", user, "no!")
    refuse("{{ messages.append(1) }}", user, "refuses")
    refuse("{{ ''.__class__.__mro__ }}", user, "refuses")
    refuse("x", [], "at least one message")
    refuse("x", [{"role": "usr"}], "did you mean 'user'")
    refuse("x", ["hello"], "message 0 must be a mapping")


def test_the_environment_is_the_one_templates_are_written_for() -> None:
    def run(template: str, **options) -> str:
        user = [{"role": "user", "content": {"b": "中<", "a": 1}}]
        return render_chat(template, user, **{"bos_token": None, "eos_token": None, **options})

    content = "{{ messages[0].content | tojson"
    assert run(content + " }}") == '{"b": "中<", "a": 1}'
    assert run(content + "(ensure_ascii=False) }}") == '{"b": "中<", "a": 1}'
    assert run(content + "(true) }}") == '{"b": "\\u4e2d<", "a": 1}'
    assert run(content + "(separators=(',', ':'), sort_keys=true) }}") == '{"a":1,"b":"中<"}'
    assert run(content + "(indent=1) }}") == '{\n "b": "中<",\n "a": 1\n}'
    assert run("{{ bos_token is defined }} {{ documents }}") == "False None"
    assert run("{{ bos_token is defined }}", bos_token="B") == "True"
    assert run("{{ k }}{{ documents[0].t }}", variables={"k": 1, "documents": [{"t": 2}]}) == "12"
    assert run("{{ messages | length }}", variables={"messages": []}) == "1"
    assert run("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}\n") == "2"
    assert (
        run(
            "{% for i in range(9) %}\n{% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n\
{% endfor %}"
        )
        == "0\n1\n"
    )
    with pytest.raises(DataError, match="cannot set '__class__'"):
        run("{% set n = namespace() %}{% set n.__class__ = 1 %}")
    with pytest.raises(DataError, match="refuses"):
        run("{{ 1 // 0 }}")


def test_no_content_beside_calls_is_what_a_template_tests_for() -> None:
    """DeepSeek's ask whether it is none; others put it into the text."""
    asked = [{"role": "assistant", "tool_calls": [CALL]}]
    for messages in (asked, [asked[0] | {"content": None}]):
        for test in ("message['content'] is none", "message.content is none"):
            template = "{% set message = messages[0] %}{{ 1 if " + test + " else 2 }}"
            assert render_chat(template, messages, bos_token=None, eos_token=None) == "1"
        template = "{{ '[' + messages[0].content + ']' }}{{ x if reasoning_content is none }}"
        assert render_chat(template, messages, bos_token=None, eos_token=None) == "[]"


def test_variables_cannot_forge_a_marker(bpe: Tokenizer) -> None:
    bpe = Tokenizer(bpe.backend, chat_template="{{ style }}<｜User｜>")
    ids = bpe.apply_chat_template([{"role": "user"}], variables={"style": "<｜User｜>"})
    assert bpe.decode(ids) == "<｜User｜>" * 2
    assert [i for i in ids if i < len(SPECIAL_TOKENS)] == [bpe.token_id("<｜User｜>")]


def test_guarded_text_is_unharmed_in_a_printed_dict(bpe: Tokenizer) -> None:
    bpe = Tokenizer(bpe.backend, chat_template="{{ tools[0] }}")
    ids = bpe.apply_chat_template([{"role": "user"}], tools=[{"a": "<｜User｜> é 中"}])
    assert bpe.decode(ids) == "{'a': '<｜User｜> é 中'}"


def test_opens_thought(bpe: Tokenizer) -> None:
    user = {"role": "user", "content": "say <think>"}
    assert bpe.opens_thought(bpe.apply_chat_template([user], thinking=True))
    assert not bpe.opens_thought(bpe.apply_chat_template([user]))
    assert not bpe.opens_thought(bpe.apply_chat_template([user], add_generation_prompt=False))
    prefix = {"role": "assistant", "content": "", "reasoning_content": "so", "prefix": True}
    assert not bpe.opens_thought(bpe.apply_chat_template([user, prefix]))
    begun = bpe.apply_chat_template([user], thinking=True) + bpe.encode("so <think>")
    assert bpe.opens_thought(begun)
    assert not bpe.opens_thought([])


def test_without_markers_ids_are_those_of_the_text(bpe: Tokenizer) -> None:
    text = render(TALK, thinking=True)
    assert bpe.apply_chat_template(TALK, thinking=True) == bpe.encode(text, allow_special=True)


PIECES = st.lists(
    st.sampled_from(
        (*SPECIAL_TOKENS, "<｜Us", "er｜>", "<", "｜", ">", " ", "\n", "中", "a", "\U0001d800")
    )
).map("".join)


@settings(deadline=None, max_examples=150)
@given(user=PIECES, name=PIECES, arguments=PIECES, output=PIECES, thought=PIECES)
def test_no_content_forges_a_marker(bpe: Tokenizer, user, name, arguments, output, thought) -> None:
    def talk(user, name, arguments, output, thought):
        call = {"function": {"name": name, "arguments": arguments}}
        return [
            {"role": "user", "content": user},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": thought,
                "tool_calls": [call],
            },
            {"role": "tool", "content": output},
        ]

    def markers(ids):
        return [index for index in ids if index < len(SPECIAL_TOKENS)]

    messages = talk(user, name, arguments, output, thought)
    ids = bpe.apply_chat_template(messages)
    assert bpe.decode(ids) == render(messages)
    assert markers(ids) == markers(bpe.apply_chat_template(talk("u", "n", "a", "o", "t")))


def test_content_is_guarded_through_template_operations(bpe: Tokenizer) -> None:
    bpe = Tokenizer(bpe.backend, chat_template="{{ messages[0].content.strip()[:-1] ~ '｜>' }}")
    ids = bpe.apply_chat_template([{"role": "user", "content": "  <｜User｜>!<｜User|  "}])
    assert bpe.decode(ids) == "<｜User｜>!<｜User｜>"
    assert min(ids) >= len(SPECIAL_TOKENS)


def test_assistants_marks_of_thought_stay_alive(bpe: Tokenizer) -> None:
    think = bpe.token_id("<think>")
    end = bpe.token_id("</think>")
    messages = [
        {"role": "user", "content": "</think>"},
        {"role": "assistant", "content": "<think>t<｜User｜></think>a"},
    ]
    ids = bpe.apply_chat_template(messages)
    assert [i for i in ids if i < 19] == [0, 3, 4, think, end, 1]


def test_guard_for_wordlike_markers() -> None:
    guard = TemplateGuard(["[gMASK]", "sop"], "a sop [gMASK] soup")
    hidden = guard.hide("a sop [gMASK] soup")
    assert hidden.startswith("a ")
    assert hidden.endswith(" soup")
    assert "sop" not in hidden
    text, spans = guard.reveal("[gMASK]sop" + hidden)
    assert text == "[gMASK]sopa sop [gMASK] soup"
    assert spans == [(0, 7), (7, 10)]


def test_base_model_has_no_template(bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match="no chat template"):
        Tokenizer(bpe.backend).apply_chat_template(TALK)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 1,000,000 steps",
        ),
        ("{% for a in 'abc' * 999999 %}{% endfor %}", "more than 1,000,000 steps"),
        ("{{ 'a' * 10**10 }}", "characters or elements"),
        ("{{ 10 ** (10**10) }}", "characters or elements"),
        ("{{ [1] * 10**9 }}", "characters or elements"),
        ("{{ 'a' | center(10**10) }}", "characters or elements"),
        ("{{ 'a'.ljust(10**10) }}", "characters or elements"),
        ("{{ '%99999999999d' % 1 }}", "a width that no text has"),
        ("{{ '%*d' % (99999999999, 1) }}", "a width that no text has"),
        ("{{ '{:99999999999}'.format(1) }}", "a width that no text has"),
        ("{{ '%99999999999d' | format(1) }}", "a width that no text has"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}",
            "characters or elements",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
            "{% endfor %}",
            "characters or elements",
        ),
        ("{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}", "characters or elements"),
        ("{% set x = 'a' * 99999 %}{{ x | replace('a', x) }}", "characters or elements"),
        ("{% set x = 'a' * 99999 %}{{ x.join([x] * 9999) }}", "characters or elements"),
        ("{% set x = 'a' * 99999 %}{{ ([x] * 9999) | join(x) }}", "characters or elements"),
        ("{{ (['a' * 99999] * 9999) | tojson }}", "characters or elements"),
        ("{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}", "characters or elements"),
        ("{% macro f(n) %}{{ f(n) if n }}{% endmacro %}{{ f(1) }}", "refuses"),
        ("{{ '{:{}}'.format(1, 10**10) }}", "a width that no text has"),
        (
            "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(60) }}",
            "more than 1,000,000 steps",
        ),
    ],
)
def test_a_template_that_would_never_end(template: str, reason: str) -> None:
    """Said in a second or two, and before the memory is taken."""
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(DataError, match=reason):
        render_chat(template, messages, bos_token=None, eos_token=None)


def test_loops_are_counted_and_else_the_same() -> None:
    template = (
        "{% for x in [1, 2, 3] if x > 1 %}{{ loop.index }}/{{ loop.length }}:{{ x }}"
        "{{ '' if loop.last else ',' }}{% else %}none{% endfor %}"
        "{% for x in [] %}{{ x }}{% else %}|none{% endfor %}"
        "{% for x in [[1, []], [2, []]] recursive %}|{{ x[0] }}{{ loop(x[1]) }}{% endfor %}"
        "|{{ 'a' ~ 1 ~ 'b' }}|{{ '**{}** {{}}'.format(7) }}|{{ '%s%% *' % 7 }}"
        "|{{ ['a', 'b'] | join('-') }}|{{ '-'.join(['a', 'b']) }}"
    )
    messages = [{"role": "user", "content": "hi"}]
    text = render_chat(template, messages, bos_token=None, eos_token=None)
    assert text == "1/2:2,2/2:3|none|1|2|a1b|**7** {}|7% *|a-b|a-b"


# The arguments of earlier calls

AS_JSON = (
    "{% for call in messages[1].tool_calls %}{{ call.function.arguments | tojson }};{% endfor %}"
)
AS_TEXT = AS_JSON.replace(" | tojson", "")
EITHER = AS_JSON.replace(" | tojson", " if call.function.arguments is string else 'no text'")
ITEMS = """{% for call in messages[1].tool_calls %}{% for key in call.function.arguments.items() -%}
{{ key[0] }}={{ key[1] | tojson }};{% endfor %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "arguments", "written"),
    [
        (AS_JSON, '{"a":  "杭 \\"州"}', '{"a": "杭 \\"州"};'),
        (AS_JSON, {"a": 1}, '{"a": 1};'),
        (AS_JSON, "{}", "{};"),
        (AS_JSON, '{"a": ', '"{\\"a\\": ";'),  # no JSON: what a model may write
        (AS_JSON, "[1]", '"[1]";'),
        (AS_JSON, '{"a": "\\ud800"}', '"{\\"a\\": \\"\\\\ud800\\"}";'),
        (AS_TEXT, '{"a":  1}', '{"a":  1};'),
        (EITHER, '{"a":  1}', '{"a":  1};'),
        (ITEMS, '{"a": "b", "c": [1]}', 'a="b";c=[1];'),
    ],
)
def test_arguments_are_encoded_once(template: str, arguments: object, written: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [{"role": "user", "content": "?"}, turn]
    assert render_chat(template, messages, bos_token=None, eos_token=None) == written
    assert call["function"]["arguments"] == arguments


def test_arguments_are_read_before_they_are_disguised() -> None:
    """A vocabulary may have tokens that begin and end as JSON's lists do."""
    made = Tokenizer.train_bpe(['{"a": "<b>"}' * 9], 300)
    made.backend.add_special_tokens(["[INST]"])
    made = Tokenizer(made.backend, chat_template=AS_JSON)
    call = {"function": {"name": "f", "arguments": '{"a":  ["<｜User｜>", "\\ud836\\udc00"]}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    ids = made.apply_chat_template([{"role": "user", "content": "?"}, turn])
    assert made.decode(ids) == '{"a": ["<｜User｜>", "\U0001d800"]};'
    assert made.special_tokens["<｜User｜>"] not in ids
