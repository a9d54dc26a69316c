"""Text to token ids and back, for any `tokenizer.json`.

One rule stands above the rest: ordinary text never becomes a special token. A user may write
`<｜end▁of▁sentence｜>` and gets the characters encoded; only text that the program itself put
together (a rendered template) is encoded with `allow_special=True`. And one absence: `encode` adds
nothing. Where a document or a conversation begins is the business of shards and templates.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qiusuo.data import vocabularies
from qiusuo.data.chat_template import (
    Message,
    as_tested,
    check_messages,
    default_template,
    render_chat,
)
from qiusuo.data.errors import DataError, unknown
from qiusuo.data.plain_text import is_ordinary, without_special_tokens
from qiusuo.data.template_guard import TemplateGuard, spelling_pattern
from qiusuo.data.tokenizer_files import FIELDS, read_tokenizer, save_tokenizer
from qiusuo.data.tool_text import frame_untold, with_tool_text
from qiusuo.data.unfinished_turn import render_unfinished

if TYPE_CHECKING:
    import tokenizers

# Long texts are encoded in pieces, for memory and for both cores. A lone line end before a word
# is a place where every byte-level pre-tokenizer cuts anyway.
PIECE_CHARACTERS = 1 << 16
LINE_START = re.compile(r"(?<=\S)\n(?=[^\W_])")


class Tokenizer:
    """A vocabulary with its special tokens and its chat template.

    `chat_template`, `bos_token`, `eos_token` and `pad_token` are None where the model has none.
    `add_bos_token` says whether a bare text begins with `bos_token`, None where the files do not
    say; `encode` never puts it there, see `text_start`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        add_bos_token: bool | None = None,
        model_max_length: int | None = None,
    ) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.pad_token = pad_token
        self.add_bos_token = add_bos_token
        self.model_max_length = model_max_length
        self.special_tokens: dict[str, int] = {
            token.content: index
            for index, token in sorted(backend.get_added_tokens_decoder().items())
            if not is_ordinary(token.content, special=token.special)
        }
        self._special_ids = frozenset(self.special_tokens.values())
        for token in (bos_token, eos_token, pad_token):
            if token is not None:
                self.token_id(token)

    # Made, loaded, saved

    @classmethod
    def train_bpe(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a byte-level BPE as DeepSeek-V3's; see `vocabularies.train_bpe`."""
        return cls._made_here(vocabularies.train_bpe(documents, vocab_size))

    @classmethod
    def train_characters(cls, documents: Iterable[str], min_frequency: int = 1) -> Tokenizer:
        """One token a character; see `vocabularies.train_characters`."""
        return cls._made_here(vocabularies.train_characters(documents, min_frequency))

    @classmethod
    def _made_here(cls, backend: tokenizers.Tokenizer) -> Tokenizer:
        return cls(
            backend,
            chat_template=default_template(),
            bos_token=vocabularies.BOS_TOKEN,
            eos_token=vocabularies.EOS_TOKEN,
            pad_token=vocabularies.PAD_TOKEN,
            add_bos_token=True,
        )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or a folder that holds one.

        Beside it, `tokenizer_config.json` names the special tokens and the template, and
        `chat_template.jinja` goes before the template named there; both may be missing.
        """
        backend, fields = read_tokenizer(Path(path))
        return cls(backend, **fields)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` as Hugging Face lays them out."""
        fields = {name: getattr(self, name) for name in FIELDS}
        save_tokenizer(Path(folder), self.backend.to_str(pretty=True), fields)

    # What it holds

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int | None:
        return None if self.bos_token is None else self.token_id(self.bos_token)

    @functools.cached_property
    def text_start(self) -> list[int]:
        """What stands before a text that is not part of a conversation: the beginning, or nothing.

        Where the files do not say whether, the tokenizer.json's own post-processor decides.
        """
        if self.bos_id is None or self.add_bos_token is False:
            return []
        if self.add_bos_token is None and self.bos_id not in self.backend.encode("").ids:
            return []
        return [self.bos_id]

    @property
    def eos_id(self) -> int | None:
        return None if self.eos_token is None else self.token_id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        return None if self.pad_token is None else self.token_id(self.pad_token)

    @property
    def unknown_id(self) -> int | None:
        """The id for a character outside the vocabulary; None where there is no such thing."""
        token = getattr(self.backend.model, "unk_token", None)
        return self.backend.token_to_id(token) if isinstance(token, str) else None

    def token_id(self, token: str) -> int:
        """The id of a token by its exact spelling; `DataError` if there is none."""
        index = self.backend.token_to_id(token)
        if index is None:
            raise unknown("token", token, self.special_tokens)
        return int(index)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical `tokenizer.json`: equal ids for equal text, whatever the file."""
        canonical = json.dumps(
            json.loads(self.backend.to_str()), sort_keys=True, ensure_ascii=False
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    # Text to ids and back

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of `text`; special tokens only with `allow_special`. Adds no beginning or end."""
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """As `encode` for each text, on all cores."""
        pieces: list[str] = []
        ends: list[int] = []
        for text in texts:
            if not isinstance(text, str):
                raise DataError(f"only text can be encoded, not {type(text).__name__}")
            pieces += self._pieces(text)
            ends.append(len(pieces))
        ids = self._encode_pieces(self.backend, pieces)
        if not allow_special:
            caught = [i for i, row in enumerate(ids) if not self._special_ids.isdisjoint(row)]
            if caught:
                again = self._encode_pieces(self._plain, [pieces[i] for i in caught])
                for i, row in zip(caught, again, strict=True):
                    ids[i] = [self._plain_ids.get(index, index) for index in row]
        starts = [0, *ends[:-1]]
        return [
            ids[a] if b == a + 1 else [index for row in ids[a:b] for index in row]
            for a, b in zip(starts, ends, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no valid UTF-8 become U+FFFD.

        `skip_special` leaves out the tokens that the tokenizer.json flags as special: for the
        vocabularies made here the frame of a conversation, but not thoughts and tool calls.
        """
        if len(ids) and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise DataError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    # Conversations

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> list[int]:
        """The ids of a conversation; messages cannot forge markers (see template_guard.py).

        With `continue_last` they end where the assistant's last message does, for the model to go
        on; `add_generation_prompt` is then without effect.
        A template that writes calls and takes no notice of `tools` has them told of in the system
        message (see tool_text.py).
        `variables` are what this template asks for besides; see `render_chat`.
        For messages that spell no special token these are exactly the ids of the rendered text.
        """
        if self.chat_template is None:
            raise DataError(
                "this tokenizer has no chat template: it belongs to a base model; put a "
                "chat_template.jinja beside its tokenizer.json"
            )
        check_messages(messages)
        messages = as_tested(messages, self.chat_template)  # texts are read before their disguise
        texts = (messages, tools, variables, self.chat_template)
        guard = TemplateGuard(list(self.special_tokens), *texts)
        prompted = functools.partial(render_chat, add_generation_prompt=add_generation_prompt)
        turns: list[Message] = [guard.hide_message(message) for message in messages]
        known_tools = guard.hide(tools)
        if known_tools and (frame := frame_untold(self.chat_template)) is not None:
            turns = with_tool_text(turns, known_tools, frame)  # whose marks are no disguised text
        rendered = (render_unfinished if continue_last else prompted)(
            self.chat_template,
            turns,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            thinking=thinking,
            tools=known_tools,
            variables=guard.hide(variables),
        )
        text, own = guard.reveal(rendered)
        if [match.span() for match in self._special_pattern.finditer(text)] == own:
            ids = self.encode(text, allow_special=True)
            expected = [self.special_tokens[text[a:b]] for a, b in own]
            if [index for index in ids if index in self._special_ids] == expected:
                return ids
        return self._encode_around(text, own)

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether this prompt leaves a thought open, so that the answer begins inside it.

        DeepSeek-R1's template ends in `<think>` and a line end, V3.1's in `<think>` or
        `</think>`. What counts is the prompt's last marker: text that spells one is no marker.
        """
        if vocabularies.THINK_BEGIN in self.special_tokens:
            markers = (index for index in reversed(prompt_ids) if index in self._special_ids)
            return next(markers, None) == self.special_tokens[vocabularies.THINK_BEGIN]
        # A vocabulary without the mark spells it out, in seven pieces at most.
        tail = self.decode(prompt_ids[-2 * len(vocabularies.THINK_BEGIN) :])
        return tail.rstrip().endswith(vocabularies.THINK_BEGIN)

    def _encode_around(self, text: str, markers: list[tuple[int, int]]) -> list[int]:
        """Only the given spans become special tokens; all the rest is plain text."""
        ids: list[int] = []
        position = 0
        for start, end in [*markers, (len(text), len(text))]:
            ids += self.encode(text[position:start])
            if end > start:
                ids.append(self.special_tokens[text[start:end]])
            position = end
        return ids

    # Inside

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return spelling_pattern(self.special_tokens)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return without_special_tokens(self.backend, frozenset(self.special_tokens))

    @functools.cached_property
    def _plain_ids(self) -> dict[int, int]:
        """Where the plain tokenizer numbers a token differently: its id to the true one."""
        return {
            index: true
            for token, index in self._plain.get_vocab(with_added_tokens=True).items()
            if (true := self.backend.token_to_id(token)) != index and true is not None
        }

    @staticmethod
    def _encode_pieces(backend: tokenizers.Tokenizer, pieces: list[str]) -> list[list[int]]:
        try:
            encodings = backend.encode_batch_fast(pieces, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"text that is not valid Unicode cannot be encoded: {error}") from error
        return [encoding.ids for encoding in encodings]

    @functools.cached_property
    def _cuts_at_lines(self) -> bool:
        description = json.loads(self.backend.to_str())
        normalizer = json.dumps(description["normalizer"])
        splitter = json.dumps(description["pre_tokenizer"])
        byte_level = '"ByteLevel"' in splitter and '"add_prefix_space": true' not in splitter
        characters = splitter == "null" and not description["model"].get("merges", True)
        return (byte_level or characters) and "Prepend" not in normalizer

    def _pieces(self, text: str) -> list[str]:
        if len(text) <= PIECE_CHARACTERS or not self._cuts_at_lines:
            return [text]
        pieces = []
        start = 0
        while (cut := LINE_START.search(text, start + PIECE_CHARACTERS)) is not None:
            pieces.append(text[start : cut.end()])
            start = cut.end()
        return [*pieces, text[start:]]
