"""How the vocabularies of models made here come about: byte-level BPE, or plain characters.

The BPE follows DeepSeek-V3 to the letter: digits in groups of up to three, runs of CJK and kana on
their own, then words with the one sign before them, punctuation, line ends, spaces; and under that
the 256 bytes, so that any text goes in and comes out unchanged. A GGUF of such a model can name
its pre-tokenizer "deepseek-v3". The character vocabulary is for the small worlds (one author, one
verse form), where a character is the natural unit and the table stays tiny.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from qiusuo.data.errors import DataError

if TYPE_CHECKING:
    import tokenizers

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"
USER_TOKEN = "<｜User｜>"
ASSISTANT_TOKEN = "<｜Assistant｜>"
THINK_BEGIN = "<think>"
THINK_END = "</think>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
TOOL_TOKENS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
SPECIAL_TOKENS = (
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    USER_TOKEN,
    ASSISTANT_TOKEN,
    THINK_BEGIN,
    THINK_END,
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    *TOOL_TOKENS,
)
"""The special tokens of every model made here; a token's place is its id."""

UNKNOWN_TOKEN = "<unk>"
"""What a character vocabulary writes for a character outside it."""

# As in DeepSeek's own file these stay when other runtimes skip special tokens, because thoughts
# and tool calls are read out of the decoded text.
VISIBLE_TOKENS = frozenset((THINK_BEGIN, THINK_END, *TOOL_TOKENS))

DIGITS = r"\p{N}{1,3}"
CJK_RUNS = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
DEEPSEEK_V3_SPLITS = (DIGITS, CJK_RUNS, WORDS)
"""The three patterns of DeepSeek-V3's pre-tokenizer, applied one after the other."""

SMALLEST_BPE = 256 + len(SPECIAL_TOKENS)
TRAINING_PIECE = 1 << 16


def train_bpe(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learn a byte-level BPE of at most `vocab_size` tokens, special tokens included.

    A small corpus may run out of pairs that occur twice, and then gives fewer.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    if vocab_size < SMALLEST_BPE:
        raise DataError(
            f"vocab_size {vocab_size} is too small: the 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens need at least {SMALLEST_BPE}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        for pattern in DEEPSEEK_V3_SPLITS
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_nonempty(_pieces(documents)), trainer)
    return _mark_visible(tokenizer)


def train_characters(documents: Iterable[str], min_frequency: int = 1) -> tokenizers.Tokenizer:
    """A vocabulary of every character that occurs `min_frequency` times, and one for the others.

    Ids after the special tokens and `<unk>` follow code points.
    """
    import tokenizers
    from tokenizers import decoders, models

    if min_frequency < 1:
        raise DataError(f"min_frequency must be at least 1, not {min_frequency}")
    counts: Counter[str] = Counter()
    for document in _nonempty(documents):
        counts.update(document)
    characters = sorted(c for c, count in counts.items() if count >= min_frequency)
    if not characters:
        raise DataError(f"no character occurs {min_frequency} times: lower min_frequency")
    vocabulary = {
        token: index for index, token in enumerate((*SPECIAL_TOKENS, UNKNOWN_TOKEN, *characters))
    }
    # A BPE without merges is a character vocabulary, and four times faster than a split into
    # one-character words.
    model = models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN_TOKEN)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, UNKNOWN_TOKEN])
    return _mark_visible(tokenizer)


def _mark_visible(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    import tokenizers

    description = json.loads(tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["content"] not in VISIBLE_TOKENS
    return tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))


def _pieces(documents: Iterable[str]) -> Iterator[str]:
    """Whole lines, about 64k characters at a time: a pre-token never spans a line of text."""
    for document in documents:
        start = 0
        while start < len(document):
            end = document.find("\n", start + TRAINING_PIECE) + 1 or len(document)
            yield document[start:end]
            start = end


def _nonempty(documents: Iterable[str]) -> Iterator[str]:
    """Pass the documents on; a vocabulary cannot be learnt from nothing."""
    characters = 0
    for document in documents:
        characters += len(document)
        yield document
    if not characters:
        raise DataError("the corpus is empty: a vocabulary needs some text to learn from")
