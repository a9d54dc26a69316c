"""Every family through a real folder and back: in shards, in bfloat16, in FP8, with MTP.

The peer is transformers, from token ids to logits; where it does not go (MTP modules, ragged FP8
blocks) it is the papers' equations in NumPy (tests/model/oracle.py).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import (
    load_huggingface,
    open_huggingface,
    save_huggingface,
    write_huggingface,
)
from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import measure
from qiusuo.model.families import config_from_hf
from qiusuo.model.rope_scaling import LlamaScaling, YarnScaling
from qiusuo.model.transformer import Transformer
from tests.checkpoint.test_fp8 import decoded
from tests.model import oracle
from tests.model.shapes import DENSE, FAMILIES, VARIANTS, tiny_config, tiny_model
from tests.model.test_published import V2_LITE, V3

TOKENS = torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(4))
INDEX = "model.safetensors.index.json"
# Matrices of more than one block of 128, none of whole blocks, in both kinds of attention.
RAGGED_DEEPSEEK = dict(
    hidden_size=144,
    intermediate_size=200,
    moe_intermediate_size=136,
    kv_lora_rank=132,
    qk_nope_head_dim=50,
    v_head_dim=50,
    num_hidden_layers=2,
    initializer_range=0.06,
)
RAGGED_DENSE = dict(hidden_size=132, intermediate_size=300, initializer_range=0.06)


@torch.no_grad()
def logits_of(model: Transformer) -> torch.Tensor:
    return model.logits(model(TOKENS).x_BTD)


@torch.no_grad()
def transformers_logits(folder: Path) -> torch.Tensor:
    """In float32; every tensor of the folder was used and none was lacking."""
    peer, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return peer(TOKENS).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.1
    assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-5


def read_as_float64(folder: Path) -> dict[str, Any]:
    """All shards, FP8 decoded by the other decoder."""
    held: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    return {
        name: decoded(tensor, held[name + "_scale_inv"], (128, 128)).astype(np.float64)
        if tensor.dtype == torch.float8_e4m3fn
        else tensor.double().numpy()
        for name, tensor in held.items()
    }


# -- shards and bfloat16 --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_bfloat16_in_shards(changes, tmp_path):
    """Both read the same rounded weights, from several files, into float32."""
    model = tiny_model(**changes)
    save_huggingface(model, tmp_path / "m", dtype=torch.bfloat16, shard_bytes=40_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    ours = load_huggingface(tmp_path / "m", dtype=torch.float32)
    assert_close(logits_of(ours), transformers_logits(tmp_path / "m"))
    assert not torch.equal(logits_of(ours), logits_of(model))


@pytest.mark.parametrize("name", ["v3", "v3-tied", "v2-lite", *DENSE])
def test_shards_that_transformers_writes(name, tmp_path):
    save_huggingface(tiny_model(**FAMILIES[name]), tmp_path / "ours")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs" / INDEX).is_file()
    back = load_huggingface(tmp_path / "theirs", dtype=torch.float32)
    assert back.config == tiny_config(**FAMILIES[name])
    assert_close(logits_of(back), transformers_logits(tmp_path / "theirs"))


@pytest.mark.parametrize("name", ["v3", "qwen2"])
def test_float16(name, tmp_path):
    save_huggingface(tiny_model(**FAMILIES[name]), tmp_path / "m", dtype=torch.float16)
    assert load_huggingface(tmp_path / "m").lm_head.weight.dtype == torch.float16
    back = load_huggingface(tmp_path / "m", dtype=torch.float32)
    assert_close(logits_of(back), transformers_logits(tmp_path / "m"))


# -- FP8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v3", "v3-full-query", "v2-lite", "llama3", "qwen2-tied"])
def test_fp8_with_ragged_blocks(name, tmp_path):
    """transformers cannot read these blocks, but it reads what we make of them in float32."""
    ragged = RAGGED_DENSE if name in DENSE else RAGGED_DEEPSEEK
    model = tiny_model(**(FAMILIES[name] | ragged))
    save_huggingface(model, tmp_path / "fp8", dtype=torch.float8_e4m3fn, shard_bytes=100_000)
    ours = load_huggingface(tmp_path / "fp8", dtype=torch.float32)
    write_huggingface(open_huggingface(tmp_path / "fp8"), tmp_path / "wide", "F32")
    assert_close(logits_of(ours), transformers_logits(tmp_path / "wide"))
    change = (logits_of(ours) - logits_of(model)).abs().max() / logits_of(model).abs().max()
    assert 1e-4 < float(change) < 0.5  # FP8 it was, and not noise


@pytest.mark.parametrize("name", ["v3", "v2-lite"])
@torch.no_grad()
def test_fp8_against_the_equations(name, tmp_path):
    model = tiny_model(**(VARIANTS[name] | RAGGED_DEEPSEEK))
    save_huggingface(model, tmp_path / "m", dtype=torch.float8_e4m3fn)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    tokens = TOKENS[0, :7]
    _, expected = oracle.forward(read_as_float64(tmp_path / "m"), config, tokens.tolist())
    ours = load_huggingface(tmp_path / "m", dtype=torch.float32)
    assert_close(ours.logits(ours(tokens[None]).x_BTD)[0].double(), torch.from_numpy(expected))


# -- MTP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F8_E4M3"])
@torch.no_grad()
def test_mtp_after_any_number_of_layers(kind, layers, depth, tmp_path, monkeypatch):
    """transformers knows MTP as "layer 61" alone: told the right number, it reads the main model
    of the same folder. The modules themselves follow the equations."""
    made = tiny_model(num_hidden_layers=layers, num_nextn_predict_layers=depth)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
    save_huggingface(made, tmp_path / "m", dtype=dtypes[kind], shard_bytes=60_000)
    model = load_huggingface(tmp_path / "m", dtype=torch.float32)
    tensors = read_as_float64(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    tokens = TOKENS[:1, :9]
    hidden, logits = oracle.forward(tensors, config, tokens[0].tolist())
    x = model(tokens).x_BTD
    assert_close(model.logits(x)[0].double(), torch.from_numpy(logits))
    for module in range(depth):
        hidden, logits = oracle.predict_ahead(tensors, config, tokens[0].tolist(), hidden, module)
        following = tokens[:, module + 1 :]
        x = model.predict_ahead(x[:, :-1], following, module, model.context(following)).x_BTD
        assert_close(model.logits(x)[0].double(), torch.from_numpy(logits))
    if kind != "F8_E4M3":
        ignored = [rf"model\.layers\.{layers + module}\..*" for module in range(depth)]
        monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", ignored)
        assert_close(logits_of(model), transformers_logits(tmp_path / "m"))


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@torch.no_grad()
def test_negative_biases_in_masked_groups(kind, tmp_path):
    """All biases below zero: an expert of a group that lost must not win by scoring nothing."""
    made = tiny_model(negative_biases=True, n_group=4, topk_group=1, num_experts_per_tok=2, seed=3)
    for router in made.routers().values():
        router.e_score_correction_bias -= 3
    dtype = torch.float32 if kind == "F32" else torch.bfloat16
    save_huggingface(made, tmp_path / "m", dtype=dtype)
    model = load_huggingface(tmp_path / "m", dtype=torch.float32)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    tokens = TOKENS[0, :12]
    _, expected = oracle.forward(read_as_float64(tmp_path / "m"), config, tokens.tolist())
    assert_close(model.logits(model(tokens[None]).x_BTD)[0].double(), torch.from_numpy(expected))


# -- what older files carry -----------------------------------------------------------------------


def add(folder: Path, **tensors: torch.Tensor) -> None:
    held = load_file(folder / "model.safetensors")
    save_file(held | tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["v3-tied", "llama-own-heads-tied", "qwen2-tied"])
def test_tied_head_stored_twice(name, tmp_path):
    model = tiny_model(**FAMILIES[name])
    save_huggingface(model, tmp_path / "m")
    add(tmp_path / "m", **{"lm_head.weight": model.lm_head.weight.detach().clone()})
    back = load_huggingface(tmp_path / "m")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert torch.equal(logits_of(back), logits_of(model))
    write_huggingface(open_huggingface(tmp_path / "m"), tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_llama_files_with_rope_tables(dtype, tmp_path):
    """Of before 2023's end: every layer carries its frequencies. Read over, and not written."""
    model = tiny_model(model_type="llama")
    save_huggingface(model, tmp_path / "m", dtype=dtype)
    expected = load_huggingface(tmp_path / "m", dtype=torch.float32)
    tables = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}
    add(tmp_path / "m", **tables)
    back = load_huggingface(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(logits_of(back), logits_of(expected))
    write_huggingface(open_huggingface(tmp_path / "m"), tmp_path / "again")
    assert not any("inv_freq" in n for n in load_file(tmp_path / "again" / "model.safetensors"))
    add(tmp_path / "m", **{"model.layers.0.self_attn.inv_freq": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"surplus: model\.layers\.0\.self_attn\.inv_freq"):
        load_huggingface(tmp_path / "m")


def test_links_as_a_cache_makes_them(tmp_path):
    """huggingface_hub's cache is a folder of links to blobs."""
    model = tiny_model(model_type="qwen2")
    save_huggingface(model, tmp_path / "m", shard_bytes=60_000)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(sorted((tmp_path / "m").iterdir())):
        shutil.move(file, tmp_path / "blobs" / f"{number}")
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{number}")
    assert torch.equal(logits_of(load_huggingface(tmp_path / "snapshot")), logits_of(model))


# -- config.json as published ---------------------------------------------------------------------

# What the files on Hugging Face say, V3's with the keys that test_published leaves out.
FULL_V3 = V3 | {"aux_loss_alpha": 0.001, "pretraining_tp": 1, "seq_aux": True}
R1 = FULL_V3 | {
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "transformers_version": "4.46.3",
}
V31 = V3 | {
    "quantization_config": V3["quantization_config"] | {"scale_fmt": "ue8m0"},  # type: ignore[operator]
    "transformers_version": "4.44.2",
}
DISTILL_QWEN_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_1_5B = DISTILL_QWEN_1_5B | {
    "eos_token_id": 151645,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "transformers_version": "4.43.1",
}
DISTILL_LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_8B_INSTRUCT = DISTILL_LLAMA_8B | {"eos_token_id": [128001, 128008, 128009]}
PUBLISHED = {
    "V3": FULL_V3,
    "R1": R1,
    "V3.1": V31,
    "V2-Lite": V2_LITE,
    "R1-Distill-Qwen-1.5B": DISTILL_QWEN_1_5B,
    "Qwen2.5-1.5B": QWEN_1_5B,
    "R1-Distill-Llama-8B": DISTILL_LLAMA_8B,
    "Llama-3.1-8B-Instruct": LLAMA_8B_INSTRUCT,
}


def open_config(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    """Through a folder, as ``open_huggingface`` reads it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({}, folder / "model.safetensors")
    return open_huggingface(folder).config


@pytest.mark.filterwarnings("error")  # every key is known
@pytest.mark.parametrize("raw", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_are_read_and_written_back(raw, tmp_path):
    config = open_config(tmp_path / "m", raw)
    written = config.to_hf()
    for key in written.keys() & raw.keys() - {"rope_scaling", "topk_method"}:
        assert written[key] == raw[key], key
    assert config_from_hf(written) == config
    assert config.eos_token_id == (
        tuple(raw["eos_token_id"]) if isinstance(raw["eos_token_id"], list) else raw["eos_token_id"]
    )


@pytest.mark.parametrize("raw", [R1, V31], ids=["R1", "V3.1"])
def test_r1_and_v31_are_v3(raw):
    assert config_from_hf(raw) == config_from_hf(V3)


def test_rope_of_the_published():
    assert config_from_hf(DISTILL_LLAMA_8B).rope_scaling == LlamaScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert config_from_hf(DISTILL_LLAMA_8B).rope_theta == 5e5
    assert config_from_hf(DISTILL_QWEN_1_5B).rope_scaling is None
    assert config_from_hf(DISTILL_QWEN_1_5B).rope_theta == 1e4
    assert isinstance(config_from_hf(V31).rope_scaling, YarnScaling)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("R1-Distill-Llama-8B", 8_030_261_248),
        ("Llama-3.1-8B-Instruct", 8_030_261_248),
    ],
)
def test_parameters_of_the_published(name, parameters):
    cost = measure(config_from_hf(PUBLISHED[name]))
    assert cost.parameters == parameters
    assert cost.mtp_parameters == 0
