"""What every family's config has in common, and how one is read and checked.

A config is a frozen dataclass, spelt as in Hugging Face's config.json. The families add what is
theirs (deepseek_config.py, dense_config.py); families.py picks the right one for a config.json.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from qiusuo.model.checks import (
    MOST_LAYERS,
    ConfigError,
    check_booleans,
    check_most,
    check_numbers,
    check_table,
    check_token_ids,
    nearest,
)
from qiusuo.model.rope_scaling import LlamaScaling, YarnScaling

# Keys of published config.json files that do not change what the network computes.
IGNORED_KEYS = frozenset(
    """_name_or_path architectures attention_dropout auto_map dtype id2label is_decoder label2id
    layer_types max_window_layers output_router_logits pad_token_id pretraining_tp
    quantization_config return_dict torch_dtype transformers_version use_cache tokenizer_class
    chunk_size_feed_forward is_encoder_decoder output_attentions output_hidden_states problem_type
    use_mrope""".split()
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes are numbers of elements. Abstract: a model's config is one of the families'."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ()
    # Keys whose other values would change the network in a way that is not built here.
    FIXED_KEYS: ClassVar[dict[str, tuple[Any, ...]]] = {"hidden_act": ("silu",)}
    # Keys without which a config.json says too little to be a model.
    NEEDED_KEYS: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    # Keys that this family ignores beside IGNORED_KEYS, and those whose null is a value.
    OTHER_KEYS: ClassVar[frozenset[str]] = frozenset()
    NULLABLE: ClassVar[tuple[str, ...]] = ("rope_scaling", "bos_token_id", "eos_token_id")
    # What a config.json that is silent means, for each model_type: as transformers reads it.
    SILENT: ClassVar[dict[str, dict[str, Any]]] = {}

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_nextn_predict_layers: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | LlamaScaling | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.model_type not in self.MODEL_TYPES:
            raise ConfigError(f"model_type {self.model_type!r} is not one of {self.MODEL_TYPES}")
        sizes = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
            max_position_embeddings"""
        check_numbers(self, sizes.split(), whole=True)
        check_numbers(self, ("num_nextn_predict_layers",), whole=True, least=0)
        check_numbers(self, ("rms_norm_eps", "rope_theta", "initializer_range"))
        check_booleans(self, ("tie_word_embeddings",))
        check_token_ids(self, ("bos_token_id", "eos_token_id"))
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        check_most("num_hidden_layers, with num_nextn_predict_layers,", layers, MOST_LAYERS)
        if not isinstance(self.rope_scaling, YarnScaling | LlamaScaling | None):
            raise ConfigError(f"rope_scaling must be a table, not {self.rope_scaling!r}")

    # -- what the parts of the network ask ------------------------------------------------

    @property
    def cache_parts(self) -> tuple[int, int]:
        """Widths of the two things a cache holds for one token in one layer."""
        raise NotImplementedError

    @property
    def cache_width(self) -> int:
        """Elements a cache holds for one token in one layer."""
        return sum(self.cache_parts)

    @property
    def cache_exact(self) -> int:
        """How many of a cached row's elements, the last ones, no cache may round to int8."""
        return 0

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that RoPE turns."""
        raise NotImplementedError

    @property
    def head_widths(self) -> tuple[int, int]:
        """Elements of one head's query (and key), and of its value."""
        raise NotImplementedError

    @property
    def softmax_scale(self) -> float:
        return self.head_widths[0] ** -0.5

    def is_moe_layer(self, layer: int) -> bool:
        return False

    # -- config.json and recipes ----------------------------------------------------------

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Self:
        """Read the dict of a Hugging Face config.json. Raises ConfigError on what is not built."""
        raw = dict(raw)
        missing = [key for key in cls.NEEDED_KEYS if raw.get(key) is None]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        for key, allowed in cls.FIXED_KEYS.items():
            if key in raw and raw.pop(key) not in allowed:
                raise ConfigError(f"{key} must be {allowed[0]!r}: other values are not supported")
        read_rope(raw)
        if isinstance(raw.get("eos_token_id"), list):
            raw["eos_token_id"] = tuple(raw["eos_token_id"])
        known = {field.name for field in fields(cls)}
        unused = sorted(set(raw) - known - IGNORED_KEYS - cls.OTHER_KEYS)
        if unused:
            listed = ", ".join(key if key.isprintable() else repr(key) for key in unused)
            warnings.warn(f"config.json keys not used here: {listed}", stacklevel=3)
        said = {k: v for k, v in raw.items() if k in known and (v is not None or k in cls.NULLABLE)}
        return cls(**(cls.SILENT[raw["model_type"]] | said))

    def to_hf(self) -> dict[str, Any]:
        """The dict to write as config.json: what the family's own files say, nothing implied."""
        raw = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.rope_scaling is not None:
            raw["rope_scaling"] = self.rope_scaling.to_hf()
        if isinstance(raw["eos_token_id"], tuple):
            raw["eos_token_id"] = list(raw["eos_token_id"])
        return raw | {"hidden_act": "silu"}

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> Self:
        """Read a recipe's [model] table; an unknown key is an error with the nearest right one."""
        known = {field.name for field in fields(cls)}
        for key in table:
            if key not in known:
                raise ConfigError(f"[model] has no key {key!r}{nearest(key, known)}")
        table = dict(table)
        if isinstance(table.get("rope_scaling"), dict):
            table["rope_scaling"] = read_scaling(table["rope_scaling"], strict=True)
        if isinstance(table.get("eos_token_id"), list):
            table["eos_token_id"] = tuple(table["eos_token_id"])
        try:
            return cls(**table)
        except TypeError as error:  # a size that has no default
            raise ConfigError(f"[model] says too little: {error}") from error


# -- RoPE ---------------------------------------------------------------------------------

_SCALINGS = {"yarn": YarnScaling, "llama3": LlamaScaling}
# Values inside rope_scaling that are built, for keys that are no field of ours.
_FIXED_ROPE_KEYS: dict[str, tuple[Any, ...]] = {
    "attention_factor": (None,),
    "partial_rotary_factor": (1, None),
    "truncate": (True, None),
}
_OTHER_ROPE_KEYS = frozenset(("type", "rope_type", "rope_theta"))


def read_rope(raw: dict[str, Any]) -> None:
    """Fold transformers 5's ``rope_parameters`` and the older ``rope_scaling`` into ours."""
    parameters = raw.pop("rope_parameters", None)
    scaling = raw.pop("rope_scaling", None)
    check_table("rope_parameters", parameters)
    check_table("rope_scaling", scaling)
    if parameters is not None:
        raw["rope_theta"] = parameters.get("rope_theta", raw.get("rope_theta", 10000.0))
        plain = {} if "type" in parameters else {"rope_type": "default"}
        scaling = scaling or plain | dict(parameters)
    raw["rope_scaling"] = read_scaling(scaling) if scaling else None


def read_scaling(
    table: Mapping[str, Any], strict: bool = False
) -> YarnScaling | LlamaScaling | None:
    """``strict``: an unknown key is an error, as in a recipe, and not only a warning."""
    kind = table.get("rope_type", table.get("type", "yarn"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ConfigError(
            f"rope_scaling type {kind!r} is not supported; expected {' or '.join(_SCALINGS)}"
        )
    known = {field.name for field in fields(_SCALINGS[kind])}
    for key, allowed in _FIXED_ROPE_KEYS.items():
        if table.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"rope_scaling.{key} {table[key]!r} is not supported; leave it out")
    for key in sorted(set(table) - known - set(_FIXED_ROPE_KEYS) - _OTHER_ROPE_KEYS):
        message = f"rope_scaling has no key {key!r}{nearest(key, known)}"
        if strict:
            raise ConfigError(message)
        warnings.warn(message, stacklevel=5)
    said = {key: value for key, value in table.items() if key in known and value is not None}
    try:
        return _SCALINGS[kind](**said)
    except TypeError as error:
        raise ConfigError(f"rope_scaling: {error}") from error
