"""A teacher's distributions on disk: what it thought of every next token, to be learnt many times.

    index.json                    what it is, whose vocabulary, the shards
    shard-00000.safetensors ...   examples end to end
    README.md                     the format in words; docs/distillation.md has more

Of each example there are its tokens, which of them count, and for each counted token a row of
log-probabilities in float16: of the whole vocabulary, or of the k likeliest tokens with their ids.
64 symbols are 128 bytes a token; of a large vocabulary 50 ids and values are 300 (200 where ids fit
into 16 bits). Files are mapped, and an example is read by its number.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.safetensors_format import FileTensor, Outgoing, read_header, write_file
from qiusuo.data.atomic import disk_errors, sync
from qiusuo.data.atomic import write_file as write_text
from qiusuo.data.errors import DataError
from qiusuo.data.examples import Example
from qiusuo.data.tokenizer import Tokenizer

# Shapes: E examples, T tokens of all of them, N counted ones, V log-probabilities of each.

FORMAT = 1
SMALL_IDS = 1 << 15  # ids below fit into 16 bits with a sign, which safetensors has
NUMPY_TYPES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "F16": "<f2", "BOOL": "?"}
README = """\
# A teacher's distributions

Written by `qiusuo train` (stage `teach`). `index.json` names the teacher, its vocabulary and the
shards; each shard is a safetensors file:

- `offsets` I64 [examples + 1, 2]: where each example begins among the tokens, and among the counted
- `tokens` I32: the ids of all examples, end to end
- `ids` I32 or I16 [counted, k]: the likeliest tokens; missing where the whole vocabulary is stored
- `logprobs` F16 [counted, vocabulary or k]: natural logarithms, not below -100
- `counted` BOOL: whether a token is to be predicted. The first of an example never is

Row n of `logprobs` is about the counted token n: what the teacher expected in its place, having
read all before it.
"""


@dataclass(frozen=True, eq=False)
class TaughtExample(Example):
    """``logprobs_NV`` [counted tokens but the first, V] float16, and the ids they are of, or None
    where they are of the whole vocabulary."""

    logprobs_NV: np.ndarray = field(kw_only=True)
    ids_NV: np.ndarray | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class About:
    """``top``: how many tokens are stored, None for all of the vocabulary."""

    teacher: str
    vocabulary: str
    vocabulary_size: int
    top: int | None

    @property
    def ids_kind(self) -> str:
        return "I16" if self.vocabulary_size <= SMALL_IDS else "I32"


# -- writing ------------------------------------------------------------------------------


def write_shard(
    folder: Path, number: int, about: About, examples: Sequence[TaughtExample]
) -> dict[str, Any]:
    """One file, whole or not at all, in place of one of that number; its entry for the index.
    DataError where the disk refuses."""
    starts = list(accumulate((len(one.tokens) for one in examples), initial=0))
    rows = list(accumulate((len(one.logprobs_NV) for one in examples), initial=0))
    arrays = {
        "offsets": ("I64", np.array([starts, rows], "<i8").T),
        "tokens": ("I32", np.concatenate([np.array(one.tokens, "<i4") for one in examples])),
    }
    if about.top is not None:
        ids = [one.ids_NV for one in examples if one.ids_NV is not None]
        kind = about.ids_kind
        arrays["ids"] = (kind, np.concatenate(ids).astype(NUMPY_TYPES[kind]))
    arrays["logprobs"] = ("F16", np.concatenate([one.logprobs_NV for one in examples]))
    arrays["counted"] = ("BOOL", np.concatenate([np.array(one.counted) for one in examples]))
    digest = hashlib.sha256()
    outgoing = []
    for name, (kind, array) in arrays.items():
        whole = np.ascontiguousarray(array)
        digest.update(f"{name} {kind} {whole.shape} ".encode())
        digest.update(whole.data)
        piece = torch.from_numpy(whole)
        outgoing.append(Outgoing(name, kind, whole.shape, partial(list, [piece])))
    path = folder / f"shard-{number:05d}.safetensors"
    partial_path = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(partial_path, outgoing, lambda count: None)
        sync(partial_path)
        partial_path.replace(path)
        sync(folder)
    return {
        "file": path.name,
        "examples": len(examples),
        "tokens": starts[-1],
        "counted": rows[-1],
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }


def write_index(folder: Path, about: About, shards: Sequence[dict[str, Any]]) -> None:
    """Say which shards there are: with this, what is written so far can be read."""
    index = {
        "format": FORMAT,
        "teacher": about.teacher,
        "vocabulary": {"size": about.vocabulary_size, "fingerprint": about.vocabulary},
        "top": about.top,
        "shards": list(shards),
    }
    write_text(folder / "README.md", README.encode())
    write_text(folder / "index.json", (json.dumps(index, indent=1) + "\n").encode())


# -- reading ------------------------------------------------------------------------------


class Distributions:
    """The examples of a folder by number (an ``ExampleSource``), with what the teacher said."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        """DataError where there are none, where they are damaged (sizes; not every number is
        looked at), or of another vocabulary."""
        self.folder = Path(folder)
        self.about, entries = _read_index(self.folder)
        if self.about.vocabulary != tokenizer.fingerprint:
            raise DataError(
                f"vocabulary mismatch: {folder} is in the tokens of {self.about.teacher} "
                f"({self.about.vocabulary_size}, {self.about.vocabulary[:8]}), the student's are "
                f"others ({tokenizer.vocab_size}, {tokenizer.fingerprint[:8]}): give the student "
                "the teacher's tokenizer, or learn from the teacher's text with sft"
            )
        self._shards = [_Shard(self.folder, entry, self.about) for entry in entries]
        self._starts = list(accumulate((one.examples for one in self._shards), initial=0))
        self.length = self._starts[-1]
        together = [FORMAT, self.about.top, *(entry["sha256"] for entry in entries)]
        self.fingerprint = hashlib.sha256(json.dumps(together).encode()).hexdigest()

    def example(self, index: int) -> TaughtExample:
        """Its arrays are views of the files."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        shard = bisect_right(self._starts, index) - 1
        return self._shards[shard].example(index - self._starts[shard])


class _Shard:
    def __init__(self, folder: Path, entry: dict[str, Any], about: About) -> None:
        self.path = folder / entry["file"]
        try:
            held = read_header(self.path)
        except (OSError, CheckpointError) as error:
            raise DataError(f"{self.path} is missing or damaged ({error}): teach anew") from error
        self.examples = int(entry["examples"])
        tokens, rows = entry["tokens"], entry["counted"]
        wide = about.vocabulary_size if about.top is None else about.top
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {
            "offsets": ("I64", (self.examples + 1, 2)),
            "tokens": ("I32", (tokens,)),
            "logprobs": ("F16", (rows, wide)),
            "counted": ("BOOL", (tokens,)),
        }
        if about.top is not None:
            wanted["ids"] = (about.ids_kind, (rows, wide))
        found = {name: (tensor.kind, tensor.shape) for name, tensor in held.items()}
        if found != wanted:
            raise DataError(f"{self.path} holds {found}, the index says {wanted}: teach anew")
        arrays = {name: _mapped(tensor) for name, tensor in held.items()}
        self.offsets_E2 = np.array(arrays["offsets"])
        self.tokens_T, self.counted_T = arrays["tokens"], arrays["counted"]
        self.logprobs_NV, self.ids_NV = arrays["logprobs"], arrays.get("ids")

    def example(self, index: int) -> TaughtExample:
        (start, first), (end, last) = self.offsets_E2[index : index + 2].tolist()
        return TaughtExample(
            self.tokens_T[start:end].tolist(),
            self.counted_T[start:end].tolist(),
            f"{self.path} example {index}",
            logprobs_NV=self.logprobs_NV[first:last],
            ids_NV=None if self.ids_NV is None else self.ids_NV[first:last],
        )


def _mapped(tensor: FileTensor) -> np.ndarray:
    if not tensor.stored_bytes:
        return np.empty(tensor.shape, NUMPY_TYPES[tensor.kind])
    mapped = np.memmap(tensor.path, NUMPY_TYPES[tensor.kind], "r", tensor.offset, tensor.shape)
    return np.asarray(mapped)  # slices of the subclass are several times slower


def _read_index(folder: Path) -> tuple[About, list[dict[str, Any]]]:
    path = folder / "index.json"
    if not path.is_file():
        raise DataError(
            f"{folder} holds no distributions (no index.json): a stage of the kind teach writes "
            "them, to the folder distributions/NAME of its run"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise DataError(f"{path}: unknown format {index['format']!r}: need {FORMAT}")
        vocabulary = index["vocabulary"]
        about = About(index["teacher"], vocabulary["fingerprint"], vocabulary["size"], index["top"])
        entries = list(index["shards"])
        if not entries:
            raise DataError(f"{path} names no shards: let the stage that writes it go on")
        return about, entries
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): teach anew") from error
