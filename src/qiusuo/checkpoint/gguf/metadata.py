"""A model's config as the metadata of a GGUF file; config.py reads it back.

llama.cpp computes DeepSeek's attention in the absorbed form, as one shared key-value head, and
asks for the widths of both forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.gguf.config import BOS_KEY, DEEPSEEK, SIGMOID, SOFTMAX, STOP_KEYS
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.rope_scaling import LlamaScaling


def metadata_from_config(config: ModelConfig) -> dict[str, Any]:
    """Everything but the tokenizer, for a config that llama.cpp can run (limits.py)."""
    if isinstance(config, DeepseekConfig):
        architecture, own = DEEPSEEK, _deepseek_metadata(config)
    elif isinstance(config, DenseConfig):
        architecture, own = config.model_type, _dense_metadata(config)
    else:
        raise TypeError(f"{type(config).__name__} is no family of models")
    common = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.rotary_dim,
    }
    named = {f"{architecture}.{key}": value for key, value in (common | own).items()}
    return {"general.architecture": architecture} | named


def _dense_metadata(config: DenseConfig) -> dict[str, Any]:
    return {
        "block_count": config.num_hidden_layers,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    } | _scaling_metadata(config)


def _deepseek_metadata(config: DeepseekConfig) -> dict[str, Any]:
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    metadata: dict[str, Any] = {
        "block_count": blocks,
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
    }
    if config.q_lora_rank is not None:
        metadata["attention.q_lora_rank"] = config.q_lora_rank
    if config.num_nextn_predict_layers:
        metadata["nextn_predict_layers"] = config.num_nextn_predict_layers
    if config.n_routed_experts == 0:
        metadata["leading_dense_block_count"] = blocks
        return metadata | _scaling_metadata(config)
    metadata |= {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": SIGMOID if config.scoring_func == "sigmoid" else SOFTMAX,
    }
    if config.topk_group < config.n_group:  # else nothing is limited, and llama.cpp would abort
        metadata["expert_group_count"] = config.n_group
        metadata["expert_group_used_count"] = config.topk_group
    return metadata | _scaling_metadata(config)


def _scaling_metadata(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    original = {"rope.scaling.original_context_length": scaling.original_max_position_embeddings}
    if isinstance(scaling, LlamaScaling):  # a hint; the rule itself is in rope_freqs.weight
        return original
    metadata = original | {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
        "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
    }
    if scaling.mscale_all_dim:
        metadata["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    return metadata


def stop_metadata(config: ModelConfig, written: Mapping[str, Any]) -> dict[str, int]:
    """The config's beginning and ends that the tokenizer's metadata does not name already."""
    ends: Sequence[int | None] = (
        config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    )
    named = {written[key] for key in STOP_KEYS if key in written}
    rest = [end for end in ends if end is not None and end not in named]
    free = [key for key in STOP_KEYS if key not in written]
    if len(rest) > len(free):
        raise CheckpointError(
            f"this model has the end tokens {ends}; GGUF has a place for three, and the "
            "tokenizer's own is one of them"
        )
    found = dict(zip(free, rest, strict=False))
    if BOS_KEY not in written and config.bos_token_id is not None:
        found[BOS_KEY] = config.bos_token_id
    return found
