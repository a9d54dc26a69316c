"""Tokens on disk: written once, mapped into memory, shared by every run and process.

    tokens-00000.npy ...   uint16 or uint32, as the vocabulary needs; documents end to end
    offsets.npy            int64 [documents + 1], where each document begins in the whole
    meta.json              counts, the tokenizer's fingerprint, how it was made

A document is [bos] tokens eos: bos where the tokenizer has one, eos always, whether the corpus is
one document or a million. Characters are counted (without bos and eos) because a loss in bits per
character compares across vocabularies: nats a token * tokens / (ln 2 * characters).

Shapes: T tokens, D documents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from qiusuo.data.atomic import new_folder, write_file
from qiusuo.data.errors import DataError
from qiusuo.data.fill_in_the_middle import FillInTheMiddle
from qiusuo.data.shard_writer import FORMAT, ShardsMeta, ShardWriter, in_batches, shard_name
from qiusuo.data.tokenizer import Tokenizer

TOKENS_PER_SHARD = 1 << 27


class Shards:
    """One tokenised corpus, open for reading."""

    def __init__(self, folder: Path, meta: ShardsMeta, offsets_D: np.ndarray) -> None:
        self.folder = folder
        self.meta = meta
        self.offsets_D = offsets_D
        self._maps = [
            # As plain arrays: the subclass of a memory map makes every slice several times slower.
            np.asarray(np.load(folder / shard_name(i), mmap_mode="r"))
            for i in range(len(meta.shard_tokens))
        ]
        self._starts = np.cumsum([0, *meta.shard_tokens])

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> Shards:
        """Map a folder written by `write_shards`; checks its sizes and, if given, the tokenizer."""
        folder = Path(folder)
        meta = _read_meta(folder)
        if tokenizer is not None and tokenizer.fingerprint != meta.tokenizer:
            raise DataError(
                f"vocabulary mismatch: {folder} was written with tokenizer "
                f"{meta.tokenizer[:12]}, not {tokenizer.fingerprint[:12]}; use the tokenizer "
                f"that the shards were made with, or write them anew"
            )
        try:
            offsets_D = np.load(folder / "offsets.npy")
            shards = cls(folder, meta, offsets_D)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{folder} is damaged ({error}): write the shards anew") from error
        sizes = [len(tokens) for tokens in shards._maps]
        if (
            sizes != meta.shard_tokens
            or len(offsets_D) != meta.documents + 1
            or offsets_D[-1] != meta.tokens
            or any(tokens.dtype != meta.dtype for tokens in shards._maps)
        ):
            raise DataError(f"{folder} is damaged (sizes differ from meta.json): write it anew")
        return shards

    @property
    def tokens(self) -> int:
        """Tokens in all, bos and eos included."""
        return self.meta.tokens

    @property
    def documents(self) -> int:
        return self.meta.documents

    @property
    def characters(self) -> int:
        return self.meta.characters

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokens."""
        return self.meta.sha256

    def bits_per_character(self, nats_per_token: float) -> float:
        """A mean loss over all predicted tokens (all but the very first) as bits a character."""
        return nats_per_token * (self.tokens - 1) / (math.log(2) * self.characters)

    def slice(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the whole, as stored; a view where they lie in one file."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for i in range(first, len(self._maps)):
            begin = int(self._starts[i])
            parts.append(self._maps[i][max(start - begin, 0) : end - begin])
            if end <= self._starts[i + 1]:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gather(self, index: np.ndarray) -> np.ndarray:
        """The tokens at these places of the whole, in the shape of `index`."""
        if len(self._maps) == 1:
            return self._maps[0][index]
        file = np.searchsorted(self._starts, index, side="right") - 1
        result = np.empty(index.shape, self.meta.dtype)
        for i in np.unique(file):
            here = file == i
            result[here] = self._maps[i][index[here] - self._starts[i]]
        return result

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, with its bos and eos."""
        if not 0 <= number < self.documents:
            raise DataError(f"document {number} is outside the {self.documents} of {self.folder}")
        return self.slice(int(self.offsets_D[number]), int(self.offsets_D[number + 1]))


def write_shards(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    fim_rate: float = 0.0,
    seed: int = 0,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    corpus_fingerprint: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Shards:
    """Tokenise documents into a new `folder`, which appears only when whole.

    A document is never divided between files, so that one longer than `tokens_per_shard` makes a
    larger file. `progress` is called with documents and tokens so far. `DataError` if the folder
    exists, there is no text, the tokenizer has no eos, or the disk is full.
    """
    folder = Path(folder)
    if tokens_per_shard < 1:
        raise DataError(f"tokens_per_shard must be at least 1, not {tokens_per_shard}")
    if tokenizer.eos_id is None:
        raise DataError("this tokenizer names no eos_token: documents cannot be told apart")
    fim = FillInTheMiddle(tokenizer, rate=fim_rate, seed=seed)
    with new_folder(folder) as partial:
        writer = ShardWriter(partial, tokenizer, tokens_per_shard)
        for batch in in_batches(documents):
            writer.write(batch, fim)
            if progress is not None:
                progress(writer.documents, writer.tokens)
        meta = writer.finish(corpus_fingerprint, fim_rate, seed)
        if not meta.documents:
            raise DataError(f"no documents to write to {folder}: the corpus is empty")
        content = json.dumps(asdict(meta), indent=2) + "\n"
        write_file(partial / "meta.json", content.encode())
    return Shards.open(folder, tokenizer)


def _read_meta(folder: Path) -> ShardsMeta:
    file = folder / "meta.json"
    if not file.is_file():
        raise DataError(f"no shards in {folder}: expected a folder made by write_shards")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields.get("format") != FORMAT:
            raise DataError(
                f"{folder} has shard format {fields.get('format')}, this version reads {FORMAT}: "
                f"write the shards anew"
            )
        return ShardsMeta(**fields)
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} is damaged ({error}): write the shards anew") from error
