"""A model's config out of the metadata of a GGUF file; metadata.py is the way in.

The metadata says what a config.json says, under other names. Three things it leaves out: whether
the head is tied (it is where `output.weight` is not there), Llama 3's stretched context (it is a
tensor of factors, `rope_freqs.weight`), and how the weights were initialised.

DeepSeek's families are one architecture there, `deepseek2`. llama.cpp computes it in the absorbed
form, as one shared key-value head of kv_lora_rank + qk_rope_head_dim numbers; the sizes of the
heads themselves carry the ending `_mla`. MTP modules are counted as blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.model.checks import ConfigError
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.rope import frequencies
from qiusuo.model.rope_scaling import LlamaScaling, YarnScaling

DEEPSEEK = "deepseek2"
ARCHITECTURES = (DEEPSEEK, *DenseConfig.MODEL_TYPES)
SOFTMAX, SIGMOID = 1, 2
STOP_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
BOS_KEY = "tokenizer.ggml.bos_token_id"
TOKENS_KEY = "tokenizer.ggml.tokens"
# Keys that change the network in a way that is not built here, with the values that change nothing.
FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0.0,),
    "attention.causal": (True,),
}


class Fields:
    """Metadata with the architecture's prefix; what is missing or of the wrong type is named."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.architecture = metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"general.architecture is {self.architecture!r}; models of "
                f"{', '.join(ARCHITECTURES)} are read from GGUF, others cannot be run here"
            )

    def whole(self, key: str, default: int | None = None, least: int = 0) -> int:
        value = self._value(key, default)
        if isinstance(value, list) and len(set(value)) == 1:  # one number for each layer
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self._name(key)} is {value!r}; expected a whole number")
        if value < least:
            raise CheckpointError(f"{self._name(key)} is {value}; expected at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self._name(key)} is {value!r}; expected a number")
        return shortest(value)

    def get(self, key: str) -> Any:
        return self.metadata.get(self._name(key))

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is None:
            raise CheckpointError(f"{self._name(key)} is missing")
        return default if value is None else value

    def _name(self, key: str) -> str:
        return f"{self.architecture}.{key}"


def shortest(value: float) -> float:
    """The number that was meant by a float32: 1e-6 and not 9.99999997e-07."""
    return float(str(np.float32(value)))


def config_from_metadata(
    metadata: Mapping[str, Any], tied: bool, factors_P: Tensor | None, mtp: bool
) -> ModelConfig:
    """``tied``: no head of its own. ``factors``: what rope_freqs.weight holds, if it is there.
    ``mtp``: whether the MTP blocks that the metadata counts are in the file."""
    fields = Fields(metadata)
    for key, allowed in FIXED_KEYS.items():
        value = fields.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{fields.architecture}.{key} {value!r} is not supported")
    common = _common(fields) | {"tie_word_embeddings": tied}
    try:
        if fields.architecture == DEEPSEEK:
            return DeepseekConfig(**common, **_deepseek(fields, mtp))
        config = DenseConfig(**common, **_dense(fields))
    except ConfigError as error:
        raise CheckpointError(f"the metadata does not describe a model: {error}") from error
    if factors_P is None:
        return config
    if config.rope_scaling is not None:
        raise CheckpointError("rope_freqs.weight and rope.scaling.type yarn exclude each other")
    hint = fields.whole("rope.scaling.original_context_length", 0)
    return replace(config, rope_scaling=llama_scaling(config, factors_P, hint))


def _common(fields: Fields) -> dict[str, Any]:
    metadata = fields.metadata
    tokens = metadata.get(TOKENS_KEY)
    if not isinstance(tokens, list | None):
        raise CheckpointError(f"{TOKENS_KEY} is {tokens!r}; expected a list of texts")
    for key in (*STOP_KEYS, BOS_KEY):
        if not isinstance(metadata.get(key, 0), int):
            raise CheckpointError(f"{key} is {metadata[key]!r}; expected the number of a token")
    stops = list(dict.fromkeys(metadata[key] for key in STOP_KEYS if key in metadata))
    return {
        "vocab_size": len(tokens) if tokens is not None else fields.whole("vocab_size"),
        "hidden_size": fields.whole("embedding_length"),
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_attention_heads": fields.whole("attention.head_count"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "max_position_embeddings": fields.whole("context_length"),
        "bos_token_id": metadata.get(BOS_KEY),
        "eos_token_id": (tuple(stops) if len(stops) > 1 else stops[0]) if stops else None,
    }


def _dense(fields: Fields) -> dict[str, Any]:
    heads = fields.whole("attention.head_count", least=1)
    width = fields.whole("attention.key_length", fields.whole("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.whole(key, width) != width:
            raise CheckpointError(
                f"{fields.architecture}.{key} is {fields.whole(key)}; expected the width of a "
                f"head, {width}"
            )
    if fields.whole("expert_count", 0):
        raise CheckpointError(f"{fields.architecture}.expert_count: only dense models are read")
    return {
        "model_type": fields.architecture,
        "num_hidden_layers": fields.whole("block_count"),
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": width,
        "rope_scaling": _yarn(fields),
    }


def _deepseek(fields: Fields, mtp: bool) -> dict[str, Any]:
    nextn = fields.whole("nextn_predict_layers", 0)
    layers, experts = fields.whole("block_count") - nextn, fields.whole("expert_count", 0)
    rope = fields.whole("rope.dimension_count")
    # Files from before the absorbed form give the widths of the heads under the plain names.
    mla = "_mla" if fields.get("attention.key_length_mla") is not None else ""
    gating = fields.whole("expert_gating_func", 0) or SOFTMAX
    if gating not in (SOFTMAX, SIGMOID):
        raise CheckpointError(f"deepseek2.expert_gating_func {gating} is not supported")
    query = fields.get("attention.q_lora_rank")
    sizes = {
        "model_type": "deepseek_v3" if gating == SIGMOID else "deepseek_v2",
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": nextn if mtp else 0,
        "q_lora_rank": None if query is None else fields.whole("attention.q_lora_rank"),
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "qk_nope_head_dim": fields.whole(f"attention.key_length{mla}") - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": fields.whole(f"attention.value_length{mla}"),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length"),
        "n_routed_experts": experts,
        "n_shared_experts": fields.whole("expert_shared_count"),
        "n_group": max(fields.whole("expert_group_count", 1), 1),
        "topk_group": max(fields.whole("expert_group_used_count", 1), 1),
        "norm_topk_prob": fields.get("expert_weights_norm") is True,
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0) or 1.0,
        "first_k_dense_replace": fields.whole("leading_dense_block_count", 0),
        "rope_scaling": _yarn(fields),
    }
    if experts:
        sizes["num_experts_per_tok"] = fields.whole("expert_used_count")
    return sizes


def _yarn(fields: Fields) -> YarnScaling | None:
    kind = fields.get("rope.scaling.type")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0))
    if kind in (None, "none", "linear") and factor in (0.0, 1.0):
        return None
    if kind != "yarn":
        raise CheckpointError(
            f"{fields.architecture}.rope.scaling.type {kind or 'linear'!r} is not supported; "
            "expected yarn"
        )
    mscale = round(fields.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1, 6)
    original = fields.whole("rope.scaling.original_context_length", fields.whole("context_length"))
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        mscale=mscale or 1.0,
        mscale_all_dim=mscale,
    )


# Llama 3's stretched context


def rope_factors(config: ModelConfig) -> Tensor:
    """What the angle of each pair is divided by [P]: `rope_freqs.weight`."""
    return frequencies(replace(config, rope_scaling=None)) / frequencies(config)


def llama_scaling(config: DenseConfig, factors_P: Tensor, hint: int) -> LlamaScaling | None:
    """The rule that gives these factors: Llama's low and high of 1 and 4, and an original context
    of ``hint`` (0: not known) or a power of two. CheckpointError if there is none."""
    pairs = config.rotary_dim // 2
    if factors_P.shape != (pairs,):
        raise CheckpointError(
            f"rope_freqs.weight has shape {tuple(factors_P.shape)}; expected {(pairs,)}"
        )
    if torch.all(factors_P == 1):
        return None
    factor = shortest(factors_P.max().item())
    for original in [*([hint] if hint else []), *(1 << power for power in range(4, 21))]:
        scaling = LlamaScaling(factor=factor, original_max_position_embeddings=original)
        found_P = rope_factors(replace(config, rope_scaling=scaling))
        if torch.allclose(found_P, factors_P, rtol=1e-4):
            return scaling
    raise CheckpointError(
        "rope_freqs.weight stretches the context in a way that is not Llama 3's; use the model's "
        "Hugging Face folder, whose config.json describes it"
    )
