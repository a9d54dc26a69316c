"""Tiny models that between them have every branch of the published families."""

import torch

from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.rope_scaling import LlamaScaling, YarnScaling
from qiusuo.model.transformer import Transformer

YARN = YarnScaling(factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)


def tiny_config(**changes: object) -> ModelConfig:
    if changes.get("model_type") in DenseConfig.MODEL_TYPES:
        return tiny_dense_config(**changes)
    base: dict[str, object] = dict(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    if changes.get("model_type") == "deepseek_v2":
        base |= dict(norm_topk_prob=False, routed_scaling_factor=1.0)
    return DeepseekConfig(**(base | changes))  # type: ignore[arg-type]


def tiny_dense_config(**changes: object) -> DenseConfig:
    base: dict[str, object] = dict(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    return DenseConfig(**(base | changes))  # type: ignore[arg-type]


def tiny_model(seed: int = 0, negative_biases: bool = False, **changes: object) -> Transformer:
    model = Transformer(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator)
    for parameter in model.parameters():  # norms that are not all ones
        if parameter.ndim == 1:  # and biases that are not zeros
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    for router in model.routers().values():
        bias = router.e_score_correction_bias
        if bias is not None:
            noise = torch.rand(bias.shape, generator=generator)
            bias.copy_(-1.5 * noise if negative_biases else noise - 0.5)
    return model.eval()


VARIANTS: dict[str, dict[str, object]] = {
    "v3": {},
    "v3-full-query": {"q_lora_rank": None},
    "v3-one-group": {"n_group": 1, "topk_group": 1},
    "v3-negative-biases": {"negative_biases": True},
    "v3-yarn": {"rope_scaling": YARN},
    "v3-two-shared-no-norm": {"n_shared_experts": 2, "norm_topk_prob": False},
    "v3-tied": {"tie_word_embeddings": True},
    "v2-lite": {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": YarnScaling(
            factor=40.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707
        ),
    },
    "v2-groups": {"model_type": "deepseek_v2", "routed_scaling_factor": 16.0},
}
DENSE: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama"},
    "llama3": {
        "model_type": "llama",
        "head_dim": 10,
        "rope_theta": 5e5,
        "rope_scaling": LlamaScaling(factor=8.0, original_max_position_embeddings=32),
    },
    "llama-own-heads-tied": {
        "model_type": "llama",
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2-tied": {
        "model_type": "qwen2",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "qwen2-yarn": {
        "model_type": "qwen2",
        "rope_scaling": YarnScaling(factor=4.0, original_max_position_embeddings=32),
    },
}
FAMILIES = VARIANTS | DENSE
