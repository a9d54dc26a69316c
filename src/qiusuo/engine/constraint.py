"""Answers that must be JSON of a schema, match a regex or a grammar, or be one of some choices.

A grammar and what has been written so far decide which tokens may come next; all others are masked
out before the draw. The grammar itself is followed by llguidance (an Earley parser over bytes), so
a token may be half a character, or end one rule and begin another. Whatever a model's weights are,
an answer that ends is right in form; one that is cut off at ``max_tokens`` is not.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer

# W vocabulary.

Kind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]

MOST_COMPILED = 64  # grammars kept; a large schema holds some megabytes
# A weak model would write white space for ever where JSON allows any amount of it.
JSON_OPTIONS = {"whitespace_pattern": "[ \\n\\t]{1,32}"}


@dataclass(frozen=True)
class Constraint:
    """What an answer must be. ``value``: a JSON schema, nothing for "json_object" (any object),
    a regex in Rust's syntax (all of the answer matches, no look-around), a grammar in llguidance's
    Lark, or the choices."""

    kind: Kind
    value: Any = None


class Grammars:
    """Compiles constraints for one tokenizer, each once while it is in use.

    ``vocab_size``: the width of the logits, which may be padded. ``end_ids``: tokens that end an
    answer. Raises DataError if llguidance is missing or cannot read this vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._library = _library()
        self.vocab_size, self.end_ids = vocab_size, end_ids
        self.ends = sorted(i for i in end_ids if i < min(vocab_size, tokenizer.vocab_size))
        # The library wants some end; where the request has none, it is masked like the rest.
        ends = self.ends or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
        try:
            description, count = _readable(tokenizer)
            self._vocabulary = self._library.LLTokenizer(
                description, n_vocab=count, eos_token=ends or None
            )
        except Exception as error:  # the library has no class of its own
            raise DataError(
                f"this tokenizer cannot be used for constrained answers: {error}; what can is a "
                "byte-level BPE, one with byte fallback, or a character vocabulary"
            ) from error
        never = {*tokenizer.special_tokens.values(), *self._vocabulary.eos_tokens}
        self.never_W = np.zeros(vocab_size, bool)
        self.never_W[[token for token in never if token < vocab_size]] = True
        self.never_W[tokenizer.vocab_size :] = True  # rows of padding
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the start of an answer.

        Raises DataError, with the reason, for a grammar that is faulty, unsatisfiable or not
        supported, and for one of which this vocabulary cannot write the first character."""
        grammar = self._grammar(constraint)
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compile(constraint.kind, grammar)
        with self._lock:  # and not while compiling: others need not wait for a large one
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(self, compiled.deep_copy())

    def _grammar(self, constraint: Constraint) -> str:
        """The constraint in the library's own form."""
        kind, value = constraint.kind, constraint.value
        library = self._library.LLMatcher
        if kind == "json_object":
            if value is not None:
                raise DataError('a "json_object" constraint takes no value')
            kind, value = "json_schema", {"type": "object"}
        if kind == "json_schema":
            if not isinstance(value, Mapping):
                raise DataError(f"a JSON schema must be an object, not {type(value).__name__}")
            try:
                schema = json.dumps(value, ensure_ascii=False)
                return str(library.grammar_from_json_schema(schema, overrides=JSON_OPTIONS))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"the JSON schema cannot be read: {error}") from error
        if kind == "choice":
            return str(library.grammar_from_lark(_choices(value)))
        if not isinstance(value, str) or not value:
            raise DataError(f"a {kind} constraint needs a text of at least one character")
        if kind == "regex":
            return str(library.grammar_from_regex(value))
        if kind == "grammar":
            return str(library.grammar_from_lark(value))
        raise DataError(
            f"unknown constraint {kind!r}: known are json_schema, json_object, regex, grammar, "
            "choice"
        )

    def _compile(self, kind: Kind, grammar: str) -> Any:
        limits = self._library.LLParserLimits(verbose_errors=False)
        compiled = self._library.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if compiled.is_error():
            raise DataError(f"this {kind} constraint cannot be used: {_reason(compiled)}")
        first = compiled.deep_copy()
        packed = first.compute_bitmask()
        if not Matcher(self, first).mask(packed).any():
            raise DataError(
                f"this {kind} constraint cannot be used: no answer in this vocabulary fits it"
            )
        return compiled


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, grammars: Grammars, state: Any) -> None:
        self._grammars, self._state = grammars, state
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether an end was taken or nothing but an end can follow."""
        return self._ended or bool(self._state.is_stopped())

    def allowed(self) -> Tensor:
        """Bool [W]: the tokens that may come next. End tokens exactly where the answer may end;
        no other special token and no row of padding ever. None at all after an end, or where the
        vocabulary cannot write what the grammar asks for. ValueError where a grammar grows beyond
        the library's limits."""
        packed = self._state.compute_bitmask()
        if self._state.is_error():
            raise ValueError(f"the constraint failed: {_reason(self._state)}")
        return torch.from_numpy(self.mask(packed))

    def mask(self, packed: bytes) -> NDArray[np.bool_]:
        """`allowed` from the library's bits [W / 8], which know nothing of our special tokens and
        call the end allowed where nothing else is."""
        grammars = self._grammars
        allowed_W = np.zeros(grammars.vocab_size, bool)
        if self._ended:
            return allowed_W
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
        bits = bits[: min(grammars.vocab_size, len(bits))]
        allowed_W[: len(bits)] = bits
        allowed_W[grammars.never_W] = False
        allowed_W[grammars.ends] = self._state.is_accepting()
        return allowed_W

    def advance(self, token: int) -> None:
        """Take the token that was drawn. ValueError for one that is not allowed, which leaves
        everything as it was."""
        if not self._fits(token):
            raise ValueError(f"token {token} does not fit the constraint at this place")
        if token in self._grammars.ends:
            self._ended = True
        else:
            self._state.consume_token(token)

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of these tokens could come next, one after the other, ends not counted."""
        grammars, count = self._grammars, 0
        if self._ended:
            return 0
        for token in tokens:
            if not 0 <= token < grammars.vocab_size or grammars.never_W[token]:
                break
            count += 1
        return int(self._state.validate_tokens(list(tokens[:count])))

    def _fits(self, token: int) -> bool:
        grammars = self._grammars
        if self._ended or not 0 <= token < grammars.vocab_size:
            return False
        if token in grammars.ends:
            return bool(self._state.is_accepting())
        return not grammars.never_W[token] and self._state.validate_tokens([token]) == 1


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise DataError(
            "constrained answers need llguidance: pip install 'qiusuo[constrain]'"
        ) from error


def _readable(tokenizer: Tokenizer) -> tuple[str, int]:
    """The tokenizer.json as the library can read it, with every marker special and renamed; and
    how many tokens it has there.

    Most of DeepSeek's own markers are not flagged, and so would count as text. Renamed, because
    where only one text can follow, the library allows only the tokens its encoding gives: text
    that spells a marker must not be encoded to it."""
    renamed = {text: f"\ue000{index}\ue001" for text, index in tokenizer.special_tokens.items()}
    description, count = json.loads(tokenizer.backend.to_str()), tokenizer.vocab_size
    for token in description["added_tokens"]:
        token["special"] = token["content"] in renamed
        token["content"] = renamed.get(token["content"], token["content"])
    model = description["model"]
    if isinstance(model["vocab"], list):  # Unigram: pieces with scores
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {renamed.get(text, text): i for text, i in model["vocab"].items()}
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    description["post_processor"] = None  # names markers by their text, and adds them
    if (description["decoder"] or {"type": "Fuse"})["type"] == "Fuse":
        # Tokens that are the text they spell. The library knows that by this name alone.
        description["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}
        count += _add_bytes(model, count)
    return json.dumps(description, ensure_ascii=False), count


def _add_bytes(model: dict[str, Any], count: int) -> int:
    """Add every single byte behind the tokens; how many were added. Where all that may follow
    begins with the same byte, the library asks for the tokens of that byte, and gives up if there
    are none. They are padding to the model, which never draws them."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if isinstance(model["vocab"], list):
        model["vocab"] += [[name, 0.0] for name in names]
    else:
        names = [name for name in names if name not in model["vocab"]]
        model["vocab"] |= {name: count + place for place, name in enumerate(names)}
    return len(names)


def _choices(value: object) -> str:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise DataError(f"a choice constraint needs a list of at least one text, not {value!r}")
    for choice in value:
        if not isinstance(choice, str) or not choice:
            raise DataError(f"a choice must be a text of at least one character, not {choice!r}")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)


def _reason(state: Any) -> str:
    """The library's reason, without the names that we gave markers."""
    listed = "; following special tokens.*⟧"
    return re.sub(listed, " (an answer holds none)", str(state.get_error()).strip())
