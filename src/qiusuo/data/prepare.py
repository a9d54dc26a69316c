"""From the names of corpora to tokens that a loader can read, once.

    FOLDER/tokenizer/                 the vocabulary, learnt from the training text or loaded
    FOLDER/train/0-tang-poems/        shards, one folder a corpus
    FOLDER/validation/0-tang-poems/
    FOLDER/prepared.json              what all this was made from

A second call with the same text and settings finds the folder whole and only opens it; another
tokenizer, seed or text makes it anew, and the old one goes when the new one is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qiusuo.data.atomic import new_folder, write_file
from qiusuo.data.corpora import Corpus, open_corpus
from qiusuo.data.deduplicate import ExactDuplicates, NearDuplicates
from qiusuo.data.errors import DataError, unknown
from qiusuo.data.shards import Shards, write_shards
from qiusuo.data.split import Split, split_corpus
from qiusuo.data.tokenizer import Tokenizer

FORMAT = 1
RECORD = "prepared.json"
Progress = Callable[[str], None]
"""Called with a line of text as each step begins."""


@dataclass(frozen=True)
class PreparedData:
    """A vocabulary, and the shards to train on (with weights) and to validate on."""

    tokenizer: Tokenizer
    train: list[tuple[Shards, float]]
    validation: list[Shards]


@dataclass(frozen=True)
class _Settings:
    """What, beside the corpora and the tokenizer, decides the tokens."""

    validation_fraction: float
    deduplicate: float | None
    fim_rate: float
    seed: int


def prepare_corpus(
    corpora: Sequence[tuple[str | Path, float]],
    tokenizer: Mapping[str, Any],
    folder: str | Path,
    *,
    validation_fraction: float = 0.1,
    deduplicate: float | None = None,
    fim_rate: float = 0.0,
    seed: int = 0,
    field: str = "text",
    progress: Progress | None = None,
) -> PreparedData:
    """Split, tokenise and store corpora, given as (name or path, weight).

    `tokenizer` is {"kind": "bpe", "vocab_size": 4096}, {"kind": "characters", "min_frequency": 1}
    or {"path": "..."}. `deduplicate` is the Jaccard similarity from which a document counts as a
    copy of an earlier one, across all corpora; 1.0 drops exact copies only, None nothing. Fill in
    the middle is applied to training text alone. With a `validation_fraction` of 0 there is no
    validation.
    """
    folder = Path(folder)
    say = progress or (lambda line: None)
    spec = _check_spec(tokenizer)
    if not corpora:
        raise DataError("no corpus to prepare: give a list of (name or path, weight)")
    settings = _Settings(validation_fraction, deduplicate, fim_rate, seed)
    opened = [open_corpus(name, field=field) for name, _ in corpora]
    loaded = Tokenizer.load(spec["path"]) if "path" in spec else None
    record = {
        "format": FORMAT,
        "corpora": [[corpus.name, corpus.fingerprint] for corpus in opened],
        "tokenizer": {"fingerprint": loaded.fingerprint} if loaded else dict(spec),
        **asdict(settings),
    }
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    if _saved_key(folder) != key:
        say(f"preparing {', '.join(corpus.name for corpus in opened)} in {folder}")
        with new_folder(folder, replace=True) as partial:
            _prepare(opened, loaded, spec, partial, settings, say)
            content = json.dumps({"key": key, **record}, ensure_ascii=False, indent=2) + "\n"
            write_file(partial / RECORD, content.encode())
    return _open(folder, [corpus.name for corpus in opened], [weight for _, weight in corpora])


def _prepare(
    corpora: list[Corpus],
    loaded: Tokenizer | None,
    spec: Mapping[str, Any],
    folder: Path,
    settings: _Settings,
    say: Progress,
) -> None:
    keep = _keeper(settings.deduplicate)
    splits = []
    for corpus in corpora:
        split = split_corpus(
            corpus,
            validation_fraction=settings.validation_fraction,
            seed=settings.seed,
            keep=keep,
        )
        say(f"{corpus.name}: {len(split.side_N)} documents, {split.dropped} dropped as copies")
        splits.append(split)
    if loaded is None:
        say("learning the vocabulary from the training text")
    tokenizer = loaded or _train(spec, (text for split in splits for text in split.train()))
    tokenizer.save(folder / "tokenizer")
    for name, split in zip(_folder_names([c.name for c in corpora]), splits, strict=True):
        _write(split, tokenizer, folder, name, settings, say)


def _write(
    split: Split,
    tokenizer: Tokenizer,
    folder: Path,
    name: str,
    settings: _Settings,
    say: Progress,
) -> None:
    sides = [("train", split.train, settings.fim_rate)]
    if settings.validation_fraction > 0:
        sides.append(("validation", split.validation, 0.0))
    for side, documents, fim_rate in sides:
        shards = write_shards(
            documents(),
            tokenizer,
            folder / side / name,
            fim_rate=fim_rate,
            seed=settings.seed,
            corpus_fingerprint=split.corpus.fingerprint,
        )
        say(f"{side}/{name}: {shards.documents} documents, {shards.tokens} tokens")


def _open(folder: Path, names: list[str], weights: list[float]) -> PreparedData:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    folders = _folder_names(names)
    return PreparedData(
        tokenizer,
        [
            (Shards.open(folder / "train" / name, tokenizer), weight)
            for name, weight in zip(folders, weights, strict=True)
        ],
        [
            Shards.open(folder / "validation" / name, tokenizer)
            for name in folders
            if (folder / "validation" / name).is_dir()
        ],
    )


def _folder_names(names: list[str]) -> list[str]:
    return [f"{number}-{name}" for number, name in enumerate(names)]


def _keeper(threshold: float | None) -> Callable[[str], bool] | None:
    if threshold is None:
        return None
    exact = ExactDuplicates()
    if threshold == 1:
        return exact.keep
    near = NearDuplicates(threshold)
    return lambda text: exact.keep(text) and near.keep(text)


def _train(spec: Mapping[str, Any], documents: Iterator[str]) -> Tokenizer:
    if spec["kind"] == "bpe":
        return Tokenizer.train_bpe(documents, spec["vocab_size"])
    return Tokenizer.train_characters(documents, spec["min_frequency"])


def _check_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer asked for, with defaults filled in; `DataError` for a wrong key or kind."""
    if "path" in spec:
        known = {"path": ""}
    else:
        kinds: dict[str, dict[str, Any]] = {
            "bpe": {"kind": "bpe", "vocab_size": None},
            "characters": {"kind": "characters", "min_frequency": 1},
        }
        kind = spec.get("kind")
        if kind not in kinds:
            raise unknown("kind of tokenizer", str(kind), kinds)
        known = kinds[kind]
    for key in spec:
        if key not in known:
            raise unknown("tokenizer setting", key, known)
    filled = {**known, **spec}
    if filled.get("vocab_size", 0) is None:
        raise DataError('a tokenizer of kind "bpe" needs a vocab_size, such as 4096')
    return filled


def _saved_key(folder: Path) -> str | None:
    """The key a folder was prepared under; None for a new one, `DataError` for someone else's."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        return str(json.loads((folder / RECORD).read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} holds something else than prepared data: choose another folder"
        ) from error
