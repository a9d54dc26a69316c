"""Leaving out texts that were there before, exactly or nearly.

Exact: texts that differ only in white space, case or the width of characters count as one. Near:
texts are sets of shingles (runs of three words, a Chinese character being a word), and MinHash
signatures in a locality-sensitive index find those whose sets overlap by a Jaccard similarity of
the threshold or more. Both keep the first of a kind and count what they drop.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import unicodedata
from collections.abc import Iterable, Iterator

from qiusuo.data.errors import DataError

# A Han character or a kana is a unit by itself; elsewhere a unit is a word.
IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")
WORD = re.compile(r"[^\W_]+")
SHINGLE_UNITS = 3
PERMUTATIONS = 128


class ExactDuplicates:
    """Drops a text that was there before, but for white space, case and width."""

    def __init__(self) -> None:
        self.kept = 0
        self.dropped = 0
        self._seen: set[bytes] = set()

    def keep(self, text: str) -> bool:
        """Whether `text` is new; it is remembered."""
        normal = unicodedata.normalize("NFKC", text).casefold()
        key = hashlib.blake2b(" ".join(normal.split()).encode(), digest_size=16).digest()
        new = key not in self._seen
        self._seen.add(key)
        self.kept += new
        self.dropped += not new
        return new

    def filter(self, documents: Iterable[str]) -> Iterator[str]:
        """Only the new ones."""
        return filter(self.keep, documents)


def require_datasketch() -> None:
    """`DataError` where the package that finds near-duplicates is not installed."""
    if importlib.util.find_spec("datasketch") is None:
        raise DataError("near-duplicate removal needs datasketch: pip install 'qiusuo[data]'")


class NearDuplicates:
    """Drops a text whose shingles overlap an earlier one's by `threshold` (Jaccard) or more.

    The similarity is an estimate from 128 hashes, with a standard error of up to 0.04.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        if not 0 < threshold <= 1:
            raise DataError(f"threshold must be in (0, 1], not {threshold}")
        require_datasketch()
        import datasketch

        self.threshold = threshold
        self.kept = 0
        self.dropped = 0
        self._signatures: list[datasketch.MinHash] = []
        self._blank = datasketch.MinHash(num_perm=PERMUTATIONS)
        self._index = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)

    def keep(self, text: str) -> bool:
        """Whether `text` is unlike all before it; if so it is remembered."""
        signature = self._blank.copy()
        signature.update_batch([shingle.encode() for shingle in shingles(text)])
        new = not any(
            signature.jaccard(self._signatures[index]) >= self.threshold
            for index in self._index.query(signature)
        )
        if new:
            self._index.insert(len(self._signatures), signature)
            self._signatures.append(signature)
        self.kept += new
        self.dropped += not new
        return new

    def filter(self, documents: Iterable[str]) -> Iterator[str]:
        """Only those unlike all before."""
        return filter(self.keep, documents)


def shingles(text: str) -> list[str]:
    """The distinct runs of three units of a text, sorted; a shorter text is one run."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    units = WORD.findall(IDEOGRAPH.sub(r" \g<0> ", normal))
    count = max(1, len(units) - SHINGLE_UNITS + 1)
    return sorted({"\x1f".join(units[i : i + SHINGLE_UNITS]) for i in range(count)})
