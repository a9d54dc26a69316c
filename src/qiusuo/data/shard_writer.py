"""Filling files of tokens, document by document, and counting what goes in.

`shards.write_shards` is the way in; here is what it does with each batch of documents.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qiusuo.data.fill_in_the_middle import FillInTheMiddle
from qiusuo.data.tokenizer import Tokenizer

FORMAT = 1
BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class ShardsMeta:
    """What meta.json says. `utf8_bytes` and `characters` count the text, `unknown` the tokens
    that stand for a character outside the vocabulary; `sha256` is over all tokens."""

    format: int
    dtype: str
    documents: int
    tokens: int
    characters: int
    utf8_bytes: int
    unknown: int
    shard_tokens: list[int]
    sha256: str
    tokenizer: str
    corpus: str
    fim_rate: float
    seed: int


class ShardWriter:
    """Encodes batches of documents and fills one file of tokens after the other."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, tokens_per_shard: int) -> None:
        self.documents = 0
        self.tokens = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._limit = tokens_per_shard
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._characters = 0
        self._utf8_bytes = 0
        self._unknown = 0
        self._lengths: list[int] = []
        self._shard_tokens: list[int] = []
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        self._digest = hashlib.sha256()

    def write(self, texts: list[str], fim: FillInTheMiddle) -> None:
        parts = [fim.parts(text, self.documents + i) for i, text in enumerate(texts)]
        pieces = [part for row in parts for part in row if isinstance(part, str)]
        encoded = iter(self._tokenizer.encode_batch(pieces))
        bos = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        for row in parts:
            ids = [next(encoded) if isinstance(part, str) else [part] for part in row]
            flat = itertools.chain(bos, *ids, [self._tokenizer.eos_id])
            self._append(np.fromiter(flat, self._dtype))
        self._characters += sum(map(len, texts))
        self._utf8_bytes += sum(len(text.encode()) for text in texts)

    def _append(self, tokens: np.ndarray) -> None:
        if self._buffered and self._buffered + len(tokens) > self._limit:
            self._flush()
        self._buffer.append(tokens)
        self._buffered += len(tokens)
        self._lengths.append(len(tokens))
        self.documents += 1
        self.tokens += len(tokens)
        if self._tokenizer.unknown_id is not None:
            self._unknown += int((tokens == self._tokenizer.unknown_id).sum())

    def _flush(self) -> None:
        tokens = np.concatenate(self._buffer)
        np.save(self._folder / shard_name(len(self._shard_tokens)), tokens)
        self._digest.update(tokens.data)
        self._shard_tokens.append(len(tokens))
        self._buffer, self._buffered = [], 0

    def finish(self, corpus: str, fim_rate: float, seed: int) -> ShardsMeta:
        if self._buffer:
            self._flush()
        offsets_D = np.cumsum([0, *self._lengths], dtype=np.int64)
        np.save(self._folder / "offsets.npy", offsets_D)
        # The same tokens cut into other documents are other data.
        self._digest.update(offsets_D.data)
        return ShardsMeta(
            format=FORMAT,
            dtype=self._dtype.name,
            documents=self.documents,
            tokens=self.tokens,
            characters=self._characters,
            utf8_bytes=self._utf8_bytes,
            unknown=self._unknown,
            shard_tokens=self._shard_tokens,
            sha256=self._digest.hexdigest(),
            tokenizer=self._tokenizer.fingerprint,
            corpus=corpus,
            fim_rate=fim_rate,
            seed=seed,
        )


def in_batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of about four million characters."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.npy"
