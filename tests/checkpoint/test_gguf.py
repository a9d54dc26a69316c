"""GGUF in and out, against the reader, the writer and the types of the `gguf` package."""

import dataclasses
import lzma
import math
import mmap
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

import qiusuo.data
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.gguf import header
from qiusuo.checkpoint.gguf.file import open_gguf, write_gguf
from qiusuo.checkpoint.load import checkpoint_of, load_model
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.rope_scaling import LlamaScaling, YarnScaling
from qiusuo.model.transformer import Transformer
from tests.model.shapes import DENSE, VARIANTS, YARN, tiny_model

ROOT = Path(__file__).parents[2]
VOCABULARY = 384
LITE = VARIANTS["v2-lite"] | {"num_hidden_layers": 27}
WRITABLE = {
    name: changes
    for name, changes in (VARIANTS | DENSE).items()
    if name not in ("v3-full-query", "v2-lite", "v2-groups")
} | {
    "v3-mtp": {"num_nextn_predict_layers": 1},
    "v3-tied-mtp": {"num_nextn_predict_layers": 1, "tie_word_embeddings": True},
    "v3-full-query": {"q_lora_rank": None, "num_hidden_layers": 26},
    "v2-lite": LITE,
}


@cache
def tokenizer() -> Tokenizer:
    text = Path(qiusuo.data.__file__).parent / "builtin" / "tinyshakespeare.txt.xz"
    return Tokenizer.train_bpe([lzma.open(text, "rt").read()[:20_000]], VOCABULARY - 3)


def model_of(**changes: object) -> Transformer:
    """A vocabulary smaller than the embedding, as in published models."""
    return tiny_model(**{"vocab_size": VOCABULARY, "eos_token_id": 1} | changes)


def write(model: Transformer, path: Path, kind: str = "f32") -> Path:
    return write_gguf(checkpoint_of(model, tokenizer()), path, kind)


def assert_same(back: Transformer, model: Transformer) -> None:
    expected, found = model.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def read(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray], dict[str, str]]:
    """What the `gguf` package finds: metadata, tensors as numbers, types."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: gguf.quants.dequantize(np.array(t.data), t.tensor_type) for t in reader.tensors
    }
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def rewrite(path: Path, fields: dict[str, object], tensors: dict[str, object]) -> Path:
    """As another program would write it. Tensors: arrays of numbers, or (bytes, type)."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for name, value in fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        if value != []:
            add[type(value)](name, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        elif tensor is not None:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(path: Path, fields: dict[str, object], tensors: dict[str, object]) -> Path:
    """The file with other fields and tensors; None takes one away."""
    held_fields, held_tensors, _ = read(path)
    return rewrite(
        path.with_name(f"changed-{path.name}"), held_fields | fields, held_tensors | tensors
    )


# -- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", WRITABLE.values(), ids=WRITABLE)
def test_same_bits_and_config(changes, tmp_path):
    model = model_of(**changes)
    back = open_gguf(write(model, tmp_path / "m.gguf"))
    assert back.format == "GGUF"
    # The one thing that GGUF has no place for.
    config = dataclasses.replace(back.config, initializer_range=model.config.initializer_range)
    assert config == model.config
    assert_same(load_model(back), model)
    assert back.read_tokenizer().encode("To be, or not") == tokenizer().encode("To be, or not")


@pytest.mark.parametrize("changes", WRITABLE.values(), ids=WRITABLE)
def test_read_from_what_another_program_writes(changes, tmp_path):
    model = model_of(**changes)
    path = changed(write(model, tmp_path / "m.gguf"), {}, {})
    assert_same(load_model(open_gguf(path)), model)


def test_groups_of_which_none_is_dropped_are_no_groups(tmp_path):
    model = model_of(n_group=4, topk_group=4)
    back = open_gguf(write(model, tmp_path / "m.gguf"))
    assert (back.config.n_group, back.config.topk_group) == (1, 1)
    tokens = torch.arange(20)[None]
    assert torch.equal(load_model(back)(tokens).x_BTD, model(tokens).x_BTD)


def test_deepseek_without_experts(tmp_path):
    model = model_of(n_routed_experts=0, n_shared_experts=0)
    assert_same(load_model(open_gguf(write(model, tmp_path / "m.gguf"))), model)


@pytest.mark.parametrize("ends", [1, (1, 7), (7, 1, 9), None])
def test_beginning_and_ends(ends, tmp_path):
    model = model_of(eos_token_id=ends, bos_token_id=0)
    config = open_gguf(write(model, tmp_path / "m.gguf")).config
    assert config.bos_token_id == 0
    found = (
        config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    )
    expected = ends if isinstance(ends, tuple) else (1,)  # the tokenizer's own is always one
    assert set(found) == set(expected)


# -- what another reader finds ------------------------------------------------------------------


def test_names_and_shapes_of_deepseek(tmp_path):
    model = model_of(num_nextn_predict_layers=1, rope_scaling=YARN)
    fields, tensors, types = read(write(model, tmp_path / "m.gguf"))
    assert set(types.values()) == {"F32"}
    expected = {
        "attention.head_count_kv": 1,
        "attention.key_length": 24,
        "attention.value_length": 16,
        "attention.key_length_mla": 20,
        "attention.value_length_mla": 10,
        "attention.kv_lora_rank": 16,
        "attention.q_lora_rank": 20,
        "block_count": 4,
        "nextn_predict_layers": 1,
        "leading_dense_block_count": 1,
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "rope.dimension_count": 8,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
    }
    assert {key: fields[f"deepseek2.{key}"] for key in expected} == expected
    assert fields["general.architecture"] == "deepseek2"
    assert fields["general.name"] == "m"
    state = model.state_dict()
    kv = state["model.layers.2.self_attn.kv_b_proj.weight"].numpy()
    for head in range(3):
        of_head = kv[head * 22 : (head + 1) * 22]
        assert np.array_equal(tensors["blk.2.attn_k_b.weight"][head], of_head[:12].T)
        assert np.array_equal(tensors["blk.2.attn_v_b.weight"][head], of_head[12:])
    down = state["model.layers.3.mlp.experts.down_proj"].numpy()
    assert np.array_equal(tensors["blk.3.ffn_down_exps.weight"], down)
    names = {name.removeprefix("blk.3.") for name in tensors if name.startswith("blk.3.")}
    assert names == set(
        """attn_norm.weight attn_q_a.weight attn_q_a_norm.weight attn_q_b.weight
        attn_kv_a_mqa.weight attn_kv_a_norm.weight attn_k_b.weight attn_v_b.weight
        attn_output.weight ffn_norm.weight ffn_gate_inp.weight exp_probs_b.bias
        ffn_gate_exps.weight ffn_up_exps.weight ffn_down_exps.weight ffn_gate_shexp.weight
        ffn_up_shexp.weight ffn_down_shexp.weight nextn.eh_proj.weight nextn.enorm.weight
        nextn.hnorm.weight nextn.shared_head_norm.weight""".split()
    )


def test_heads_of_llama_are_interleaved_and_those_of_qwen_not(tmp_path):
    for model_type in ("llama", "qwen2"):
        model = model_of(model_type=model_type)
        _, tensors, _ = read(write(model, tmp_path / f"{model_type}.gguf"))
        for part, heads in (("q", 6), ("k", 2), ("v", 2)):
            ours = model.state_dict()[f"model.layers.1.self_attn.{part}_proj.weight"].numpy()
            theirs = tensors[f"blk.1.attn_{part}.weight"]
            if model_type == "llama" and part != "v":  # as llama.cpp's converter does it
                ours = ours.reshape(heads, 2, 4, 48).swapaxes(1, 2).reshape(ours.shape)
            assert np.array_equal(theirs, ours), (model_type, part)


@pytest.mark.parametrize(
    ("kind", "matrix", "file_type"),
    [("f32", "F32", 0), ("f16", "F16", 1), ("bf16", "BF16", 32), ("q8_0", "Q8_0", 7)],
)
def test_kinds(kind, matrix, file_type, tmp_path):
    model = model_of(num_nextn_predict_layers=1, hidden_size=64, kv_lora_rank=32)
    fields, tensors, types = read(write(model, tmp_path / "m.gguf", kind))
    assert fields["general.file_type"] == file_type
    for name, found in types.items():
        plain = tensors[name].ndim == 1 or name.endswith("ffn_gate_inp.weight")
        narrow = kind == "q8_0" and tensors[name].shape[-1] % 32
        assert found == ("F32" if plain else "F16" if narrow else matrix), name
    assert types["blk.1.attn_q_b.weight"] == ("F16" if kind == "q8_0" else matrix)
    assert types["blk.1.exp_probs_b.bias"] == "F32"
    embedding = model.model.embed_tokens.weight.detach()
    stored = gguf.quants.dequantize(
        gguf.quants.quantize(embedding.numpy(), Type[matrix]), Type[matrix]
    )
    assert np.array_equal(tensors["token_embd.weight"], stored)
    back = load_model(open_gguf(tmp_path / "m.gguf"), dtype=torch.float32)
    assert np.array_equal(back.model.embed_tokens.weight.detach().numpy(), stored)


def test_bfloat16_weights_are_written_as_they_are(tmp_path):
    model = model_of().bfloat16()
    for router in model.routers().values():
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    back = load_model(open_gguf(write(model, tmp_path / "m.gguf", "bf16")))
    assert_same(back, model)
    assert back.lm_head.weight.dtype == torch.bfloat16


def test_numbers_that_f16_cannot_hold(tmp_path):
    model = model_of()
    model.lm_head.weight.data[3, 3] = 1e6
    with pytest.raises(
        CheckpointError, match=r"output\.weight holds 1e\+06, .*65504: choose bfloat16"
    ):
        write(model, tmp_path / "m.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [math.nan, math.inf, -2e7])
def test_numbers_that_q8_0_cannot_hold(number, tmp_path):
    """A scale is a float16: what it cannot say would come back as another number."""
    model = model_of(hidden_size=64)
    model.lm_head.weight.data[3, 3] = number
    with pytest.raises(CheckpointError, match=r"output\.weight holds NaN, infinity or"):
        write(model, tmp_path / "m.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []
    model.lm_head.weight.data[3, 3] = 8e6
    back = load_model(open_gguf(write(model, tmp_path / "m.gguf", "q8_0")), dtype=torch.float32)
    assert back.lm_head.weight[3, 3].item() == pytest.approx(8e6, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0; expected at least 1"),
        ({"tokenizer.ggml.tokens": 5}, "tokenizer.ggml.tokens is 5; expected a list"),
        ({"llama.block_count": 4_000_000_000}, "num_hidden_layers.* 4000000000 is beyond"),
        ({"llama.embedding_length": 4_000_000_000}, "hidden_size 4000000000 is beyond"),
    ],
)
def test_metadata_that_no_model_has(fields, words, tmp_path):
    path = write(model_of(**WRITABLE["llama"]), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=words) as caught:
        open_gguf(changed(path, fields, {}))
    assert str(tmp_path) in str(caught.value)


def test_lists_of_the_metadata_stay_in_the_file(tmp_path):
    path = write(model_of(), tmp_path / "m.gguf")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    metadata = header.read_header(path, data).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokens == metadata["tokenizer.ggml.tokens"]
    assert tokens is not metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(metadata["tokenizer.ggml.token_type"]) == VOCABULARY
    assert set(metadata) > {"tokenizer.ggml.merges", "general.architecture"}


# -- what other files hold ----------------------------------------------------------------------

QUANTISED = """Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4""".split()


def blocks(rows: int, width: int, kind: Type) -> np.ndarray:
    """Random bytes: any are a tensor of some numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(kind.value)
    return generator.integers(0, 120, (rows, width // block * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", QUANTISED)
@settings(max_examples=8)
@given(ends=st.tuples(st.integers(0, VOCABULARY), st.integers(0, VOCABULARY)))
def test_rows_of_quantised_tensors(kind, ends, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"{kind}.gguf"
    raw = blocks(VOCABULARY, 256, Type[kind])
    if not path.exists():
        model = model_of(model_type="llama", hidden_size=256, head_dim=8, num_hidden_layers=1)
        write(model, path)
        fields, tensors, _ = read(path)
        rewrite(path, fields, tensors | {"token_embd.weight": (raw, Type[kind])})
    tensor = open_gguf(path).tensors["model.embed_tokens.weight"]
    assert tensor.kind == kind
    assert tensor.shape == (VOCABULARY, 256)
    assert tensor.stored_bytes == raw.nbytes
    start, stop = sorted(ends)
    found = tensor.rows(start, stop)
    assert found.dtype == torch.float32
    expected = gguf.quants.dequantize(raw, Type[kind])[start:stop]
    assert np.array_equal(found.numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("name", ["v3-mtp", "llama", "qwen2"])
def test_any_rows_are_those_of_the_whole(name, tmp_path):
    back = open_gguf(write(model_of(**WRITABLE[name]), tmp_path / "m.gguf"))
    generator = np.random.default_rng(0)
    for tensor in back.tensors.values():
        whole = tensor.rows(0, tensor.shape[0])
        assert tuple(whole.shape) == tensor.shape
        for start, stop in np.sort(generator.integers(0, tensor.shape[0] + 1, (5, 2))):
            part = tensor.rows(int(start), int(stop))
            assert torch.equal(part, whole[start:stop]), (tensor.place, start, stop)


def test_files_from_before_the_absorbed_form(tmp_path):
    """One kv_b, and the widths of the heads under the plain names."""
    model = model_of()
    path = write(model, tmp_path / "m.gguf")
    tensors: dict[str, object] = {}
    for layer in range(3):
        kv = model.state_dict()[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].numpy()
        tensors[f"blk.{layer}.attn_kv_b.weight"] = kv
        tensors |= {f"blk.{layer}.attn_{part}_b.weight": None for part in "kv"}
    fields: dict[str, object] = {
        "deepseek2.attention.key_length_mla": None,
        "deepseek2.attention.value_length_mla": None,
        "deepseek2.attention.key_length": 20,
        "deepseek2.attention.value_length": 10,
        "deepseek2.attention.head_count_kv": 3,
    }
    assert_same(load_model(open_gguf(changed(path, fields, tensors))), model)


def test_experts_with_gate_and_up_in_one(tmp_path):
    model = model_of()
    tensors: dict[str, object] = {}
    for layer in (1, 2):
        both = model.state_dict()[f"model.layers.{layer}.mlp.experts.gate_up_proj"].numpy()
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = both
        tensors |= {f"blk.{layer}.ffn_{part}_exps.weight": None for part in ("gate", "up")}
    path = changed(write(model, tmp_path / "m.gguf"), {}, tensors)
    assert_same(load_model(open_gguf(path)), model)


def test_mtp_module_without_a_norm_of_its_own_has_the_models(tmp_path):
    model = model_of(num_nextn_predict_layers=1)
    path = write(model, tmp_path / "m.gguf")
    path = changed(path, {}, {"blk.3.nextn.shared_head_norm.weight": None})
    back = load_model(open_gguf(path))
    assert torch.equal(back.model.layers[3].shared_head.norm.weight, model.model.norm.weight)


def test_mtp_module_that_is_counted_and_left_out(tmp_path):
    model = model_of()
    fields = {"deepseek2.block_count": 4, "deepseek2.nextn_predict_layers": 1}
    path = changed(write(model, tmp_path / "m.gguf"), fields, {})
    assert_same(load_model(open_gguf(path)), model)


def test_mtp_modules_copies_must_be_copies(tmp_path):
    model = model_of(num_nextn_predict_layers=1)
    path, name = write(model, tmp_path / "m.gguf"), "blk.3.nextn.embed_tokens.weight"
    own = model.model.embed_tokens.weight.detach().numpy()
    assert_same(load_model(open_gguf(changed(path, {}, {name: own}))), model)
    with pytest.raises(CheckpointError, match=name):
        load_model(open_gguf(changed(path, {}, {name: own + 1})))


def test_softmax_is_what_a_silent_file_means(tmp_path):
    path = write(model_of(**LITE), tmp_path / "m.gguf")
    path = changed(path, {"deepseek2.expert_gating_func": None}, {})
    assert open_gguf(path).config.model_type == "deepseek_v2"


def test_llama3_is_recognised_by_its_factors(tmp_path):
    """llama.cpp's converter writes the factors alone."""
    model = model_of(**DENSE["llama3"])
    path = write(model, tmp_path / "m.gguf")
    path = changed(path, {"llama.rope.scaling.original_context_length": None}, {})
    assert open_gguf(path).config.rope_scaling == model.config.rope_scaling
    factors = read(path)[1]["rope_freqs.weight"]
    assert factors.min() == 1
    assert factors.max() == pytest.approx(8)
    path = changed(path, {}, {"rope_freqs.weight": factors[::-1]})
    with pytest.raises(CheckpointError, match="not Llama 3's"):
        open_gguf(path)
    path = changed(path, {}, {"rope_freqs.weight": np.ones(5, np.float32)})
    assert open_gguf(path).config.rope_scaling is None


def test_tensor_that_is_not_known_is_surplus(tmp_path):
    path = write(model_of(), tmp_path / "m.gguf")
    path = changed(path, {}, {"blk.1.attn_gate.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(CheckpointError, match=r"surplus: blk\.1\.attn_gate\.weight"):
        load_model(open_gguf(path))
    path = changed(path, {}, {"blk.1.attn_gate.weight": None, "blk.1.attn_norm.weight": None})
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.input_layernorm"):
        load_model(open_gguf(path))


def test_no_tokenizer_is_none(tmp_path):
    path = write(model_of(), tmp_path / "m.gguf")
    fields, _, _ = read(path)
    gone = dict.fromkeys(name for name in fields if name.startswith("tokenizer."))
    back = open_gguf(changed(path, gone, {}))
    assert back.read_tokenizer() is None
    assert back.config.vocab_size == VOCABULARY


# -- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    """block_count context_length embedding_length feed_forward_length attention.head_count
    attention.layer_norm_rms_epsilon attention.kv_lora_rank rope.dimension_count
    expert_feed_forward_length expert_used_count expert_shared_count""".split(),
)
def test_missing_metadata_is_named(key, tmp_path):
    path = write(model_of(), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=rf"changed-m\.gguf: deepseek2\.{key} is missing"):
        open_gguf(changed(path, {f"deepseek2.{key}": None}, {}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deepseek2.block_count": "3"}, "block_count is '3'; expected a whole number"),
        ({"deepseek2.rope.freq_base": "x"}, "freq_base is 'x'; expected a number"),
        ({"deepseek2.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"deepseek2.rope.scaling.factor": 2.0}, "'linear' is not supported"),
        ({"deepseek2.expert_gating_func": 4}, "expert_gating_func 4 is not supported"),
        ({"deepseek2.expert_used_count": 99}, "num_experts_per_tok 99 must be"),
        ({"deepseek2.attention.temperature_scale": 0.1}, "temperature_scale 0.1"),
        ({"tokenizer.ggml.eos_token_id": "1"}, "eos_token_id is '1'"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_metadata_that_cannot_be_read(fields, message, tmp_path):
    path = write(model_of(), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=message):
        open_gguf(changed(path, fields, {}))


def test_other_architectures_and_types(tmp_path):
    path = write(model_of(), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'gemma3'"):
        open_gguf(changed(path, {"general.architecture": "gemma3"}, {}))
    whole = np.ones((4, 4), np.int32)
    with pytest.raises(CheckpointError, match="odd is of type I32, which cannot be read"):
        open_gguf(changed(path, {}, {"odd": whole}))


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> bytes:
    model = model_of(num_hidden_layers=1, first_k_dense_replace=1, n_shared_experts=0)
    return write(model, tmp_path_factory.mktemp("whole") / "m.gguf").read_bytes()


@settings(max_examples=60)
@given(share=st.floats(0, 0.999))
def test_file_that_was_cut_short(share, whole_file, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "short.gguf"
    path.write_bytes(whole_file[: int(share * len(whole_file))])
    with pytest.raises(CheckpointError, match=r"short\.gguf"):
        open_gguf(path)


@settings(max_examples=150)
@given(place=st.integers(4, 3000), byte=st.integers(0, 255))
def test_damaged_header_is_refused_or_harmless(place, byte, whole_file, tmp_path_factory):
    """Whatever byte is wrong, nothing but a CheckpointError comes out, and at once."""
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    content = bytearray(whole_file)
    content[place] = byte
    path.write_bytes(content)
    with suppress(CheckpointError):
        back = open_gguf(path)
        for tensor in back.tensors.values():
            tensor.rows(0, 1)
        back.read_tokenizer()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + bytes(3) + b"\x03" + bytes(100), "version 50331648"),
        (b"GGUF\x01" + bytes(100), "version 1"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "cut short"),
    ],
)
def test_what_is_no_gguf_file(content, message, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_gguf(tmp_path / "y.gguf")


# -- what is not written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q_lora_rank": None}, "q_lora_rank is null"),
        ({"num_hidden_layers": 27}, "27 layers to have no q_lora_rank"),
        (VARIANTS["v2-groups"], "V2 by its best"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0"),
        ({"num_nextn_predict_layers": 2}, "one MTP module, not 2; leave .*--no-mtp"),
        (LITE | {"num_nextn_predict_layers": 1}, "queries have a q_lora_rank; leave .*--no-mtp"),
        (
            {"num_nextn_predict_layers": 1, "first_k_dense_replace": 4},
            "experts in the MTP module.*--no-mtp",
        ),
        (
            {"rope_scaling": dataclasses.replace(YARN, mscale_all_dim=0.5)},
            "mscale to be mscale_all_dim",
        ),
        ({"rope_scaling": dataclasses.replace(YARN, beta_fast=16.0)}, "beta_fast"),
        (
            {"model_type": "qwen2", "rope_scaling": dataclasses.replace(YARN, mscale_all_dim=0.5)},
            "mscale to be 1 and mscale_all_dim 0",
        ),
        ({"model_type": "qwen2", "head_dim": 10}, "as wide as the model"),
        ({"eos_token_id": (1, 2, 3, 4)}, "three"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(changes, reason, tmp_path):
    with pytest.raises(CheckpointError, match=reason):
        write(model_of(**changes), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_yarn_that_stretches_nothing_is_written(tmp_path):
    yarn = YarnScaling(factor=1.0, original_max_position_embeddings=16, mscale_all_dim=0.3)
    model = model_of(rope_scaling=yarn)
    assert_same(load_model(open_gguf(write(model, tmp_path / "m.gguf"))), model)


def test_llama3_of_other_bends_is_written_and_not_read(tmp_path):
    scaling = LlamaScaling(8.0, 1000, low_freq_factor=2.0, high_freq_factor=3.0)
    model = model_of(model_type="llama", head_dim=64, rope_scaling=scaling)
    path = write(model, tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="not Llama 3's"):
        open_gguf(path)


def test_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        write_gguf(checkpoint_of(model_of(), None), tmp_path / "m.gguf")
    characters = Tokenizer.train_characters(["求索"])
    with pytest.raises(CheckpointError, match="byte-level"):
        write_gguf(checkpoint_of(model_of(), characters), tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="97 rows"):
        write(model_of(vocab_size=97), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_kind_that_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="'q4_0' is not one of f32, f16, q8_0, bf16"):
        write(model_of(), tmp_path / "m.gguf", "q4_0")


# -- where it is written ------------------------------------------------------------------------


def test_only_a_gguf_file_is_replaced(tmp_path):
    path = write(model_of(seed=1), tmp_path / "new" / "m.gguf")
    write(model_of(seed=2), path)
    assert_same(load_model(open_gguf(path)), model_of(seed=2))
    assert [file.name for file in path.parent.iterdir()] == ["m.gguf"]
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        write(model_of(), tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(CheckpointError, match="is a folder"):
        write(model_of(), tmp_path)


def test_writing_over_the_file_a_model_is_read_from(tmp_path):
    model = model_of()
    path = write(model, tmp_path / "m.gguf")
    write_gguf(open_gguf(path), path, "f32")
    assert_same(load_model(open_gguf(path)), model)


def test_progress_counts_to_the_end(tmp_path):
    seen: list[tuple[int, int]] = []
    checkpoint = checkpoint_of(model_of(), tokenizer())
    write_gguf(checkpoint, tmp_path / "m.gguf", "f32", lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][1] - seen[-1][0] < 32  # the last tensor's padding


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_full_disk_is_an_error_and_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for a full disk: it needs no disk of its own."""
    path = write(model_of(seed=1), tmp_path / "m.gguf")
    program = f"""
from pathlib import Path
from qiusuo.checkpoint.files import CheckpointError
from tests.checkpoint.test_gguf import model_of, write
try:
    write(model_of(seed=2), Path({str(path)!r}))
except CheckpointError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        preexec_fn=_small_files,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: could not write")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert_same(load_model(open_gguf(path)), model_of(seed=1))
