"""The shape of a model: one frozen, validated dataclass, spelt as in Hugging Face's config.json.

Two published families share it. They differ in the router only:

- ``deepseek_v3`` (V3, R1, V3.1): sigmoid scores, a group's score is the sum of its two best,
  a learned-by-rule bias that takes part in the choice, chosen scores normalised to sum to one.
- ``deepseek_v2`` (V2-Lite, V2): softmax scores, a group's score is its best, no bias, no
  normalisation.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_TYPES = ("deepseek_v3", "deepseek_v2")
ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}

# Keys of published config.json files that do not change what the network computes.
_IGNORED_HF_KEYS = frozenset(
    """_name_or_path architectures attention_dropout auto_map aux_loss_alpha dtype ep_size
    head_dim id2label is_decoder label2id num_experts num_key_value_heads num_local_experts
    output_router_logits pad_token_id pretraining_tp qk_head_dim quantization_config
    return_dict seq_aux torch_dtype transformers_version use_cache
    tokenizer_class chunk_size_feed_forward is_encoder_decoder output_attentions
    output_hidden_states problem_type""".split()
)
# Keys whose other values would change the network in a way that is not built here.
_FIXED_HF_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, None),
}
# The same inside rope_scaling; the other keys that may stand there are YarnScaling's and these.
_FIXED_ROPE_KEYS: dict[str, tuple[Any, ...]] = {
    "attention_factor": (None,),
    "partial_rotary_factor": (1, None),
    "truncate": (True, None),
}
_OTHER_ROPE_KEYS = frozenset(("type", "rope_type", "rope_theta"))


class ConfigError(ValueError):
    """A configuration that cannot be a model; the message names the key and the remedy."""


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv:2309.00071), as DeepSeek configures it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self, "rope_scaling.", ("original_max_position_embeddings",), whole=True)
        _check_numbers(self, "rope_scaling.", ("factor", "beta_fast", "beta_slow"))
        _check_numbers(self, "rope_scaling.", ("mscale", "mscale_all_dim"), least=0)

    def magnitude(self, mscale: float) -> float:
        """``0.1·mscale·ln(factor) + 1``; 1 where nothing is extended or mscale is absent."""
        if self.factor <= 1 or mscale == 0:
            return 1.0
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes are numbers of elements. ``q_lora_rank=None`` means one full query projection."""

    model_type: str = "deepseek_v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    num_nextn_predict_layers: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_experts(self)

    # -- what follows from the sizes ------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def scoring_func(self) -> str:
        return "sigmoid" if self.model_type == "deepseek_v3" else "softmax"

    @property
    def cache_width(self) -> int:
        """Elements the latent cache holds for one token in one layer: latent + rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/√qk_head_dim, times YaRN's squared magnitude (DeepSeek-V2 §2.1.4 and released code)."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None:
            scale *= self.rope_scaling.magnitude(self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def is_moe_layer(self, layer: int) -> bool:
        """The first layers are dense; MTP modules count on from ``num_hidden_layers``."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    # -- config.json ----------------------------------------------------------------------

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read the dict of a Hugging Face config.json. Raises ConfigError on what is not built."""
        raw = dict(raw)
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}; "
                "point to a DeepSeek-V2 or DeepSeek-V3 style config.json"
            )
        for key, allowed in _FIXED_HF_KEYS.items():
            if key in raw and raw.pop(key) not in allowed:
                raise ConfigError(f"{key} must be {allowed[0]!r}: other values are not supported")
        _check_router_method(raw, model_type)
        _read_rope(raw)
        if "num_mtp_layers" in raw:
            raw.setdefault("num_nextn_predict_layers", raw.pop("num_mtp_layers"))
        for key, none in _NONE_MEANS.items():
            if key in raw:
                raw[key] = raw[key] or none
        if isinstance(raw.get("eos_token_id"), list):
            raw["eos_token_id"] = tuple(raw["eos_token_id"])
        defaults = _HF_DEFAULTS[model_type]
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(raw) - fields - _IGNORED_HF_KEYS)
        if unknown:
            warnings.warn(f"config.json keys not used here: {', '.join(unknown)}", stacklevel=2)
        said = {k: v for k, v in raw.items() if k in fields and (v is not None or k in _NULLABLE)}
        return cls(**{**defaults, **said})

    def to_hf(self) -> dict[str, Any]:
        """The dict to write as config.json: what DeepSeek's own files say, nothing implied."""
        raw = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        scaling = raw["rope_scaling"]
        raw["rope_scaling"] = scaling and {"type": "yarn", **dataclasses.asdict(scaling)}
        if isinstance(raw["eos_token_id"], tuple):
            raw["eos_token_id"] = list(raw["eos_token_id"])
        grouped = self.n_group > 1
        raw |= {
            "architectures": [ARCHITECTURES[self.model_type]],
            "num_key_value_heads": self.num_attention_heads,
            "scoring_func": self.scoring_func,
            "topk_method": "noaux_tc"
            if self.model_type == "deepseek_v3"
            else ("group_limited_greedy" if grouped else "greedy"),
            "hidden_act": "silu",
            "attention_bias": False,
            "moe_layer_freq": 1,
        }
        return raw

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a config.json, or the one in a folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} is not there: expected a Hugging Face config.json")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        return cls.from_hf(raw)

    @classmethod
    def from_recipe(cls, table: dict[str, Any]) -> ModelConfig:
        """Read a recipe's [model] table; an unknown key is an error with the nearest right one."""
        fields = {field.name for field in dataclasses.fields(cls)}
        for key in table:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"[model] has no key {key!r}{hint}")
        table = dict(table)
        if isinstance(table.get("rope_scaling"), dict):
            table["rope_scaling"] = _yarn(table["rope_scaling"], strict=True)
        if table.get("q_lora_rank") == 0:  # TOML has no null
            table["q_lora_rank"] = None
        if isinstance(table.get("eos_token_id"), list):
            table["eos_token_id"] = tuple(table["eos_token_id"])
        return cls(**table)


# What DeepSeek's own classes assume where a config.json is silent; V3's are ModelConfig's.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "deepseek_v2": {
        "n_routed_experts": 0,
        "n_shared_experts": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
    },
}
# What null (or zero groups) says there. Elsewhere null is the default, but for these fields.
_NONE_MEANS = {
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 0,
    "n_group": 1,
    "topk_group": 1,
}
_NULLABLE = ("q_lora_rank", "rope_scaling", "bos_token_id", "eos_token_id")


def _read_rope(raw: dict[str, Any]) -> None:
    """Fold transformers 5's ``rope_parameters`` and the older ``rope_scaling`` into ours."""
    parameters = raw.pop("rope_parameters", None)
    scaling = raw.pop("rope_scaling", None)
    if parameters is not None:
        raw["rope_theta"] = parameters.get("rope_theta", raw.get("rope_theta", 10000.0))
        scaling = scaling or parameters
    raw["rope_scaling"] = _yarn(scaling) if scaling else None


def _yarn(table: dict[str, Any], strict: bool = False) -> YarnScaling | None:
    """``strict``: an unknown key is an error, as in a recipe, and not only a warning."""
    kind = table.get("rope_type", table.get("type", "yarn"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"rope_scaling type {kind!r} is not supported; expected 'yarn'")
    fields = {field.name for field in dataclasses.fields(YarnScaling)}
    for key, allowed in _FIXED_ROPE_KEYS.items():
        if table.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"rope_scaling.{key} {table[key]!r} is not supported; leave it out")
    for key in sorted(set(table) - fields - set(_FIXED_ROPE_KEYS) - _OTHER_ROPE_KEYS):
        near = difflib.get_close_matches(key, fields, 1)
        message = f"rope_scaling has no key {key!r}" + (
            f"; did you mean {near[0]!r}?" if near else ""
        )
        if strict:
            raise ConfigError(message)
        warnings.warn(message, stacklevel=4)
    said = {key: value for key, value in table.items() if key in fields and value is not None}
    try:
        return YarnScaling(**said)
    except TypeError as error:
        raise ConfigError(f"rope_scaling: {error}") from error


def _check_router_method(raw: dict[str, Any], model_type: str) -> None:
    expected = {
        "deepseek_v3": ("sigmoid", ("noaux_tc",)),
        "deepseek_v2": ("softmax", ("greedy", "group_limited_greedy")),
    }[model_type]
    scoring, method = raw.pop("scoring_func", None), raw.pop("topk_method", None)
    if scoring not in (None, expected[0]):
        raise ConfigError(f"scoring_func {scoring!r}: a {model_type} router uses {expected[0]!r}")
    if method not in (None, *expected[1]):
        raise ConfigError(f"topk_method {method!r}: a {model_type} router uses {expected[1]}")
    if method == "greedy":  # the groups of a greedy router are never looked at
        raw["n_group"] = raw["topk_group"] = 1


def _check_numbers(
    holder: Any, prefix: str, keys: Iterable[str], whole: bool = False, least: int | None = None
) -> None:
    """Every key above zero, or at least ``least``."""
    for key in keys:
        value = getattr(holder, key)
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right or not (value > 0 if least is None else value >= least) or value == math.inf:
            kind = "positive" if least is None else "not negative"
            raise ConfigError(
                f"{prefix}{key} must be a {'whole ' if whole else ''}number, {kind}, not {value!r}"
            )


def _check_sizes(config: ModelConfig) -> None:
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(f"model_type {config.model_type!r} is not one of {MODEL_TYPES}")
    sizes = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings
        n_group topk_group"""
    counts = """n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size
        first_k_dense_replace num_nextn_predict_layers"""
    _check_numbers(config, "", sizes.split(), whole=True)
    _check_numbers(config, "", counts.split(), whole=True, least=0)
    reals = "rms_norm_eps rope_theta routed_scaling_factor initializer_range"
    _check_numbers(config, "", reals.split())
    for key in ("norm_topk_prob", "tie_word_embeddings"):
        if not isinstance(getattr(config, key), bool):
            raise ConfigError(f"{key} must be true or false, not {getattr(config, key)!r}")
    if not isinstance(config.rope_scaling, YarnScaling | None):
        raise ConfigError(f"rope_scaling must be a table, not {config.rope_scaling!r}")
    if config.q_lora_rank is not None:
        _check_numbers(config, "", ("q_lora_rank",), whole=True)
    if config.qk_rope_head_dim % 2:
        raise ConfigError(
            f"qk_rope_head_dim {config.qk_rope_head_dim} must be even: RoPE turns pairs"
        )


def _check_experts(config: ModelConfig) -> None:
    experts, groups = config.n_routed_experts, config.n_group
    if experts == 0:
        return
    if config.moe_intermediate_size < 1:
        raise ConfigError("moe_intermediate_size must be positive where there are experts")
    if experts % groups:
        raise ConfigError(f"n_routed_experts {experts} is not a multiple of n_group {groups}")
    if not 1 <= config.topk_group <= groups:
        raise ConfigError(f"topk_group {config.topk_group} must be from 1 to n_group {groups}")
    reachable = experts // groups * config.topk_group
    if not 1 <= config.num_experts_per_tok <= reachable:
        raise ConfigError(
            f"num_experts_per_tok {config.num_experts_per_tok} must be from 1 to {reachable}: "
            "the experts in the topk_group groups that a token may use"
        )
    if config.model_type == "deepseek_v3" and groups > 1 and experts // groups < 2:
        raise ConfigError("a V3 group is scored by its two best experts: it needs at least two")
    if config.model_type == "deepseek_v2" and config.norm_topk_prob:
        raise ConfigError("norm_topk_prob must be false for deepseek_v2, as in V2 and V2-Lite")
