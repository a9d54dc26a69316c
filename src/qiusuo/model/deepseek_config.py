"""The shape of a DeepSeek model: MLA, experts, multi-token prediction.

Two published families share it. They differ in the router only:

- ``deepseek_v3`` (V3, R1, V3.1): sigmoid scores, a group's score is the sum of its two best,
  a learned-by-rule bias that takes part in the choice, chosen scores normalised to sum to one.
- ``deepseek_v2`` (V2-Lite, V2): softmax scores, a group's score is its best, no bias, no
  normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from qiusuo.model.checks import (
    MOST_EXPERTS,
    ConfigError,
    check_booleans,
    check_most,
    check_numbers,
)
from qiusuo.model.config import ModelConfig
from qiusuo.model.rope_scaling import LlamaScaling, YarnScaling

ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
ROUTER_METHODS = {
    "deepseek_v3": ("sigmoid", ("noaux_tc",)),
    "deepseek_v2": ("softmax", ("greedy", "group_limited_greedy")),
}


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(ModelConfig):
    """Defaults are DeepSeek-V3's. ``q_lora_rank=None`` means one full query projection."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = tuple(ARCHITECTURES)
    FIXED_KEYS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "moe_layer_freq": (1,),
        "rope_interleave": (True, None),
    }
    OTHER_KEYS: ClassVar[frozenset[str]] = frozenset(
        """aux_loss_alpha ep_size head_dim num_experts num_key_value_heads num_local_experts
        qk_head_dim seq_aux""".split()
    )
    NULLABLE: ClassVar[tuple[str, ...]] = (*ModelConfig.NULLABLE, "q_lora_rank")
    SILENT: ClassVar[dict[str, dict[str, Any]]] = {
        "deepseek_v3": {"max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1},
        # DeepSeek's class and transformers' disagree about the tokens of V2.
        "deepseek_v2": {
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    }

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

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_group topk_group"
        counts = """n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size
            first_k_dense_replace"""
        check_numbers(self, sizes.split(), whole=True)
        check_numbers(self, counts.split(), whole=True, least=0)
        check_most("n_routed_experts", self.n_routed_experts, MOST_EXPERTS)
        check_numbers(self, ("routed_scaling_factor",))
        check_booleans(self, ("norm_topk_prob",))
        if self.q_lora_rank is not None:
            check_numbers(self, ("q_lora_rank",), whole=True)
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} must be even: RoPE turns pairs"
            )
        if isinstance(self.rope_scaling, LlamaScaling):
            raise ConfigError("rope_scaling of a DeepSeek model must be yarn, not llama3")
        _check_experts(self)

    # -- what follows from the sizes ------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_widths(self) -> tuple[int, int]:
        return self.qk_head_dim, self.v_head_dim

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def cache_parts(self) -> tuple[int, int]:
        """The latent and the rope key that all heads share."""
        return self.kv_lora_rank, self.qk_rope_head_dim

    @property
    def cache_exact(self) -> int:
        return self.qk_rope_head_dim

    @property
    def scoring_func(self) -> str:
        return ROUTER_METHODS[self.model_type][0]

    @property
    def softmax_scale(self) -> float:
        """1/√qk_head_dim, times YaRN's squared magnitude (DeepSeek-V2 §2.1.4 and released code)."""
        scale = self.qk_head_dim**-0.5
        if isinstance(self.rope_scaling, YarnScaling):
            scale *= self.rope_scaling.magnitude(self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def is_moe_layer(self, layer: int) -> bool:
        """The first layers are dense; MTP modules count on from ``num_hidden_layers``."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    # -- config.json and recipes ----------------------------------------------------------

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Self:
        raw = dict(raw)
        _check_router_method(raw)
        if "num_mtp_layers" in raw:
            raw.setdefault("num_nextn_predict_layers", raw.pop("num_mtp_layers"))
        for key, none in _NONE_MEANS.items():
            if key in raw and raw[key] in (None, 0):
                raw[key] = none
        if raw["model_type"] == "deepseek_v2":
            raw = _V2_DEFAULTS | raw
        return super().from_hf(raw)

    def to_hf(self) -> dict[str, Any]:
        scoring, methods = ROUTER_METHODS[self.model_type]
        return super().to_hf() | {
            "architectures": [ARCHITECTURES[self.model_type]],
            "num_key_value_heads": self.num_attention_heads,
            "scoring_func": scoring,
            "topk_method": methods[-1] if self.n_group > 1 else methods[0],
            "attention_bias": False,
            "moe_layer_freq": 1,
        }

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> Self:
        if not table.get("q_lora_rank"):  # V3's own is a size, not a law; TOML has no null
            table = {**table, "q_lora_rank": None}
        return super().from_recipe(table)


# What DeepSeek's own class assumes where a V2 config.json is silent; V3's are DeepseekConfig's.
_V2_DEFAULTS: dict[str, Any] = {
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
}
# What null (or zero groups) says there. Elsewhere null is the default, but for NULLABLE keys.
_NONE_MEANS = {
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 0,
    "n_group": 1,
    "topk_group": 1,
}


def _check_router_method(raw: dict[str, Any]) -> None:
    model_type = raw["model_type"]
    expected, methods = ROUTER_METHODS[model_type]
    scoring, method = raw.pop("scoring_func", None), raw.pop("topk_method", None)
    if scoring not in (None, expected):
        raise ConfigError(f"scoring_func {scoring!r}: a {model_type} router uses {expected!r}")
    if method not in (None, *methods):
        raise ConfigError(f"topk_method {method!r}: a {model_type} router uses {methods}")
    if method == "greedy":  # the groups of a greedy router are never looked at
        raw["n_group"] = raw["topk_group"] = 1


def _check_experts(config: DeepseekConfig) -> None:
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
