"""Tokens as clients see them beside log-probabilities: a text, and the bytes it stands for.

A token may be a part of a character, which is no text: its bytes tell what it is, and its text
writes them out, ``\\xe5``.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from tokenizers import pre_tokenizers

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.sampler import Drawn

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        decoder = json.dumps(json.loads(tokenizer.backend.to_str())["decoder"])
        self._byte_level = '"ByteLevel"' in decoder
        self._byte_fallback = '"ByteFallback"' in decoder
        self._added = {
            index: token.content
            for index, token in self._backend.get_added_tokens_decoder().items()
        }

    def bytes_of(self, token: int) -> bytes:
        """Nothing for a row of padding."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            known = _byte_level()
            return b"".join(bytes([known[one]]) if one in known else one.encode() for one in piece)
        if self._byte_fallback and (byte := BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode("utf-8", "backslashreplace")

    def told(self, drawn: Drawn) -> dict[str, Any]:
        """A drawn token as the chat API tells it."""
        top = [self._entry(token, logprob) for token, logprob in drawn.top]
        return self._entry(drawn.token, drawn.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.bytes_of(token)
        text = raw.decode("utf-8", "backslashreplace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


@functools.lru_cache(maxsize=8)
def token_texts(tokenizer: Tokenizer) -> TokenTexts:
    return TokenTexts(tokenizer)


def finite(logprob: float) -> float:
    """JSON has no infinity; the API's own word for "never" is -9999."""
    return max(logprob, -9999.0)


@functools.cache
def _byte_level() -> dict[str, int]:
    """Byte-level vocabularies write a byte as a letter: those that are printable as themselves,
    the others, in order, from U+0100 on."""
    letters = {one: ord(one) for one in pre_tokenizers.ByteLevel.alphabet() if ord(one) < 256}
    rest = [byte for byte in range(256) if byte not in letters.values()]
    return letters | {chr(256 + place): byte for place, byte in enumerate(rest)}
