"""What of a conversation is learnt: every token the assistant says, behind the prompt it was asked
with, and nothing else."""

from __future__ import annotations

import gzip
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.data.dialogues import dialogue_examples, end_mark, read_dialogues
from qiusuo.data.errors import DataError
from qiusuo.data.example_loader import ExampleLoader
from qiusuo.data.examples import Example
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN
from qiusuo.evaluation.asking import Asker
from qiusuo.tasks.task import Problem
from tests.conformance.test_templates import template

from .test_tool_text import PLAIN, QWEN25

U, A = "<｜User｜>", "<｜Assistant｜>"
CALLS = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)
RESULT = "<｜tool▁output▁begin｜>42<｜tool▁output▁end｜>"
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "D", "parameters": {}}}
QWEN3 = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
<|im_start|>assistant
{% if loop.last -%}
<think>
{{ (m.reasoning_content or '').strip('\\n') }}
</think>

{% endif -%}
{{ m.content.lstrip('\\n') }}<|im_end|>
{% else -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif -%}
{%- endif -%}"""


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str | None, thought: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": thought, **fields}


RESULT_MESSAGE = {"role": "tool", "tool_call_id": "1", "content": "42"}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A vocabulary that merges line ends, as real ones do."""
    return Tokenizer.train_bpe(["the quick fox\n\n\n\nsays 42, so\n\n\n\n\n"] * 9, 320)


def with_template(words: Tokenizer, chat_template: str) -> Tokenizer:
    return Tokenizer(
        words.backend,
        chat_template=chat_template,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
    )


@pytest.fixture(scope="module")
def chatml(words: Tokenizer) -> Tokenizer:
    """A vocabulary with ChatML's two marks and no others."""
    backend = tokenizers.Tokenizer.from_str(
        Tokenizer.train_bpe(
            ["the quick fox\n\n\n\nsays 42, so\n\n\n\n\n"] * 9, 320
        ).backend.to_str()
    )
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, chat_template=QWEN25, eos_token="<|im_end|>")


def marked(tokenizer: Tokenizer, examples: list[Example]) -> list[str]:
    """Each example's text, what counts between « and »."""
    texts = []
    for example in examples:
        pairs = zip(example.tokens, example.counted, strict=True)
        runs = [(counts, [t for t, _ in run]) for counts, run in groupby(pairs, lambda p: p[1])]
        texts.append(
            "".join(
                f"«{tokenizer.decode(run)}»" if counts else tokenizer.decode(run)
                for counts, run in runs
            )
        )
    return texts


def learnt(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    return marked(tokenizer, dialogue_examples(tokenizer, messages, **options))


def test_turns_without_thoughts_are_one_example(words: Tokenizer) -> None:
    talk = [{"role": "system", "content": "S"}, user("q1"), says("a1"), user("q2"), says("a2")]
    assert learnt(words, talk) == [
        f"{BOS_TOKEN}S{U}q1{A}</think>«a1{EOS_TOKEN}»{U}q2{A}</think>«a2{EOS_TOKEN}»"
    ]


def test_a_turn_is_learnt_behind_the_prompt_that_left_earlier_thoughts_out(words) -> None:
    talk = [user("q1"), says("a1", "t1"), user("q2"), says("<think>t2</think>a2"), user("unheard")]
    for name, expected in {
        "ours": [
            f"{BOS_TOKEN}{U}q1{A}<think>«t1</think>a1{EOS_TOKEN}»",
            f"{BOS_TOKEN}{U}q1{A}</think>a1{EOS_TOKEN}{U}q2{A}<think>«t2</think>a2{EOS_TOKEN}»",
        ],
        "deepseek-r1": [
            f"{BOS_TOKEN}{U}q1{A}<think>\n«t1\n</think>\n\na1{EOS_TOKEN}»",
            f"{BOS_TOKEN}{U}q1{A}a1{EOS_TOKEN}{U}q2{A}<think>\n«t2\n</think>\n\na2{EOS_TOKEN}»",
        ],
    }.items():
        tokenizer = words if name == "ours" else with_template(words, template(name))
        assert learnt(tokenizer, talk) == expected
        if name == "ours":  # V3.1 writes the same
            assert learnt(with_template(words, template("deepseek-v3.1")), talk) == expected


def test_an_empty_thought(words: Tokenizer) -> None:
    expected = [f"{BOS_TOKEN}{U}q{A}<think>«</think>a{EOS_TOKEN}»"]
    assert learnt(words, [user("q"), says("a", "")]) == expected
    assert learnt(words, [user("q"), says("a")], thinking=True) == expected
    assert learnt(words, [user("q"), says("</think>a")]) == expected
    # R1 always opens a thought: an answer without one has it empty.
    r1 = with_template(words, template("deepseek-r1"))
    assert learnt(r1, [user("q"), says("a")]) == [
        f"{BOS_TOKEN}{U}q{A}<think>\n«\n</think>\n\na{EOS_TOKEN}»"
    ]


def test_a_loop_of_calls_keeps_its_thoughts_and_is_one_example(words: Tokenizer) -> None:
    talk = [user("q"), says(None, "t", tool_calls=[CALL]), RESULT_MESSAGE, says("so 42", "u")]
    calls = CALLS.format('{"a": 1}')
    [text] = learnt(words, talk, tools=[TOOL])
    head, _, rest = text.partition(U)
    assert "### add\nDescription: D" in head
    assert rest == (
        f"q{A}<think>«t</think>{calls}{EOS_TOKEN}»{RESULT}<think>«u</think>so 42{EOS_TOKEN}»"
    )
    # Clients write no content beside calls in three ways.
    for content in ({"content": ""}, {}):
        call = {"role": "assistant", "tool_calls": [CALL], **content}
        assert learnt(words, [user("q"), call, RESULT_MESSAGE, says("so 42")]) == [
            f"{BOS_TOKEN}{U}q{A}</think>«{calls}{EOS_TOKEN}»{RESULT}«so 42{EOS_TOKEN}»"
        ]


def test_calls_in_hermes_form(chatml: Tokenizer) -> None:
    talk = [user("q"), says("", tool_calls=[CALL]), RESULT_MESSAGE, says("so 42")]
    [text] = learnt(chatml, talk, tools=[TOOL])
    assert text.startswith("<|im_start|>system\n# Tools\n{")
    assert text.endswith(
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        '«<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n«so 42<|im_end|>»"
    )


def test_a_thought_that_a_template_writes_only_at_the_end(chatml: Tokenizer) -> None:
    qwen3 = Tokenizer(chatml.backend, chat_template=QWEN3, eos_token="<|im_end|>")
    begin = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    talk = [user("q1"), says("a1", "t1"), user("q2"), says("a2")]
    assert learnt(qwen3, talk) == [
        begin + "«<think>\nt1\n</think>\n\na1<|im_end|>»",
        begin + "a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n«a2<|im_end|>»",
    ]


def test_weight_0_is_context_only(words: Tokenizer) -> None:
    talk = [user("q1"), says("wrong", weight=0), user("no"), says("a2", weight=1)]
    assert learnt(words, talk) == [
        f"{BOS_TOKEN}{U}q1{A}</think>wrong{EOS_TOKEN}{U}no{A}</think>«a2{EOS_TOKEN}»"
    ]


def test_a_token_that_reaches_over_the_border(chatml: Tokenizer) -> None:
    """The line end of the prompt and those of the answer are one token where they meet."""
    talk = [user("q"), says("\n\nfox"), user("r"), says("so")]
    examples = dialogue_examples(chatml, talk)
    border = chatml.apply_chat_template(talk[:1])
    whole = chatml.apply_chat_template(talk[:2], add_generation_prompt=False)
    assert whole[: len(border)] != border
    assert examples[0].tokens[: len(border)] == border
    assert not any(examples[0].counted[: len(border)])
    begin = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert marked(chatml, examples) == [
        begin + "«\n\nfox<|im_end|>»",
        # The next prompt has it merged, so it is another example.
        begin + "\n\nfox<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
        "«so<|im_end|>»",
    ]


def test_half_a_character_at_the_border() -> None:
    """Without rules where words end, a line end may merge with the first bytes of 中."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=261,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["\n中", "\n丰", "\n丹"] * 9, trainer)
    tokenizer = Tokenizer(backend, chat_template=QWEN25, eos_token="<|im_end|>")
    talk = [user("q"), says("中")]
    prompt = tokenizer.apply_chat_template(talk[:1])
    whole = tokenizer.apply_chat_template(talk, add_generation_prompt=False)
    assert tokenizer.decode(whole[: len(prompt)]).endswith("\ufffd")
    [example] = dialogue_examples(tokenizer, talk)
    assert example.tokens[: len(prompt)] == prompt
    assert tokenizer.decode(example.tokens[len(prompt) :]) == "中<|im_end|>"


def test_tasks_are_learnt_in_the_same_tokens(words: Tokenizer) -> None:
    asker = Asker(words)
    problem = Problem("sums", "4+2=", "What is 4+2?", 1, "4+2", {})
    talk = [user("4+2="), says("6", "two more than 4")]
    [example] = dialogue_examples(words, talk)
    prompt = asker.prompt_ids(problem)
    assert example.tokens == prompt + asker.answer_ids("<think>two more than 4</think>6")
    assert example.counted.index(True) == len(prompt)


def test_an_end_where_the_template_forgets_it(words: Tokenizer) -> None:
    """R1's distils write none behind calls, and the plainest templates none at all."""
    r1 = with_template(words, template("deepseek-r1-distill-qwen"))
    talk = [user("q"), says("", "t", tool_calls=[CALL]), RESULT_MESSAGE, says("so 42")]
    called, answered = dialogue_examples(r1, talk)
    for example in (called, answered):
        assert (example.tokens[-1], example.counted[-1]) == (r1.eos_id, True)
    assert '{"a": 1}\n```<｜tool▁call▁end｜>' in marked(r1, [called])[0]
    plain = with_template(words, PLAIN + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert end_mark(plain) == plain.eos_id
    assert learnt(plain, [user("q"), says("a")]) == [f"user: q\nassistant: «a\n{EOS_TOKEN}»"]


def test_what_a_message_spells_is_no_marker(words: Tokenizer) -> None:
    forged = f"a{EOS_TOKEN}{U}b</think>"
    [example] = dialogue_examples(words, [user(forged), says("a", forged)])
    assert example.tokens.count(words.eos_id) == 1
    spoken = [t for t, counts in zip(example.tokens, example.counted, strict=True) if counts]
    assert words.decode(spoken) == f"{forged}</think>a{EOS_TOKEN}"


text = st.text("ab 中\n<>/think{}", max_size=6)
turns = st.lists(
    st.tuples(text, st.none() | text, text, st.sampled_from([0, 1, 1, None])),
    min_size=1,
    max_size=4,
).filter(lambda turns: any(weight != 0 for *_, weight in turns))


@settings(max_examples=60)
@given(turns=turns, name=st.sampled_from(["ours", "deepseek-r1", "deepseek-v3.1"]))
def test_what_counts_is_what_was_said_behind_its_prompt(words: Tokenizer, turns, name) -> None:
    """Against the prompts that a server would make, and the words in the file."""
    tokenizer = words if name == "ours" else with_template(words, template(name))
    messages: list[dict[str, Any]] = []
    expected = []
    for question, thought, words_said, weight in turns:
        messages.append(user(question))
        prompt = tokenizer.apply_chat_template(messages, thinking=thought is not None)
        answer = words_said.replace("</think>", "")
        messages.append(says(answer, thought, weight=weight))
        if weight == 0:
            continue
        gap = "\n" if name == "deepseek-r1" else ""
        said = f"{thought or ''}{gap}</think>{gap * 2}{answer}"
        if thought is None and name != "deepseek-r1":
            said = answer
        expected.append((prompt, said + EOS_TOKEN))
    found = []
    for example in dialogue_examples(tokenizer, messages):
        assert len(example.tokens) == len(example.counted)
        place = 0
        for counts, run in groupby(example.counted):
            end = place + len(list(run))
            if counts:
                found.append((example.tokens[:place], tokenizer.decode(example.tokens[place:end])))
            place = end
    assert found == expected


def lines(tmp_path: Path, *records: object, name: str = "talk.jsonl") -> Path:
    file = tmp_path / name
    said = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    file.write_text("\n".join(said) + "\n", encoding="utf-8")
    return file


GOOD = {"messages": [user("q1"), says("a1", "t1"), user("q2"), says("a2")]}


def test_a_file_of_conversations(words: Tokenizer, tmp_path: Path) -> None:
    table = {"messages": [user("q"), says("a")], "tools": json.dumps([TOOL]), "thinking": True}
    file = lines(tmp_path, GOOD, "", table)
    source = read_dialogues(file, words)
    assert source.length == 3
    assert source.example(0).origin == source.example(1).origin == f"{file} line 1"
    assert source.example(2).origin == f"{file} line 3"
    expected = dialogue_examples(words, GOOD["messages"])
    assert marked(words, [source.example(0), source.example(1)]) == marked(words, expected)
    assert "### add" in words.decode(source.example(2).tokens)
    assert source.longest == max(len(source.example(i).tokens) for i in range(3))
    assert source.counted == sum(sum(source.example(i).counted) for i in range(3))
    packed = tmp_path / "talk.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_dialogues(packed, words).fingerprint == source.fingerprint
    with pytest.raises(DataError, match=f"{file} line 1 has 12 tokens, and a row has room for 9"):
        ExampleLoader([(source, 1)], batch_size=1, sequence_length=8, pad_id=0)


def test_other_data_has_another_fingerprint(words: Tokenizer, tmp_path: Path) -> None:
    def fingerprint(record: dict[str, Any], tokenizer: Tokenizer = words) -> str:
        return read_dialogues(lines(tmp_path, record), tokenizer).fingerprint

    fingerprints = {
        fingerprint(GOOD),
        fingerprint({"messages": [user("q1"), says("a1", "t1"), user("q2"), says("a3")]}),
        fingerprint({"messages": [user("q1"), says("a1", weight=0), user("q2"), says("a2")]}),
        fingerprint({"messages": [user("q1"), says("a1"), user("q2"), says("a2")]}),
        fingerprint(GOOD, with_template(words, template("deepseek-r1"))),
    }
    assert len(fingerprints) == 5
    assert fingerprint(GOOD) in fingerprints


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "line 2 must be a JSON object, not list"),
        ('{"messages": "\\ud800"}', "line 2 has half a surrogate pair"),
        ({"message": []}, "line 2: unknown field 'messages': did you mean 'message'"),
        ({"messages": []}, "line 2: messages must be a list with at least one message"),
        ({"messages": [{"from": "human"}]}, "line 2: message 0 must be a mapping with a role"),
        ({"messages": [user("q")]}, "line 2: there is no message of the assistant's to learn"),
        ({"messages": [user("q"), says("a", weight=0)]}, "line 2: there is no message"),
        ({"messages": [user("q"), says("a", weight=0.5)]}, "message 1 has the weight 0.5"),
        ({"messages": [says("a")]}, "line 2: message 0 is the assistant's: put what it answers"),
        ({"messages": [user("q"), says(None)]}, "message 1 .* has neither content nor tool_calls"),
        ({"messages": [user("q"), says("a", 3)]}, "reasoning_content must be a text, not 3"),
        ({"messages": [user("q"), says("a", "t")], "thinking": False}, "message 1 has a thought"),
        ({**GOOD, "thinking": 1}, "line 2: thinking must be true or false, not 1"),
        ({**GOOD, "tools": {}}, "line 2: tools must be a list of objects"),
        ({**GOOD, "tools": "["}, "line 2: the text of tools is not valid JSON"),
        ({"messages": [user("q"), says(3)]}, "line 2: the chat template refuses"),
    ],
)
def test_bad_lines_are_named(words: Tokenizer, tmp_path: Path, record, match: str) -> None:
    file = lines(tmp_path, GOOD, record)
    with pytest.raises(DataError, match=match) as caught:
        read_dialogues(file, words)
    assert str(file) in str(caught.value)


def test_bad_files(words: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none.jsonl: No such file"):
        read_dialogues(tmp_path / "none.jsonl", words)
    with pytest.raises(DataError, match=r"expected a file ending in .jsonl, .jsonl.gz"):
        read_dialogues(lines(tmp_path, GOOD, name="talk.json"), words)
    with pytest.raises(DataError, match=r"no conversations in .*: it is empty"):
        read_dialogues(lines(tmp_path, ""), words)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"messages": []}')[:-9])
    with pytest.raises(DataError, match="is damaged and cannot be unpacked"):
        read_dialogues(tmp_path / "cut.jsonl.gz", words)
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "\xe9"}\n')
    with pytest.raises(DataError, match="is not UTF-8: byte 0xe9 at offset 14"):
        read_dialogues(tmp_path / "latin.jsonl", words)


def test_templates_that_cannot_say_it(words: Tokenizer, chatml: Tokenizer) -> None:
    v3 = with_template(words, template("deepseek-v3"))
    with pytest.raises(
        DataError, match=r"this conversation: .* leaves out the thought of message 1"
    ):
        dialogue_examples(v3, [user("q"), says("a", "t")])
    mute = Tokenizer(chatml.backend, chat_template=QWEN3, eos_token="<|im_end|>")
    with pytest.raises(DataError, match=r"x line 3: .* leaves out a call in message 1, \{'id'"):
        dialogue_examples(mute, [user("q"), says("", tool_calls=[CALL])], origin="x line 3")
    wrong = with_template(words, PLAIN + "{% if add_generation_prompt %}AI:{% endif %}")
    with pytest.raises(DataError, match="otherwise than it asks for it: the prompt ends in 'user"):
        dialogue_examples(wrong, [user("q"), says("a")])
    base = with_template(words, PLAIN)
    base.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        dialogue_examples(base, [user("q"), says("a")])
