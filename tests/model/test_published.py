"""The published models, without a byte of their weights."""

import pytest
import torch

from qiusuo.checkpoint.tensors import disk_layout, mtp_copies
from qiusuo.model.families import config_from_hf
from qiusuo.model.rope_scaling import YarnScaling
from qiusuo.model.transformer import Transformer
from tests.model.shapes import tiny_model

# What DeepSeek's config.json files say, with the keys that change nothing here.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2_LITE = V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}


def on_meta(raw: dict) -> Transformer:
    with torch.device("meta"):
        return Transformer(config_from_hf(raw))


def elements(model: Transformer) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def v3() -> Transformer:
    return on_meta(V3)


def is_mtp(name: str) -> bool:
    return name.startswith("model.layers.61.")


@pytest.mark.filterwarnings("error")  # every key of a published config.json is known
@pytest.mark.parametrize("raw", [V3, V2, V2_LITE], ids=["V3", "V2", "V2-Lite"])
def test_published_config_says_what_it_says(raw):
    config = config_from_hf(raw)
    yarn = raw["rope_scaling"]
    for key, value in raw.items():
        if hasattr(config, key) and key != "rope_scaling":
            assert getattr(config, key) == value, key
    assert config.rope_scaling == YarnScaling(
        factor=40,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=yarn["mscale"],
        mscale_all_dim=yarn["mscale"],
    )


def test_parameters_of_v3(v3):
    sizes = elements(v3)
    assert sum(n for name, n in sizes.items() if not is_mtp(name)) == 671_026_419_200
    biases = [n for name, n in sizes.items() if name.endswith("bias") and not is_mtp(name)]
    assert biases == [256] * 58


def test_mtp_module_of_v3_adds_eleven_billion_of_its_own(v3):
    unique = sum(n for name, n in elements(v3).items() if is_mtp(name))
    moe_block = sum(n for name, n in elements(v3).items() if name.startswith("model.layers.60."))
    assert unique == moe_block + 2 * 7168 * 7168 + 3 * 7168  # eh_proj; enorm, hnorm, shared_head
    assert round(unique / 1e9, 2) == 11.61


@pytest.mark.parametrize(
    ("raw", "expected"), [(V2_LITE, 15_706_484_224), (V2, 235_741_434_880)], ids=["V2-Lite", "V2"]
)
def test_parameters_of_v2(raw, expected):
    assert sum(elements(on_meta(raw)).values()) == expected


def test_cache_of_v3(v3):
    config = v3.config
    assert config.cache_width == 576
    expanded = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    assert expanded == 40_960
    assert config.cache_width * config.num_hidden_layers == 35_136


def test_softmax_scale_of_v3(v3):
    assert v3.config.softmax_scale == pytest.approx(0.135234, abs=5e-7)


def test_names_on_disk_of_v3(v3):
    """Shapes in DeepSeek's own files, one of each kind; nothing stacked, nothing biased else."""
    state = v3.state_dict()
    shapes = {name: tuple(part.of(state).shape) for name, part in disk_layout(v3.config, state)}
    for name, original in mtp_copies(v3.config):
        assert name not in shapes
        shapes[name] = tuple(state[original].shape)
    layer = "model.layers."
    expected = {
        "model.embed_tokens.weight": (129280, 7168),
        "model.norm.weight": (7168,),
        "lm_head.weight": (129280, 7168),
        layer + "0.input_layernorm.weight": (7168,),
        layer + "0.post_attention_layernorm.weight": (7168,),
        layer + "0.self_attn.q_a_proj.weight": (1536, 7168),
        layer + "0.self_attn.q_a_layernorm.weight": (1536,),
        layer + "0.self_attn.q_b_proj.weight": (24576, 1536),
        layer + "0.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        layer + "0.self_attn.kv_a_layernorm.weight": (512,),
        layer + "0.self_attn.kv_b_proj.weight": (32768, 512),
        layer + "0.self_attn.o_proj.weight": (7168, 16384),
        layer + "2.mlp.gate_proj.weight": (18432, 7168),
        layer + "2.mlp.up_proj.weight": (18432, 7168),
        layer + "2.mlp.down_proj.weight": (7168, 18432),
        layer + "3.mlp.gate.weight": (256, 7168),
        layer + "3.mlp.gate.e_score_correction_bias": (256,),
        layer + "3.mlp.experts.0.gate_proj.weight": (2048, 7168),
        layer + "60.mlp.experts.255.up_proj.weight": (2048, 7168),
        layer + "60.mlp.experts.255.down_proj.weight": (7168, 2048),
        layer + "60.mlp.shared_experts.gate_proj.weight": (2048, 7168),
        layer + "61.mlp.experts.255.down_proj.weight": (7168, 2048),
        layer + "61.enorm.weight": (7168,),
        layer + "61.hnorm.weight": (7168,),
        layer + "61.eh_proj.weight": (7168, 14336),
        layer + "61.shared_head.norm.weight": (7168,),
        layer + "61.shared_head.head.weight": (129280, 7168),
        layer + "61.embed_tokens.weight": (129280, 7168),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    per_attention, per_experts = 9, 1 + 1 + 3 * 256 + 3  # with both layer norms; gate, bias, shared
    assert len(shapes) == 3 + 62 * per_attention + 3 * 3 + 59 * per_experts + 6


def test_shared_experts_are_one_wide_network():
    assert on_meta(V2_LITE).state_dict()[
        "model.layers.1.mlp.shared_experts.up_proj.weight"
    ].shape == (
        2 * 1408,
        2048,
    )


def test_names_of_mtp_layers():
    names = [n for n in tiny_model(num_nextn_predict_layers=2).state_dict() if ".layers.4." in n]
    tails = {name.removeprefix("model.layers.4.") for name in names}
    block = {
        n.removeprefix("model.layers.2.") for n in tiny_model().state_dict() if ".layers.2." in n
    }
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    assert tails == block | own
    assert "mlp.experts.gate_up_proj" in block
