"""A tokenizer that knows no special tokens, for text that spells one.

`tokenizer.json` matches its added tokens before anything else, and many markers (DeepSeek's own
`<｜User｜>`) are not even flagged special, so no switch of the library turns them off. What does is
a second tokenizer with the same vocabulary and without those entries.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

# Low enough that no path goes through the token, high enough for exact sums.
NEVER = -1e6


def is_ordinary(content: str, *, special: bool) -> bool:
    """Whether an added token is mere text: GPT-NeoX and others add runs of spaces."""
    return not special and content.isspace()


def without_special_tokens(
    backend: tokenizers.Tokenizer, special: frozenset[str]
) -> tokenizers.Tokenizer:
    """A copy of `backend` to which the `special` spellings are ordinary text.

    Tokens that had been added may get other ids in it; spellings are the same.
    """
    import tokenizers

    description = json.loads(backend.to_str())
    description["added_tokens"] = [
        token for token in description["added_tokens"] if token["content"] not in special
    ]
    _unlearn(description["model"], special)
    return tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))


def _unlearn(model: dict[str, Any], special: frozenset[str]) -> None:
    """Take the spellings out of the model's own vocabulary, where some tokenizers repeat them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces with scores, numbered by position
        model["vocab"] = [
            [piece, NEVER if piece in special else score] for piece, score in vocabulary
        ]
        return
    gone = special - {model.get("unk_token")}
    model["vocab"] = {token: i for token, i in vocabulary.items() if token not in gone}
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in gone]


def _merged(merge: str | list[str]) -> str:
    return "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
