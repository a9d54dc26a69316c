"""Training and validation text, cut once and the same way for ever.

With several documents, a seeded hash of its text puts each on one side: adding documents moves no
other, and copies of one text stay on one side. A corpus of one document is cut by characters, the
last part being validation; for tinyshakespeare and a fraction of 0.1 that is nanoGPT's cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from qiusuo.data.corpora import Corpus
from qiusuo.data.errors import DataError
from qiusuo.data.randomness import check_seed

TRAIN, VALIDATION, DROPPED = 0, 1, 2
HASH_RANGE = 1 << 64


@dataclass(frozen=True)
class Split:
    """Where each document of a corpus goes. Shape: N documents of the corpus.

    `side_N` holds TRAIN, VALIDATION or DROPPED; `cut` is the place in characters where a corpus
    of one document is cut, None for one of several.
    """

    corpus: Corpus
    side_N: np.ndarray
    cut: int | None

    @property
    def dropped(self) -> int:
        """How many documents were left out."""
        return int((self.side_N == DROPPED).sum())

    def train(self) -> Iterator[str]:
        """A fresh pass over the training text."""
        for text in self._documents(TRAIN):
            yield text if self.cut is None else text[: self.cut]

    def validation(self) -> Iterator[str]:
        """A fresh pass over the validation text."""
        if self.cut is None:
            yield from self._documents(VALIDATION)
            return
        for text in self._documents(TRAIN):
            if text[self.cut :]:
                yield text[self.cut :]

    def _documents(self, side: int) -> Iterator[str]:
        count = 0
        for text in self.corpus.documents():
            if count < len(self.side_N) and self.side_N[count] == side:
                yield text
            count += 1
        if count != len(self.side_N):
            raise DataError(
                f"corpus {self.corpus.name!r} ({self.corpus.source}) changed while it was read: "
                f"{count} documents, before {len(self.side_N)}"
            )


def split_corpus(
    corpus: Corpus,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    keep: Callable[[str], bool] | None = None,
) -> Split:
    """Split a corpus in one pass; documents for which `keep` says no are dropped.

    However small the corpus and the fraction, each side of several documents gets one. A fraction
    of 0 leaves validation empty. `DataError` if a side would have nothing.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction must be in [0, 1), not {validation_fraction}")
    hashes: list[int] = []
    kept: list[bool] = []
    last = ""
    for text in corpus.documents():
        kept.append(keep is None or keep(text))
        hashes.append(_hash(text, seed))
        if kept[-1]:
            last = text
    hash_N = np.array(hashes, dtype=np.uint64)
    kept_N = np.array(kept, dtype=bool)
    side_N = np.where(kept_N, TRAIN, DROPPED).astype(np.int8)
    if kept_N.sum() == 1:
        return Split(corpus, side_N, _cut(corpus, last, validation_fraction))
    if validation_fraction > 0 and kept_N.any():
        # Always the smallest hash, never the largest: no side stays empty.
        smallest, largest = hash_N[kept_N].min(), hash_N[kept_N].max()
        if smallest == largest:
            raise DataError(
                f"corpus {corpus.name!r} is one text over and over: nothing is left to validate on"
            )
        limit = np.uint64(min(int(validation_fraction * HASH_RANGE), HASH_RANGE - 1))
        held_out = (hash_N < limit) | (hash_N == smallest)
        side_N[kept_N & held_out & (hash_N != largest)] = VALIDATION
    return Split(corpus, side_N, None)


def _hash(text: str, seed: int) -> int:
    key = check_seed(seed).to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


def _cut(corpus: Corpus, text: str, validation_fraction: float) -> int:
    cut = int(len(text) * (1 - validation_fraction))
    if cut == 0 or (validation_fraction > 0 and cut == len(text)):
        raise DataError(
            f"corpus {corpus.name!r} is one document of {len(text)} characters, too short to hold "
            f"out {validation_fraction} of it"
        )
    return cut
