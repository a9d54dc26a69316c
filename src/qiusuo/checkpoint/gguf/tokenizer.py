"""A tokenizer out of the metadata of a GGUF file, and into it.

GGUF keeps a vocabulary as flat lists: the tokens in the order of their ids, a type for each, the
merges, and a name for the way text is cut into words first (pretokenizers.py). An ordinary
token is spelt in the byte-level alphabet, where every byte has a visible letter and a space is
"Ġ"; special and added tokens are spelt as they are. An embedding with more rows than tokens gets
unused ones, since readers count the rows by this list.

`add_bos_token` tells llama.cpp to put the beginning before a text. It takes the one that a chat
template wrote away again (common/chat.cpp), so true is right for texts and for conversations: what
`Tokenizer.text_start` says here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.gguf.pretokenizers import (
    PreTokenizer,
    pre_tokenizer_named,
    recognise,
)
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import VISIBLE_TOKENS

if TYPE_CHECKING:
    import tokenizers

MODEL = "tokenizer.ggml.model"
PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPE = "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"
BOS_ID = "tokenizer.ggml.bos_token_id"
EOS_ID = "tokenizer.ggml.eos_token_id"
PAD_ID = "tokenizer.ggml.padding_token_id"
ADD_BOS = "tokenizer.ggml.add_bos_token"
CHAT_TEMPLATE = "tokenizer.chat_template"

BYTE_LEVEL_BPE = "gpt2"


class TokenType(IntEnum):
    """The numbers in `token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)


# Reading


def read_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file, from its metadata as plain Python values.

    Only byte-level BPE ("gpt2"). Unused tokens are rows without a text and get no entry, so
    `vocab_size` may be smaller than the list. CheckpointError names the field that is wrong.
    """
    model = _get(fields, MODEL, str)
    if model != BYTE_LEVEL_BPE:
        raise CheckpointError(
            f"{MODEL} is {model!r}; only byte-level BPE ({BYTE_LEVEL_BPE!r}) is read from GGUF: "
            "use the model's Hugging Face folder, whose tokenizer.json describes it in full"
        )
    pre = pre_tokenizer_named(fields.get(PRE))
    tokens = _tokens(fields)
    types = _types(fields, tokens)
    named = {field: _token_named(fields, field, tokens) for field in (BOS_ID, EOS_ID, PAD_ID)}
    kept = {token for token in named.values() if token is not None}
    vocabulary = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != TokenType.UNUSED or token in kept
    }
    backend = _bpe(vocabulary, _merges(fields, vocabulary), pre)
    _add_tokens(backend, tokens, types)
    add_bos = _get(fields, ADD_BOS, bool, optional=True)
    return Tokenizer(
        backend,
        chat_template=_get(fields, CHAT_TEMPLATE, str, optional=True),
        bos_token=named[BOS_ID],
        eos_token=named[EOS_ID],
        pad_token=named[PAD_ID],
        add_bos_token=pre.add_bos if add_bos is None else add_bos,
    )


def _get(fields: Mapping[str, Any], field: str, kind: type, *, optional: bool = False) -> Any:
    value = fields.get(field)
    if value is None and optional:
        return None
    if not isinstance(value, kind):
        found = "is missing" if value is None else f"is of type {type(value).__name__}"
        raise CheckpointError(f"{field} {found}; expected {kind.__name__}")
    return value


def _tokens(fields: Mapping[str, Any]) -> list[str]:
    tokens: list[str] = _get(fields, TOKENS, list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{TOKENS} must be a list of texts, one for each row, not empty")
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        for index, token in enumerate(tokens):
            if first.setdefault(token, index) != index:
                raise CheckpointError(f"{TOKENS} holds {token!r} as {first[token]} and as {index}")
    return tokens


def _types(fields: Mapping[str, Any], tokens: list[str]) -> list[int]:
    types: list[int] = _get(fields, TOKEN_TYPE, list)
    if len(types) != len(tokens):
        raise CheckpointError(f"{TOKEN_TYPE} has {len(types)} entries for {len(tokens)} tokens")
    strange = set(types) - set(TokenType)
    if strange:
        raise CheckpointError(f"{TOKEN_TYPE} holds {strange.pop()!r}; types are 1 to 6")
    # Converters of early 2024 called the rows without a token user-defined.
    return [
        TokenType.UNUSED if token == f"[PAD{index}]" else kind
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _token_named(fields: Mapping[str, Any], field: str, tokens: list[str]) -> str | None:
    index = _get(fields, field, int, optional=True)
    if index is not None and not 0 <= index < len(tokens):
        raise CheckpointError(f"{field} is {index}, but {TOKENS} has {len(tokens)} entries")
    return None if index is None else tokens[index]


def _merges(fields: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs in order of rank; a file may leave the list out, and then every byte stands alone."""
    merges = []
    for line in _get(fields, MERGES, list, optional=True) or []:
        # The first character may itself be a space in files of other alphabets.
        cut = line.find(" ", 1) if isinstance(line, str) else -1
        if cut < 0:
            raise CheckpointError(f"{MERGES} holds {line!r}; expected two tokens and a space")
        left, right = line[:cut], line[cut + 1 :]
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            unknown = next(t for t in (left, right, left + right) if t not in vocabulary)
            raise CheckpointError(f"{MERGES} holds {line!r}, but {unknown!r} is not in {TOKENS}")
        merges.append((left, right))
    return merges


def _bpe(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer
) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, processors

    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges)
    backend = tokenizers.Tokenizer(model)
    pre.install(backend)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Let the special and the added tokens be found in texts before anything else is cut."""
    from tokenizers import AddedToken

    special, added = [], []
    for token, kind in zip(tokens, types, strict=True):
        # llama.cpp's converter makes a control token of whatever looks like one.
        if kind in SPECIAL and token not in VISIBLE_TOKENS:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind in (*SPECIAL, TokenType.USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(added)


# Writing


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What a GGUF file says of ``tokenizer``, for an embedding of ``vocab_size`` rows.

    CheckpointError if GGUF cannot say it: a vocabulary of characters or pieces, a way of cutting
    text that has no name, tokens that take the spaces beside them along.
    """
    if vocab_size < tokenizer.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding {vocab_size} rows: "
            "they do not belong together"
        )
    description = json.loads(tokenizer.backend.to_str())
    _check_byte_level(description)
    pre = recognise(description)
    tokens, types = _rows(description, vocab_size)
    metadata: dict[str, Any] = {
        MODEL: BYTE_LEVEL_BPE,
        PRE: pre,
        TOKENS: tokens,
        TOKEN_TYPE: types,
        MERGES: [_merge_line(merge) for merge in description["model"]["merges"]],
        ADD_BOS: bool(tokenizer.text_start),
    }
    optional = {
        BOS_ID: tokenizer.bos_id,
        EOS_ID: tokenizer.eos_id,
        PAD_ID: tokenizer.pad_id,
        CHAT_TEMPLATE: tokenizer.chat_template,
    }
    return metadata | {field: value for field, value in optional.items() if value is not None}


def _check_byte_level(description: Mapping[str, Any]) -> None:
    model, decoder = description["model"], description["decoder"] or {}
    reason = None
    if model["type"] != "BPE":
        reason = f"it is a {model['type']} vocabulary"
    elif decoder.get("type") != "ByteLevel":
        reason = "it does not spell text in bytes, as a vocabulary of characters does not"
    else:
        # Each changes what the merges do, and GGUF has no field for any of them.
        names = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        reason = next((f"its {name} is {model[name]!r}" for name in names if model.get(name)), None)
    if reason is not None:
        raise CheckpointError(
            f"this tokenizer cannot be written to GGUF: {reason}. Only byte-level BPE can "
            "(Tokenizer.train_bpe); save this model as a Hugging Face folder"
        )


def _rows(description: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, index in description["model"]["vocab"].items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
    for entry in description["added_tokens"]:
        extra = [name for name in ("lstrip", "rstrip", "single_word") if entry[name]]
        if extra:
            raise CheckpointError(
                f"token {entry['content']!r} has {extra[0]}, which GGUF cannot say; save this "
                "model as a Hugging Face folder"
            )
        kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        tokens[entry["id"]], types[entry["id"]] = entry["content"], int(kind)
    if len(set(tokens)) < vocab_size:
        raise CheckpointError("two tokens would be spelt alike: one is named as unused rows are")
    return tokens, types


def _merge_line(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)
