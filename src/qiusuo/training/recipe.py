"""A recipe: one TOML file that is a model's whole life, its architecture and its stages.

Everything a result depends on stands in it, with defaults filled in; the run folder keeps the
resolved form. A key that is not known is an error that names the nearest right one.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qiusuo.model.config import ModelConfig
from qiusuo.model.families import config_from_recipe


class RecipeError(ValueError):
    """A recipe that cannot be lived; the message names the key and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSection(Section):
    """Which tokenizer: trained on the corpora, or loaded from ``path``."""

    kind: Literal["bpe", "characters", "path"] = "bpe"
    vocab_size: int = Field(4096, ge=300)
    min_frequency: int = Field(1, ge=1)
    path: str | None = None

    @model_validator(mode="after")
    def path_where_needed(self) -> TokenizerSection:
        if (self.kind == "path") != (self.path is not None):
            raise ValueError("path is given where kind is 'path', and only there")
        return self

    def spec(self) -> dict[str, Any]:
        """What ``data.prepare`` reads."""
        if self.path is not None:
            return {"path": self.path}
        if self.kind == "characters":
            return {"kind": "characters", "min_frequency": self.min_frequency}
        return {"kind": "bpe", "vocab_size": self.vocab_size}


class CorpusEntry(Section):
    """``source``: a built-in or pulled corpus by name, or a file or folder of the user's own."""

    source: str
    weight: float = Field(1.0, gt=0)


class DataSection(Section):
    corpora: tuple[CorpusEntry, ...] = Field(min_length=1)
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    fill_in_the_middle: float = Field(0.0, ge=0, le=1)
    deduplicate: Literal["none", "exact", "near"] = "none"
    isolate_documents: bool = False

    @property
    def duplicate_threshold(self) -> float | None:
        """Similarity from which a document counts as a copy of an earlier one."""
        return {"none": None, "exact": 1.0, "near": 0.8}[self.deduplicate]


class OptimizerSection(Section):
    """``muon`` takes the matrices inside the blocks at ``learning_rate``, AdamW the rest at
    ``adamw_learning_rate``; with ``adamw`` AdamW takes all at ``adamw_learning_rate``."""

    kind: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(0.02, gt=0)
    adamw_learning_rate: float = Field(0.003, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)


class ScheduleSection(Section):
    """Warm-up, then constant with a linear decay at the end (wsd), or a cosine."""

    kind: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: int = Field(20, ge=0)
    decay_fraction: float = Field(0.3, ge=0, le=1)
    final_fraction: float = Field(0.0, ge=0, le=1)


class BalanceSection(Section):
    """V3 §2.1.2: the bias moves by ``bias_update_speed`` a step towards idle experts; the
    sequence-wise loss is weighted by ``sequence_weight``; V3's own values are the defaults."""

    bias_update_speed: float = Field(0.001, ge=0)
    sequence_weight: float = Field(0.0001, ge=0)


class SamplesSection(Section):
    """What the model writes, at every validation and at the end."""

    prompts: tuple[str, ...] = ()
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)


class PretrainStage(Section):
    """``batch_size`` sequences make one step, ``micro_batch_size`` of them one pass. ``minutes``
    shortens ``steps`` on a slow machine: the plan is made once, from the first steps' pace."""

    kind: Literal["pretrain"] = "pretrain"
    name: str = "pretrain"
    steps: int = Field(ge=1)
    minutes: float | None = Field(None, gt=0)
    sequence_length: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = False
    mtp_weight: float = Field(0.3, ge=0)
    checkpoint_steps: int = Field(200, ge=1)
    validation_steps: int = Field(0, ge=0)
    validation_tokens: int = Field(65536, ge=1)
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    balance: BalanceSection = BalanceSection()
    samples: SamplesSection = SamplesSection()

    @model_validator(mode="after")
    def whole_micro_batches(self) -> PretrainStage:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError("batch_size must be a multiple of micro_batch_size")
        if self.minutes is not None and self.schedule.kind != "wsd":
            raise ValueError("minutes needs the wsd schedule: a cosine must know its end at once")
        return self


class Recipe(Section):
    """``save_dtype``: the type of the finished model's weights. ``license`` and ``languages`` go
    onto the model card."""

    name: str = Field(pattern=r"^\w[\w .-]*$")
    description: str = ""
    license: str = "mit"
    languages: tuple[str, ...] = ()
    seed: int = 1
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    model: dict[str, Any]
    tokenizer: TokenizerSection = TokenizerSection()
    stages: tuple[PretrainStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def known_model_keys(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages share a name: {', '.join(names)}")
        context = self.model_for(vocab_size=1024).max_position_embeddings
        for stage in self.stages:
            if stage.sequence_length > context:
                raise ValueError(
                    f"stage {stage.name}: sequence_length {stage.sequence_length} is over the "
                    f"model's max_position_embeddings {context}"
                )
        return self

    def model_for(self, vocab_size: int, **special: Any) -> ModelConfig:
        """The model's config once the tokenizer is known."""
        stated = self.model.get("vocab_size", vocab_size)
        if special and stated != vocab_size:
            raise RecipeError(
                f"[model] vocab_size is {stated}, but the tokenizer has {vocab_size} tokens: "
                "leave vocab_size out, or give the tokenizer it belongs to"
            )
        return config_from_recipe({"vocab_size": vocab_size, **special, **self.model})

    def stage(self, name: str) -> PretrainStage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise RecipeError(f"no stage {name!r}{_nearest(name, names)}; there are {', '.join(names)}")


def built_in_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("qiusuo") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe, the user's own by path or a built-in one by name.

    ``overrides``: "a.b=c" with TOML values, stages by name or number.
    """
    path = Path(name_or_path)
    if not path.is_file():
        known = built_in_recipes()
        if str(name_or_path) not in known:
            near = _nearest(str(path), [*known, *(str(p) for p in path.parent.glob("*.toml"))])
            raise RecipeError(f"no recipe at {path}{near}; built in are {', '.join(known)}")
        path = known[str(name_or_path)]
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    for override in overrides or []:
        _override(table, override)
    return parse_recipe(table, where=str(path))


def parse_recipe(table: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe given as nested dicts, e.g. the resolved one of a run folder."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        lines = [_explain(table, dict(detail)) for detail in error.errors()]
        raise RecipeError("\n".join([f"{where}:", *(f"  {line}" for line in lines)])) from error


def _explain(table: Any, detail: dict[str, Any]) -> str:
    location = detail["loc"]
    key = ".".join(str(part) for part in location)
    if detail["type"] != "extra_forbidden":
        given = detail.get("input")
        shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
        return (
            f"{key}: {detail['msg'].removeprefix('Value error, ')}{shown}"
            if key
            else str(detail["msg"]).removeprefix("Value error, ")
        )
    known = _fields_at(location[:-1])
    return f"{key} is not a key{_nearest(str(location[-1]), known)}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """Field names of the section at this place of a recipe."""
    places: dict[str, type[Section]] = {
        "": Recipe,
        "tokenizer": TokenizerSection,
        "stages": PretrainStage,
        "data": DataSection,
        "corpora": CorpusEntry,
        "optimizer": OptimizerSection,
        "schedule": ScheduleSection,
        "balance": BalanceSection,
        "samples": SamplesSection,
    }
    names = [part for part in location if isinstance(part, str)]
    return list(places[names[-1] if names else ""].model_fields)


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: expected KEY=VALUE, e.g. stages.pretrain.steps=100")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    place: Any = table
    for part in path:
        place = _descend(place, part, key)
    if not isinstance(place, dict):
        raise RecipeError(f"--set {key}: {path[-1]!r} is not a section")
    place[last] = value


def _descend(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        for number, entry in enumerate(place):
            names = [str(number)]
            if isinstance(entry, dict):
                kind = entry.get("kind", "pretrain")
                names += [str(kind), str(entry.get("name", kind))]
            if part in names:
                return entry
        raise RecipeError(f"--set {key}: there is no stage {part!r}")
    if not isinstance(place, dict):
        raise RecipeError(f"--set {key}: {part!r} is not a section")
    return place.setdefault(part, {})
