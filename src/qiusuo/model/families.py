"""From a config.json, or a recipe's [model] table, to the config of the right family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qiusuo.model.checks import ConfigError
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig

FAMILIES: dict[str, type[ModelConfig]] = {
    model_type: family
    for family in (DeepseekConfig, DenseConfig)
    for model_type in family.MODEL_TYPES
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Read the dict of a Hugging Face config.json. Raises ConfigError on what is not built."""
    return _family(raw.get("model_type"), "config.json").from_hf(raw)


def config_from_file(path: str | Path) -> ModelConfig:
    """Read a config.json, or the one in a folder."""
    return config_from_hf(read_config_json(path))


def config_from_recipe(table: Mapping[str, Any]) -> ModelConfig:
    """Read a recipe's [model] table, by default a DeepSeek-V3's; every key must be known."""
    return _family(table.get("model_type", "deepseek_v3"), "[model]").from_recipe(table)


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The object in a config.json, or in the one in a folder."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is not there: expected a Hugging Face config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(raw).__name__}")
    return raw


def _family(model_type: Any, place: str) -> type[ModelConfig]:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{place}: model_type {model_type!r} is not one of {', '.join(FAMILIES)}; "
            "models of other architectures cannot be run here"
        )
    return FAMILIES[model_type]
