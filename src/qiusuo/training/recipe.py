"""A recipe: one TOML file that is a model's whole life, its architecture and its stages.

Everything a result depends on stands in it, with defaults filled in; the run folder keeps the
resolved form. A key that is not known is an error that names the nearest right one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from qiusuo.model.checks import ConfigError
from qiusuo.model.config import ModelConfig
from qiusuo.model.extension import extended
from qiusuo.model.families import config_from_recipe
from qiusuo.training.sections import (
    AdapterSection,
    AskSection,
    EvaluationSection,
    Section,
    TokenizerSection,
)
from qiusuo.training.stages import STAGES, Stage, stage_named

Place = tuple[str | int, ...]  # of a key in a recipe: ("stages", 0, "steps")


class RecipeError(ValueError):
    """A recipe that cannot be lived; the message names the key and the remedy."""


class Recipe(Section):
    """``base``: a checkpoint to begin from, by path or name, instead of ``model`` and
    ``tokenizer``. ``save_dtype``: the type of the finished model's weights. ``license``, which a
    recipe with ``base`` must say, and ``languages`` go onto the model card."""

    name: str = Field(pattern=r"^\w[\w .-]*$")
    description: str = ""
    license: str = "mit"
    languages: tuple[str, ...] = ()
    seed: int = 1
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    base: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    tokenizer: TokenizerSection = TokenizerSection()
    adapter: AdapterSection | None = None
    ask: AskSection = AskSection()
    evaluation: EvaluationSection = EvaluationSection()
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def one_beginning(self) -> Recipe:
        if (self.base is None) == (not self.model):
            raise ValueError("give either [model], a new model, or base, one to begin from")
        if self.base is not None and "tokenizer" in self.model_fields_set:
            given = self.tokenizer != TokenizerSection()
            if given:
                raise ValueError("base has its own tokenizer: leave [tokenizer] out")
        if self.base is not None and "license" not in self.model_fields_set:
            raise ValueError(
                f"give license: with base it is the one that {self.base} is under, whose weights "
                "go on in the new ones"
            )
        return self

    @model_validator(mode="after")
    def stages_fit(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages share a name: {', '.join(names)}")
        for number, stage in enumerate(self.stages):
            for key, other in earlier_stages(stage):
                if other not in names[:number]:
                    raise ValueError(
                        f"stage {stage.name}: {key} names {other!r}, which is no earlier stage"
                    )
                if not _leaves(self.stages[names.index(other)], key):
                    raise ValueError(
                        f"stage {stage.name}: {key} names {other!r}, a stage that leaves no {key}"
                    )
        if self.base is None:
            self.check_contexts(self.model_for(vocab_size=1024))
        return self

    def check_contexts(self, config: ModelConfig) -> None:
        """ConfigError, with the stage's name, where what the recipe begins with cannot be extended
        as a stage asks for, or does not reach as far as its sequences."""
        for stage in self.stages:
            try:
                context = self.config_of(stage.name, config).max_position_embeddings
            except ConfigError as error:
                raise ConfigError(f"stage {stage.name}: {error}") from error
            length = getattr(stage, "sequence_length", 0)
            if length > context:
                remedy = "extend can make it longer"
                if getattr(stage, "extend", None) is not None:
                    remedy = (
                        "so far its extend takes it: raise the factor, or shorten the sequences"
                    )
                raise ConfigError(
                    f"stage {stage.name}: sequence_length {length} is over the model's "
                    f"max_position_embeddings {context}; {remedy}"
                )

    def config_of(self, stage: str, config: ModelConfig) -> ModelConfig:
        """The config of a stage's model, from the one that the recipe begins with: the stage itself
        or one that it goes on from may have extended the context."""
        names = [one.name for one in self.stages]
        place, asked = names.index(stage), []
        while place >= 0:
            here = self.stages[place]
            asked.append(getattr(here, "extend", None))
            start_from = getattr(here, "start_from", None)
            place = place - 1 if start_from is None else names.index(start_from)
        for extend in reversed([one for one in asked if one is not None]):
            config = extended(config, **extend.model_dump())
        return config

    def model_for(self, vocab_size: int, **special: Any) -> ModelConfig:
        """The model's config once the tokenizer is known."""
        stated = self.model.get("vocab_size", vocab_size)
        if special and stated != vocab_size:
            raise RecipeError(
                f"[model] vocab_size is {stated}, but the tokenizer has {vocab_size} tokens: "
                "leave vocab_size out, or give the tokenizer it belongs to"
            )
        return config_from_recipe({"vocab_size": vocab_size, **special, **self.model})

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise RecipeError(f"no stage {name!r}{_nearest(name, names)}; there are {', '.join(names)}")


def earlier_stages(stage: Stage) -> list[tuple[str, str]]:
    """(key, name) of every earlier stage whose result a stage asks for."""
    asked = [("start_from", getattr(stage, "start_from", None))]
    asked += [
        (key, getattr(source, key, None))
        for source in getattr(stage, "sources", ())
        for key in ("traces", "taught", "pairs")
    ]
    models = [getattr(stage, "model", None)]
    models += [one.model for key in ("teachers", "models") for one in getattr(stage, key, ())]
    asked += [("model", stage_named(model)) for model in models]
    return [(key, name) for key, name in asked if name is not None]


def _leaves(stage: Stage, key: str) -> bool:
    """Whether a stage leaves behind what another asks of it under this key."""
    if key in ("traces", "pairs"):
        return stage.kind == "sample" and stage.pairs == (key == "pairs")
    return stage.kind == "teach" if key == "taught" else True


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
    typed = dict(_override(table, override) for override in overrides or [])
    return parse_recipe(table, where=str(path), typed=typed)


def parse_recipe(
    table: dict[str, Any],
    where: str = "recipe",
    typed: Mapping[Place, str] | None = None,
) -> Recipe:
    """Check a recipe given as nested dicts, e.g. the resolved one of a run folder. ``typed``: keys
    of it that came by --set, by their places, as they were typed: what is wrong there is no fault
    of ``where``."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        by_set: list[str] = []
        by_file: list[str] = []
        places = [_place_of(dict(detail)) for detail in error.errors()]
        for detail, location in zip(error.errors(), places, strict=True):
            size = len(location)
            inner = any(len(place) > size and place[:size] == location for place in places)
            if detail["type"] == "too_short" and inner:
                continue  # there are entries; the one that is wrong is told of
            key, was_typed = _as_typed(location, typed or {})
            line = _explain(table, dict(detail), key)
            (by_set if was_typed else by_file).append(line)
        if by_file:
            given = ", ".join((typed or {}).values())
            by_file = [f"{where}{f' with --set {given}' if given else ''}:"] + [
                f"  {line}" for line in by_file
            ]
        raise RecipeError("\n".join([*(f"--set {line}" for line in by_set), *by_file])) from error


def _as_typed(location: Place, typed: Mapping[Place, str]) -> tuple[str, bool]:
    """A place of the recipe in words, with the names of a --set that goes there or through it; and
    whether what stands there came by it."""
    for place, key in typed.items():
        if location[: len(place)] == place:
            return ".".join([key, *(str(part) for part in location[len(place) :])]), True
    for place, key in typed.items():
        if location and place[: len(location)] == location:
            return ".".join(key.split(".")[: len(location)]), False
    return ".".join(str(part) for part in location), False


def _place_of(detail: dict[str, Any]) -> Place:
    location = _without_tags(detail["loc"])
    return (*location, "kind") if detail["type"] == "union_tag_invalid" else location


def _explain(table: Any, detail: dict[str, Any], key: str) -> str:
    """What is wrong with a value, which stands at ``key`` for people."""
    location = _without_tags(detail["loc"])
    if detail["type"] == "union_tag_invalid":
        kind = detail["ctx"]["tag"]
        return f"{key}: {kind!r} is none of {', '.join(STAGES)}{_nearest(kind, list(STAGES))}"
    if detail["type"] != "extra_forbidden":
        given = detail.get("input")
        shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
        return (
            f"{key}: {detail['msg'].removeprefix('Value error, ')}{shown}"
            if key
            else str(detail["msg"]).removeprefix("Value error, ")
        )
    known = _fields_at(table, location[:-1])
    return f"{key} is not a key{_nearest(str(location[-1]), known)}"


def _without_tags(location: tuple[Any, ...]) -> tuple[Any, ...]:
    """pydantic tells the kind of a stage behind its number."""
    if len(location) > 2 and location[0] == "stages":
        return (*location[:2], *location[3:])
    return location


def _fields_at(table: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names of the section at this place of a recipe."""
    section: type[Section] = Recipe
    for number, part in enumerate(location):
        if part == "stages":
            kind = table["stages"][location[number + 1]].get("kind", "pretrain")
            section = STAGES[kind]
        elif isinstance(part, str):
            section = _section_of(section.model_fields[part])
    return list(section.model_fields)


def _section_of(field: FieldInfo) -> type[Section]:
    """The section that a field holds, one or many of it, or none."""
    waiting: list[Any] = [field.annotation]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
        waiting += get_args(annotation)
    raise TypeError(f"{field.annotation} is no section")


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _override(table: dict[str, Any], override: str) -> tuple[Place, str]:
    """Set what "a.b=c" says; the place of the key in the table, and the key as it was typed."""
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: expected KEY=VALUE, e.g. stages.pretrain.steps=100")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    place: Any = table
    location: list[str | int] = []
    for part in path:
        inner = _descend(place, part, key)
        location.append(part if isinstance(place, dict) else place.index(inner))
        place = inner
    if not isinstance(place, dict):
        raise RecipeError(f"--set {key}: {path[-1]!r} is not a section")
    place[last] = value
    return (*location, last), key.strip()


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
