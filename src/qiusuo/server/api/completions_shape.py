"""Answers of the completions API, chunk by chunk and whole, in OpenAI's older shape.

Log-probabilities are four lists side by side, with the prompt's tokens before the answer's where it
is echoed. The end token is told among them: tools that score texts count on one more token than
the prompt has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.asking import Completion
from qiusuo.engine.sampler import Drawn
from qiusuo.server.api.chat_chunks import Chunk, finish_reason
from qiusuo.server.api.completions_request import Prompt
from qiusuo.server.api.token_texts import TokenTexts, finite

FIRST_BYTES = frozenset(byte for byte in range(256) if byte & 0xC0 != 0x80)  # of characters


@dataclass
class TextShape:
    """One response. ``texts``: where log-probabilities were asked for."""

    id: str
    created: int
    model: str
    fingerprint: str
    null_usage: bool = False
    texts: TokenTexts | None = None
    _told: dict[int, TokenList] = field(default_factory=dict)  # of streamed choices

    def piece(self, choice: int, text: str, drawn: Sequence[Drawn] = ()) -> Chunk:
        return self._chunk(choice, text, self._new(choice, drawn) if drawn else None)

    def closing(self, choice: int, answer: Completion) -> Chunk:
        """With what was drawn and gave no text: the end token."""
        told = 0 if choice not in self._told else len(self._told[choice].tokens)
        rest = answer.drawn[told:] if self.texts is not None else []
        logprobs = self._new(choice, rest) if rest else None
        return self._chunk(choice, "", logprobs, finish_reason(answer.finish_reason))

    def whole(self, choices: Sequence[Chunk], usage: Chunk) -> Chunk:
        return self._frame(choices) | {"usage": usage}

    def choice(
        self, index: int, answer: Completion, echo: Echo | None, wants_text: bool = True
    ) -> Chunk:
        logprobs = None
        if self.texts is not None:
            listed = TokenList(self.texts)
            if echo is not None:
                listed.add_prompt(answer.prompt_drawn, echo)
            if wants_text:
                listed.add(answer.drawn)
            logprobs = listed.told()
        return {
            "text": ("" if echo is None else echo.text) + (answer.text if wants_text else ""),
            "index": index,
            "logprobs": logprobs,
            "finish_reason": finish_reason(answer.finish_reason),
        }

    def _new(self, choice: int, drawn: Sequence[Drawn]) -> Chunk:
        assert self.texts is not None
        listed = self._told.setdefault(choice, TokenList(self.texts))
        before = len(listed.tokens)
        listed.add(drawn)
        return listed.told(before)

    def _chunk(
        self, choice: int, text: str, logprobs: Chunk | None, reason: str | None = None
    ) -> Chunk:
        told = {"text": text, "index": choice, "logprobs": logprobs, "finish_reason": reason}
        frame = self._frame([told])
        return frame | {"usage": None} if self.null_usage else frame

    def _frame(self, choices: Sequence[Chunk]) -> Chunk:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
        }


@dataclass(frozen=True)
class Echo:
    """A prompt as its client means it: its text, and its first token unless the server put one
    before it (for whose sake even the first then has a log-probability)."""

    text: str
    first: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: Prompt) -> Echo:
        if not isinstance(prompt, str):
            return cls(tokenizer.decode(prompt), prompt[0])
        if tokenizer.text_start:
            return cls(prompt, None)
        return cls(prompt, tokenizer.encode(prompt)[0])


class TokenList:
    """Four lists that grow together."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self.tokens: list[str] = []
        self.logprobs: list[float | None] = []
        self.top: list[dict[str, float] | None] = []
        self.offsets: list[int] = []
        self._characters = 0

    def add_prompt(self, drawn: Sequence[Drawn], echo: Echo) -> None:
        if echo.first is not None:
            self._add(echo.first, None, None)
        self.add(drawn)

    def add(self, drawn: Sequence[Drawn]) -> None:
        for one in drawn:
            top: dict[str, float] = {}
            for token, logprob in (*one.top, (one.token, one.logprob)):
                top.setdefault(self._texts.text_of(token), finite(logprob))
            self._add(one.token, finite(one.logprob), top)

    def told(self, start: int = 0) -> dict[str, Any]:
        return {
            "tokens": self.tokens[start:],
            "token_logprobs": self.logprobs[start:],
            "top_logprobs": self.top[start:],
            "text_offset": self.offsets[start:],
        }

    def _add(self, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        raw = self._texts.bytes_of(token)
        self.tokens.append(raw.decode("utf-8", "backslashreplace"))
        self.logprobs.append(logprob)
        self.top.append(top)
        self.offsets.append(self._characters)
        self._characters += sum(byte in FIRST_BYTES for byte in raw)
