"""The one tokenizer of a run: its base's, a given one, or learnt from what its stages read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from qiusuo.data.cache import cache_folder
from qiusuo.data.corpora import open_corpus
from qiusuo.data.errors import DataError
from qiusuo.data.json_lines import read_records
from qiusuo.data.prepare import PreparedData, prepare_corpus
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.training.beginning import open_base
from qiusuo.training.given_tasks import vocabulary_texts
from qiusuo.training.recipe import Recipe, RecipeError
from qiusuo.training.stages import PretrainStage


def run_tokenizer(recipe: Recipe, kept: Path) -> Tokenizer:
    """The run's tokenizer, which lies in its folder at ``kept`` once it is made."""
    first = recipe.stages[0]
    if _learnt_by_first_stage(recipe):
        assert isinstance(first, PretrainStage)
        return prepare(recipe, first, kept).tokenizer
    if kept.exists():
        return Tokenizer.load(kept)
    tokenizer = _made(recipe)
    tokenizer.save(kept)
    return tokenizer


def prepare(recipe: Recipe, stage: PretrainStage, kept: Path | None = None) -> PreparedData:
    """The stage's corpora as token shards, made once and kept in the cache."""
    data = stage.data
    own = kept is None or (stage is recipe.stages[0] and _learnt_by_first_stage(recipe))
    prepared = prepare_corpus(
        [(entry.source, entry.weight) for entry in data.corpora],
        recipe.tokenizer.spec() if own else {"path": str(kept)},
        cache_folder() / "prepared" / f"{recipe.name}-{stage.name}-{_digest(recipe, stage)}",
        validation_fraction=data.validation_fraction,
        deduplicate=data.duplicate_threshold,
        fim_rate=data.fill_in_the_middle,
        seed=recipe.seed,
        progress=print,
    )
    if kept is None:
        return prepared
    if not kept.exists():
        prepared.tokenizer.save(kept)
    elif Tokenizer.load(kept).fingerprint != prepared.tokenizer.fingerprint:
        raise DataError(
            f"vocabulary mismatch: the text of stage {stage.name} now makes another tokenizer than "
            f"the one of this run ({kept}); restore the text, or start a new run"
        )
    return prepared


def _learnt_by_first_stage(recipe: Recipe) -> bool:
    """From the training part of the first stage's corpora alone. Bytes are in every BPE, so only a
    vocabulary of characters has to see what later stages read."""
    later = any(hasattr(s, key) for s in recipe.stages for key in ("sources", "tasks"))
    characters = recipe.tokenizer.kind == "characters"
    text_first = isinstance(recipe.stages[0], PretrainStage)
    return recipe.base is None and text_first and not (characters and later)


def _made(recipe: Recipe) -> Tokenizer:
    settings = recipe.tokenizer
    if recipe.base is not None:
        tokenizer = open_base(recipe.base).read_tokenizer()
        if tokenizer is None:
            raise RecipeError(f"base {recipe.base} has no tokenizer.json: it cannot be trained")
        return tokenizer
    if settings.path is not None:
        return Tokenizer.load(settings.path)
    texts = _texts(recipe)
    if settings.kind == "bpe":
        return Tokenizer.train_bpe(texts, settings.vocab_size)
    return Tokenizer.train_characters(texts, settings.min_frequency)


def _texts(recipe: Recipe) -> Iterator[str]:
    """What the stages read: every corpus once, the rest often enough for ``min_frequency``."""
    few: list[str] = []
    corpora: list[str] = []
    entries = [*recipe.evaluation.tasks, *recipe.evaluation.answers]
    for stage in recipe.stages:
        if isinstance(stage, PretrainStage):
            corpora += [corpus.source for corpus in stage.data.corpora]
            continue
        entries += getattr(stage, "tasks", ())
        for source in getattr(stage, "sources", ()):
            if (task := getattr(source, "task", None)) is not None:
                entries.append(task)
            if (file := getattr(source, "file", None)) is not None:
                few += chain.from_iterable(_words(record) for _, record in read_records(file))
    corpora += [entry.corpus for entry in entries if entry.corpus is not None]
    for corpus in dict.fromkeys(corpora):
        yield from open_corpus(corpus).documents()
    few += vocabulary_texts(entries, recipe.ask.text)
    few.append(recipe.ask.system or "")
    yield from chain.from_iterable(repeat(few, recipe.tokenizer.min_frequency))


def _words(value: Any) -> Iterator[str]:
    """Every text in what JSON holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _words(inner)


def _digest(recipe: Recipe, stage: PretrainStage) -> str:
    """Tells apart the tokens of recipes that share a name."""
    settings = [recipe.seed, recipe.tokenizer.model_dump(), stage.data.model_dump()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
