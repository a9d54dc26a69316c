"""The ways GGUF files have of cutting text into words, by the names the files give them.

A tokenizer.json describes its cutting in full; a GGUF holds only a name (`tokenizer.ggml.pre`) and
leaves the rest to the reader's source. This is the one table between the two, read both ways. The
patterns are those of the models' own tokenizer.json: llama.cpp rewrites some for its own regex
engine and leaves out the normalizer, so where the two disagree, this file follows the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.data.vocabularies import DEEPSEEK_V3_SPLITS

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns applied one after the other; each match, and what lies between, is cut off.

    ``normalizer`` is "NFC" or None. ``ignore_merges``: a word that is a token stays whole whatever
    the merges say. ``add_bos``: what llama.cpp takes `add_bos_token` to be where a file is silent.
    """

    patterns: tuple[str, ...]
    normalizer: str | None = None
    ignore_merges: bool = False
    add_bos: bool = False

    def install(self, backend: tokenizers.Tokenizer) -> None:
        """Make ``backend`` cut so, over the 256 bytes."""
        from tokenizers import Regex, normalizers, pre_tokenizers

        if self.normalizer == "NFC":
            backend.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in self.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])


DIGIT = r"\p{N}"
LINE_END = "[\r\n]"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the library's ByteLevel does by itself with `use_regex`."""

# The range up to the end of Hangul stands in DeepSeek's files; U+0800 to U+4E00 is no slip here.
DEEPSEEK_CJK = "[一-龥\u0800-一가-\ud7ff]+"
# Cased letters of every script. Some look alike and are different code points (Ohm, Kelvin).
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻ"
    "Ȿ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)


def _cl100k_words(digits: str) -> str:
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


QWEN2 = PreTokenizer((_cl100k_words(r"\p{N}"),), normalizer="NFC")
LLAMA3 = PreTokenizer((_cl100k_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "deepseek-v3": PreTokenizer(DEEPSEEK_V3_SPLITS),
    # llama.cpp keeps digits together here; DeepSeek's vocabularies have no merges of digits.
    "deepseek-llm": PreTokenizer(
        (
            LINE_END,
            rf"\s?[{DEEPSEEK_LETTERS}]+",
            "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            DEEPSEEK_CJK,
            DIGIT,
        )
    ),
    "deepseek-coder": PreTokenizer((LINE_END, r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, DIGIT)),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "smollm": PreTokenizer((DIGIT, GPT2_WORDS)),
    "gpt-2": PreTokenizer((GPT2_WORDS,)),
    # llama.cpp's own choice for files that say nothing better; no model was trained with it.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""Name to description; of two names for one description a writer takes the first."""


def pre_tokenizer_named(name: object) -> PreTokenizer:
    """The entry for what a file's `tokenizer.ggml.pre` says; CheckpointError if unknown."""
    known = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if known is None:
        said = "is missing" if name is None else f"is {name!r}"
        raise CheckpointError(
            f"tokenizer.ggml.pre {said}: how this file cuts text into words is not known "
            f"(known are {', '.join(sorted(PRE_TOKENIZERS))}); use the model's Hugging Face "
            "folder, or a GGUF that a recent converter made"
        )
    return known


def recognise(description: Mapping[str, Any]) -> str:
    """The name for what a tokenizer.json describes; CheckpointError if GGUF has none for it."""
    patterns = tuple(_patterns(description["pre_tokenizer"]))
    normalizer = _normalizer(description["normalizer"])
    ignore_merges = bool(description["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if (known.patterns, known.normalizer) == (patterns, normalizer):
            if known.ignore_merges != ignore_merges:
                raise _refusal(f"ignore_merges={ignore_merges}, but {name!r} means the opposite")
            return name
    raise _refusal(f"the patterns {patterns} with normalizer {normalizer}")


def _patterns(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    """The patterns in order, whichever of the library's spellings they come in."""
    steps = list(_flat(pre_tokenizer, "pretokenizers"))
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise _refusal("a pre_tokenizer that does not end in ByteLevel")
    for step in steps[:-1]:
        match step:
            case {
                "type": "Split",
                "pattern": {"Regex": str(pattern)},
                "behavior": "Isolated",
                "invert": False,
            }:
                yield pattern
            case {"type": "Digits", "individual_digits": True}:
                yield DIGIT
            case _:
                raise _refusal(f"the pre_tokenizer step {dict(step)}")
    if steps[-1].get("add_prefix_space"):
        raise _refusal("a space put before every text (add_prefix_space)")
    if steps[-1].get("use_regex", True):
        yield GPT2_WORDS


def _normalizer(normalizer: Mapping[str, Any] | None) -> str | None:
    steps = list(_flat(normalizer, "normalizers"))
    if not steps:
        return None
    if len(steps) == 1 and steps[0]["type"] == "NFC":
        return "NFC"
    raise _refusal(f"the normalizer {normalizer}")


def _flat(step: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for part in step[inner]:
        yield from _flat(part, inner)


def _refusal(what: str) -> CheckpointError:
    return CheckpointError(
        f"GGUF has no name for how this tokenizer cuts text: {what}. Known are "
        f"{', '.join(PRE_TOKENIZERS)}; a model trained with Tokenizer.train_bpe can be written, "
        "this one can be saved as a Hugging Face folder"
    )
