"""config.json and recipes in and out; what is refused, and in what words."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.model.checks import ConfigError
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.families import config_from_file, config_from_hf, config_from_recipe
from qiusuo.model.rope_scaling import YarnScaling
from tests.model.shapes import tiny_config
from tests.model.test_published import V2, V2_LITE, V3

YARN = V3["rope_scaling"]
positive = st.integers(1, 300)
reals = st.floats(1e-3, 1e3)


@st.composite
def configs(draw) -> ModelConfig:
    v3 = draw(st.booleans())
    groups = draw(st.integers(1, 6))
    per_group = draw(st.integers(2, 9))
    kept = draw(st.integers(1, groups))
    yarn = st.builds(
        YarnScaling,
        factor=st.floats(1, 64),
        original_max_position_embeddings=positive,
        beta_fast=reals,
        beta_slow=reals,
        mscale=st.floats(0, 2),
        mscale_all_dim=st.floats(0, 2),
    )
    return DeepseekConfig(
        model_type="deepseek_v3" if v3 else "deepseek_v2",
        vocab_size=draw(positive),
        hidden_size=draw(positive),
        intermediate_size=draw(positive),
        moe_intermediate_size=draw(positive),
        num_hidden_layers=draw(positive),
        num_attention_heads=draw(positive),
        q_lora_rank=draw(st.none() | positive),
        kv_lora_rank=draw(positive),
        qk_nope_head_dim=draw(positive),
        qk_rope_head_dim=2 * draw(positive),
        v_head_dim=draw(positive),
        n_routed_experts=draw(st.sampled_from([0, groups * per_group])),
        n_shared_experts=draw(st.integers(0, 3)),
        num_experts_per_tok=draw(st.integers(1, kept * per_group)),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=v3 and draw(st.booleans()),
        routed_scaling_factor=draw(reals),
        first_k_dense_replace=draw(st.integers(0, 9)),
        num_nextn_predict_layers=draw(st.integers(0, 3)),
        rms_norm_eps=draw(st.floats(1e-9, 1e-2)),
        rope_theta=draw(st.floats(2, 1e6)),
        rope_scaling=draw(st.none() | yarn),
        max_position_embeddings=draw(positive),
        initializer_range=draw(reals),
        bos_token_id=draw(st.none() | st.integers(0, 99)),
        eos_token_id=draw(
            st.none() | st.integers(0, 99) | st.lists(st.integers(0, 99), min_size=1).map(tuple)
        ),
        tie_word_embeddings=draw(st.booleans()),
    )


@pytest.mark.filterwarnings("error")
@given(configs())
@settings(max_examples=150)
def test_round_trip_through_json(config):
    assert config_from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_export_says_what_a_reader_must_know():
    raw = tiny_config().to_hf()
    assert raw["num_nextn_predict_layers"] == 0  # not absent: readers' default is 1
    assert raw["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (raw["scoring_func"], raw["topk_method"]) == ("sigmoid", "noaux_tc")
    assert tiny_config(model_type="deepseek_v2").to_hf()["topk_method"] == "group_limited_greedy"
    lite = tiny_config(model_type="deepseek_v2", n_group=1, topk_group=1).to_hf()
    assert (lite["scoring_func"], lite["topk_method"]) == ("softmax", "greedy")
    assert lite["architectures"] == ["DeepseekV2ForCausalLM"]


@pytest.mark.parametrize("raw", [V3, V2, V2_LITE], ids=["V3", "V2", "V2-Lite"])
def test_rope_parameters_of_transformers_5(raw):
    modern = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")}
    yarn = {k: v for k, v in raw["rope_scaling"].items() if k != "type"}
    modern["rope_parameters"] = {**yarn, "rope_type": "yarn", "rope_theta": 4321.0}
    config = config_from_hf(modern)
    assert config == config_from_hf(raw | {"rope_theta": 4321.0})
    assert config.rope_scaling is not None


def test_default_rope_parameters_are_no_scaling():
    modern = {k: v for k, v in V3.items() if k not in ("rope_theta", "rope_scaling")}
    config = config_from_hf(
        modern | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    )
    assert (config.rope_scaling, config.rope_theta) == (None, 500.0)


def test_other_spellings():
    assert config_from_hf(V3 | {"eos_token_id": [1, 7]}).eos_token_id == (1, 7)
    renamed = {k: v for k, v in V3.items() if k != "num_nextn_predict_layers"}
    assert config_from_hf(renamed).num_nextn_predict_layers == 0
    assert config_from_hf(renamed | {"num_mtp_layers": 2}).num_nextn_predict_layers == 2
    greedy = config_from_hf(V2 | {"topk_method": "greedy"})
    assert (greedy.n_group, greedy.topk_group) == (1, 1)
    assert config_from_hf(V2_LITE | {"n_group": None, "topk_group": None}).n_group == 1


def test_silent_v2_config_means_v2s_defaults():
    silent = {
        k: v
        for k, v in V2_LITE.items()
        if k not in ("norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace")
    }
    config = config_from_hf(silent)
    assert not config.norm_topk_prob
    assert (config.routed_scaling_factor, config.first_k_dense_replace) == (1.0, 0)


def test_silent_v3_config_means_v3s_defaults():
    """Groups that are not spoken of are V3's eight, not one: another router altogether."""
    silent = {k: V3[k] for k in ("model_type", *DeepseekConfig.NEEDED_KEYS)}
    config = config_from_hf(silent)
    assert (config.n_routed_experts, config.n_shared_experts) == (256, 1)
    assert (config.n_group, config.topk_group) == (8, 4)
    assert config.num_nextn_predict_layers == 0


def test_null_says_none_of_it():
    dense = dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok"))
    for raw in (V3, V2):
        config = config_from_hf(raw | dense | {"n_group": None, "topk_group": None})
        assert (config.n_routed_experts, config.n_shared_experts, config.n_group) == (0, 0, 1)
        assert not config.is_moe_layer(99)


def test_unknown_rope_key_of_a_config_is_named():
    with pytest.warns(UserWarning, match="'mscales'; did you mean 'mscale'"):
        config_from_hf(V3 | {"rope_scaling": YARN | {"mscales": 1.0}})


def test_unknown_key_of_a_config_is_named():
    with pytest.warns(UserWarning, match="sliding_window"):
        config_from_hf(V3 | {"sliding_window": 4096})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'.*deepseek_v3"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'.*'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'.*noaux_tc"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'.*expected yarn or llama3"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim 63 must be even"),
        ({"n_group": 7}, "n_routed_experts 256 is not a multiple of n_group 7"),
        ({"topk_group": 9}, "topk_group 9 must be from 1 to n_group 8"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 must be from 1 to 128"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok 0"),
        ({"n_group": 256, "topk_group": 16}, "two best experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"hidden_size": 0}, "hidden_size must be a whole number, positive, not 0"),
        ({"hidden_size": 7168.5}, "hidden_size must be a whole number"),
        ({"vocab_size": "129280"}, "vocab_size must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"topk_group": 1.5}, "topk_group must be a whole number"),
        ({"num_experts_per_tok": 2.0}, "num_experts_per_tok must be a whole number"),
        ({"n_shared_experts": -1}, "n_shared_experts must be a whole number, not negative"),
        ({"n_routed_experts": -8}, "n_routed_experts"),
        ({"n_group": -1}, "n_group must be a whole number, positive"),
        ({"first_k_dense_replace": -2}, "first_k_dense_replace"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, positive, not '1e-6'"),
        ({"rope_theta": 0}, "rope_theta must be a number, positive, not 0"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob must be true or false, not 'no'"),
        ({"q_lora_rank": 1.5}, "q_lora_rank must be a whole number"),
        ({"rope_interleave": False}, "rope_interleave must be True"),
        ({"rope_scaling": YARN | {"factor": 0}}, r"rope_scaling\.factor must be a number"),
        ({"rope_scaling": YARN | {"beta_fast": "x"}}, r"rope_scaling\.beta_fast"),
        ({"rope_scaling": YARN | {"mscale": -1}}, r"rope_scaling\.mscale"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor 2.0 is not supp"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate False is not supported"),
        ({"q_lora_rank": -1}, "q_lora_rank"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ],
)
def test_refused_config_names_the_key(change, words):
    with pytest.raises(ConfigError, match=words):
        config_from_hf(V3 | change)


def test_v2_does_not_normalise():
    with pytest.raises(ConfigError, match="norm_topk_prob must be false"):
        config_from_hf(V2 | {"norm_topk_prob": True})


def test_from_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V3), encoding="utf-8")
    assert config_from_file(tmp_path) == config_from_hf(V3)
    assert config_from_file(tmp_path / "config.json") == config_from_hf(V3)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        config_from_file(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "none"))):
        config_from_file(tmp_path / "none")


# -- recipes ------------------------------------------------------------------------------------


def test_recipe_table():
    config = config_from_recipe(
        {
            "vocab_size": 64,
            "q_lora_rank": 0,
            "eos_token_id": [1, 2],
            "rope_scaling": {"factor": 4, "original_max_position_embeddings": 128},
        }
    )
    assert config.q_lora_rank is None
    assert config.eos_token_id == (1, 2)
    assert config.rope_scaling == YarnScaling(factor=4, original_max_position_embeddings=128)
    assert config.hidden_size == 7168


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("hiden_size", "hidden_size"),
        ("n_routed_expert", "n_routed_experts"),
        ("num_heads", "num_attention_heads"),
        ("topk_groups", "topk_group"),
    ],
)
def test_misspelt_recipe_key_names_the_nearest(wrong, right):
    with pytest.raises(ConfigError, match=rf"{wrong!r}; did you mean {right!r}"):
        config_from_recipe({wrong: 8})


def test_recipe_key_like_no_other_is_named_too():
    with pytest.raises(ConfigError, match=r"has no key 'xyzzy'$"):
        config_from_recipe({"xyzzy": 8})


def test_misspelt_rope_key_of_a_recipe_names_the_nearest():
    yarn = {"factor": 4, "original_max_position_embeddings": 128, "mscale_all_dims": 1.0}
    with pytest.raises(ConfigError, match="'mscale_all_dims'; did you mean 'mscale_all_dim'"):
        config_from_recipe({"rope_scaling": yarn})
    with pytest.raises(ConfigError, match="rope_scaling must be a table, not 'yarn'"):
        config_from_recipe({"rope_scaling": "yarn"})


# -- a config.json that is silent -----------------------------------------------------------------

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "deepseek_v2", "deepseek_v3"])
def test_silence_means_what_transformers_takes_it_to_mean(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    own = {"num_key_value_heads": 4} if model_type == "qwen2" else {}
    ours = config_from_hf({"model_type": model_type} | SIZES | own)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    ends = ours.bos_token_id, ours.eos_token_id
    if model_type == "deepseek_v3":
        assert ends == (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    else:  # theirs are those of Llama 1, which hardly a model of the family has
        assert ends == (None, None)
    null = config_from_hf(ours.to_hf() | {"max_position_embeddings": None})
    assert null == ours


def test_a_recipe_has_tokens_of_its_own():
    recipe = {"model_type": "llama"} | SIZES
    assert config_from_recipe(recipe).eos_token_id == 1
    assert config_from_recipe(recipe).max_position_embeddings == 4096
