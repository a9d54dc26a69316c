"""FP8 in blocks of 128×128: read exactly, written within the format's own error."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.fp8 import Fp8Tensor, is_quantized_name, pair_scales
from qiusuo.checkpoint.huggingface import (
    load_huggingface,
    open_huggingface,
    save_huggingface,
    write_huggingface,
)
from qiusuo.checkpoint.load import checkpoint_of
from qiusuo.checkpoint.stored import MemoryTensor, chunks
from qiusuo.checkpoint.tensors import disk_shapes, mtp_copies
from qiusuo.kernels.fp8 import SQUARE, quantize
from qiusuo.model.families import config_from_hf
from qiusuo.model.transformer import Transformer
from tests.model.shapes import tiny_model
from tests.model.test_published import V3

SHAPES = [(1, 1), (127, 129), (128, 128), (130, 257), (384, 1), (1, 300), (290, 140)]
BIG = dict(  # a layer with every projection, some ragged in both directions
    hidden_size=144,
    intermediate_size=200,
    moe_intermediate_size=136,
    num_attention_heads=2,
    q_lora_rank=130,
    kv_lora_rank=128,
    qk_nope_head_dim=68,
    v_head_dim=70,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    initializer_range=0.05,
)


def decode_e4m3(byte: int) -> float:
    """One sign bit, four of exponent (bias 7), three of mantissa; all ones is NaN, no infinity."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


TABLE = np.array([decode_e4m3(byte) for byte in range(256)])


def decoded(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> np.ndarray:
    """Block by block in float64, then rounded once to float32."""
    numbers = TABLE[weight.view(torch.uint8).numpy()]
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows = slice(i * block[0], (i + 1) * block[0])
            columns = slice(j * block[1], (j + 1) * block[1])
            numbers[rows, columns] *= float(scale[i, j])
    return numbers.astype(np.float32)


def random_pair(
    shape: tuple[int, int], block: tuple[int, int] = (128, 128), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte of e4m3 and scales of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    blocks = [math.ceil(n / b) for n, b in zip(shape, block, strict=True)]
    scale = torch.exp(6 * torch.randn(blocks, generator=generator) - 5)
    return weight.view(torch.float8_e4m3fn), scale


def joined(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> Fp8Tensor:
    tensors = {"w": MemoryTensor("w", weight), "w_scale_inv": MemoryTensor("w_scale_inv", scale)}
    found = pair_scales(tensors, {"quant_method": "fp8", "weight_block_size": list(block)})
    assert list(found) == ["w"]
    assert isinstance(found["w"], Fp8Tensor)
    return found["w"]


# -- reading --------------------------------------------------------------------------------------


def test_every_byte():
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    read = joined(weight, torch.ones(1, 1)).rows(0, 2).reshape(-1).numpy()
    np.testing.assert_array_equal(read, TABLE.astype(np.float32))
    assert np.nanmax(read) == 448


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reading_is_exact(shape):
    weight, scale = random_pair(shape)
    tensor = joined(weight, scale)
    assert (tensor.shape, tensor.kind) == (shape, "F8_E4M3")
    assert tensor.stored_bytes == weight.nbytes + scale.nbytes
    read = tensor.rows(0, shape[0])
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.numpy(), decoded(weight, scale, (128, 128)))


@given(*[st.integers(1, most) for most in (400, 300, 200, 200)], st.data())
@settings(max_examples=50)
def test_any_rows_of_any_blocks(rows, columns, high, wide, data):
    weight, scale = random_pair((rows, columns), (high, wide), seed=rows)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    read = joined(weight, scale, (high, wide)).rows(start, stop)
    expected = decoded(weight, scale, (high, wide))[start:stop]
    np.testing.assert_array_equal(read.numpy(), expected)


def test_scales_in_bfloat16_are_read():
    weight, scale = random_pair((130, 130))
    read = joined(weight, scale.bfloat16()).rows(0, 130)
    np.testing.assert_array_equal(
        read.numpy(), decoded(weight, scale.bfloat16().float(), (128, 128))
    )


def test_chunks_do_not_follow_the_blocks(monkeypatch):
    monkeypatch.setattr("qiusuo.checkpoint.stored.CHUNK_BYTES", 4 * 40 * 50)
    weight, scale = random_pair((300, 40))
    read = torch.cat([rows for _, rows in chunks(joined(weight, scale))])
    np.testing.assert_array_equal(read.numpy(), decoded(weight, scale, (128, 128)))


# -- writing --------------------------------------------------------------------------------------


def blocks_of(rows_NC: torch.Tensor):
    for i in range(0, rows_NC.shape[0], 128):
        for j in range(0, rows_NC.shape[1], 128):
            yield (i // 128, j // 128), rows_NC[i : i + 128, j : j + 128]


def assert_within_the_formats_error(before: torch.Tensor, after: torch.Tensor) -> None:
    """Three bits of mantissa: half a unit in the last place is 2⁻⁴ of the number, or 2⁻¹⁰ of the
    scale where e4m3 itself is subnormal. The division rounds too, hence the little more."""
    for (_, b), (_, a) in zip(blocks_of(before), blocks_of(after), strict=True):
        scale = max(float(b.abs().max()) / 448, 2.0**-126)
        allowed = torch.maximum(b.double().abs() * 2**-4, torch.tensor(scale * 2**-10))
        error = (a.double() - b.double()).abs()
        assert (error <= allowed * (1 + 1e-5)).all()


BLOCKS: dict[str, torch.Tensor] = {
    "zeros": torch.zeros(130, 140),
    "ordinary": 0.02 * torch.randn(257, 130, generator=torch.Generator().manual_seed(1)),
    "one number": torch.tensor([[-3.7]]),
    "huge": torch.full((3, 3), 3.3e38) * torch.tensor([1.0, -1.0, 1e-3]),
    "tiny": torch.tensor([[9.4e-43, 1e-44, -3e-43]]),
    "smallest normal": torch.tensor([[2.0**-126, 2.0**-130]]),
    "mixed": torch.cat([torch.full((128, 128), 1e30), torch.full((128, 9), 1e-30)], 1),
}


@pytest.mark.parametrize("rows", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_the_formats_own(rows, dtype):
    rows = rows.to(dtype)
    numbers, scale = quantize(rows, SQUARE)[:2]
    assert numbers.shape == rows.shape
    assert numbers.dtype == torch.float8_e4m3fn
    assert scale.shape == tuple(math.ceil(n / 128) for n in rows.shape)
    assert scale.dtype == torch.float32
    back = torch.from_numpy(decoded(numbers, scale, (128, 128)))
    assert_within_the_formats_error(rows.float(), back)
    for (place, b), (_, n) in zip(blocks_of(rows), blocks_of(numbers), strict=True):
        if b.abs().max() > 448 * 2.0**-126:  # the largest of a block is the largest of the format
            assert n.float().abs().max() == 448
            assert float(scale[place]) == pytest.approx(float(b.abs().max()) / 448, rel=1e-6)


def test_a_block_does_not_feel_its_neighbours():
    """Only its own numbers: a ragged edge is not rounded by the padding or by the next block."""
    rows = torch.randn(130, 257, generator=torch.Generator().manual_seed(2))
    rows[:, 128:256] *= 1e6
    numbers, scale = quantize(rows, SQUARE)[:2]
    for (i, j), block in blocks_of(rows):
        alone, own = quantize(block, SQUARE)[:2]
        assert own.item() == scale[i, j].item()
        part = numbers[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        assert torch.equal(alone.float(), part.float())


def test_what_fp8_holds_comes_back_as_it_was():
    weight, scale = random_pair((260, 140), seed=5)
    numbers = weight.float().nan_to_num()
    numbers[::128, ::128] = 448  # in every block the largest, as quantize leaves it
    first = joined(numbers.to(torch.float8_e4m3fn), scale).rows(0, 260)
    numbers, again = quantize(first, SQUARE)[:2]
    second = torch.from_numpy(decoded(numbers, again, (128, 128)))
    torch.testing.assert_close(second, first, rtol=1e-6, atol=0)


def test_bfloat16_to_fp8_and_back(tmp_path):
    """Through a folder, into bfloat16: the format's error and half a unit of bfloat16's."""
    model = tiny_model(**BIG).bfloat16()
    save_huggingface(model, tmp_path / "m", dtype=torch.float8_e4m3fn)
    back = load_huggingface(tmp_path / "m")
    for name, tensor in model.state_dict().items():
        now = back.state_dict()[name]
        if name.endswith("e_score_correction_bias"):
            assert now.dtype == torch.float32
            assert torch.equal(now, tensor.float())
            continue
        assert now.dtype == torch.bfloat16
        if "_proj" not in name:
            assert torch.equal(now, tensor), name
            continue
        assert not torch.equal(now, tensor), name
        largest = tensor.float().abs().max()
        allowed = tensor.float().abs() * (2**-4 + 2**-8) + largest / 448 * 2**-10
        assert ((now.float() - tensor.float()).abs() <= allowed * 1.01).all(), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(bad, tmp_path):
    """One of them would take its whole block of 16,384 numbers with it."""
    model = tiny_model()
    save_huggingface(model, tmp_path / "m", dtype=torch.float8_e4m3fn)
    model.model.layers[2].mlp.experts.down_proj.data[5, 3, 1] = bad
    name = r"model\.layers\.2\.mlp\.experts\.5\.down_proj\.weight"
    with pytest.raises(CheckpointError, match=rf"{name} holds numbers that are not finite"):
        save_huggingface(model, tmp_path / "m", dtype=torch.float8_e4m3fn)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    load_huggingface(tmp_path / "m")  # the old one stands
    save_huggingface(model, tmp_path / "n", dtype=torch.bfloat16)


# -- which tensors --------------------------------------------------------------------------------

# README_WEIGHTS and the index of DeepSeek-V3: what has a weight_scale_inv.
PUBLISHED_FP8 = re.compile(
    r"""model\.layers\.\d+\.(
        self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)
        | mlp\.(gate_proj|up_proj|down_proj)
        | mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)
        | mlp\.shared_experts\.(gate_proj|up_proj|down_proj)
    )\.weight""",
    re.VERBOSE,
)


def test_the_names_that_deepseek_stores_in_fp8():
    config = config_from_hf(V3)
    names = list(disk_shapes(config)) + [name for name, _ in mtp_copies(config)]
    ours = {name for name in names if is_quantized_name(name)}
    assert ours == {name for name in names if PUBLISHED_FP8.fullmatch(name)}
    # 62 layers of attention, three dense networks, 59 layers of 256 experts and a shared one.
    assert len(ours) == 62 * 5 + 3 * 3 + 59 * 257 * 3
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.61.eh_proj.weight",
        "model.layers.61.shared_head.head.weight",
        "model.layers.61.embed_tokens.weight",
        "model.layers.0.self_attn.kv_a_layernorm.weight",
    ):
        assert name in names
        assert name not in ours


def test_a_folder_in_deepseeks_own_layout(tmp_path):
    model = tiny_model(**BIG, num_nextn_predict_layers=1)
    save_huggingface(model, tmp_path / "m", dtype=torch.float8_e4m3fn)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert raw["quantization_config"] == V3["quantization_config"]
    assert raw["torch_dtype"] == "bfloat16"
    held = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in held.items():
        if name.endswith("_scale_inv"):
            weight = held[name.removesuffix("_scale_inv")]
            assert tensor.dtype == torch.float32
            assert tensor.shape == tuple(math.ceil(n / 128) for n in weight.shape)
        elif PUBLISHED_FP8.fullmatch(name):
            assert tensor.dtype == torch.float8_e4m3fn
            assert f"{name}_scale_inv" in held
        elif name.endswith("e_score_correction_bias"):
            assert tensor.dtype == torch.float32
        else:
            assert tensor.dtype == torch.bfloat16, name
            assert f"{name}_scale_inv" not in held
    assert held["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (136, 144)
    assert held["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    back = load_huggingface(tmp_path / "m", dtype=torch.float32)
    read = back.state_dict()["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    expected = decoded(held[name], held[name + "_scale_inv"], (128, 128))
    np.testing.assert_array_equal(read.numpy(), expected)


class Shaped:
    """A tensor of which only the outside is known."""

    def __init__(self, place: str, shape: tuple[int, ...], kind: str) -> None:
        self.place, self.shape, self.kind, self.stored_bytes = place, shape, kind, 0


def test_kv_a_of_v3_has_five_rows_of_scales():
    """576 rows are four and a half blocks."""
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    weight = Shaped(name, (576, 7168), "F8_E4M3")
    scale = Shaped(name + "_scale_inv", (5, 56), "F32")
    paired = pair_scales({name: weight, name + "_scale_inv": scale}, V3["quantization_config"])
    assert paired[name].shape == (576, 7168)
    scale.shape = (4, 56)
    with pytest.raises(CheckpointError, match=r"shape \(4, 56\).*needs F32 of shape \(5, 56\)"):
        pair_scales({name: weight, name + "_scale_inv": scale}, V3["quantization_config"])


def test_dense_families_too(tmp_path):
    model = tiny_model(model_type="qwen2")
    save_huggingface(model, tmp_path / "m", dtype=torch.float8_e4m3fn)
    held = load_file(tmp_path / "m" / "model.safetensors")
    scaled = {name.removesuffix("_scale_inv") for name in held if name.endswith("_scale_inv")}
    assert len(scaled) == 3 * 7
    assert held["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16


def test_fp8_through_shards_and_back_to_bfloat16(tmp_path):
    """A weight and its scales may lie in different files; a conversion holds neither whole."""
    model = tiny_model(**BIG, num_nextn_predict_layers=1)
    save_huggingface(model, tmp_path / "one", dtype=torch.float8_e4m3fn)
    write_huggingface(checkpoint_of(model, None), tmp_path / "many", "F8_E4M3", shard_bytes=20_000)
    where = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    apart = [
        name
        for name, file in where["weight_map"].items()
        if where["weight_map"].get(name + "_scale_inv", file) != file
    ]
    assert apart
    one, many = (load_huggingface(tmp_path / n, dtype=torch.float32) for n in ("one", "many"))
    assert all(map(torch.equal, many.state_dict().values(), one.state_dict().values()))
    write_huggingface(open_huggingface(tmp_path / "many"), tmp_path / "bf16", "BF16")
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert_bf16_of(one, load_huggingface(tmp_path / "bf16"))


def assert_bf16_of(exact: Transformer, rounded: Transformer) -> None:
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].to(tensor.dtype)), name


def test_blocks_do_not_depend_on_the_pieces_written(tmp_path, monkeypatch):
    """Writing goes whole rows of blocks at a time, however few numbers a piece may have."""
    model = tiny_model(**BIG)
    save_huggingface(model, tmp_path / "one", dtype=torch.float8_e4m3fn)
    monkeypatch.setattr("qiusuo.checkpoint.stored.CHUNK_BYTES", 1)
    save_huggingface(model, tmp_path / "many", dtype=torch.float8_e4m3fn)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "many")]
    assert files[0] == files[1]


# -- the peer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@torch.no_grad()
def test_transformers_reads_our_fp8(sharded, tmp_path):
    """Its CPU path dequantises. Sizes here are up to one block or whole blocks: for others it
    takes shape / scale shape for the block and so is wrong (130 rows) or gives up (576 rows)."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    sizes = dict(
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_attention_heads=2,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        initializer_range=0.05,
    )
    model = tiny_model(**sizes)
    write_huggingface(
        checkpoint_of(model, None),
        tmp_path / "m",
        "F8_E4M3",
        shard_bytes=300_000 if sharded else 1 << 30,
    )
    peer, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=FineGrainedFP8Config(dequantize=True),
    )
    assert not any(info.values()), info
    peer.float()  # it leaves in bfloat16 what was stored so
    ours = load_huggingface(tmp_path / "m", dtype=torch.float32)
    tokens = torch.randint(97, (2, 21), generator=torch.Generator().manual_seed(1))
    mine, theirs = ours.logits(ours(tokens).x_BTD), peer(tokens).logits
    assert float((mine - theirs).abs().max() / theirs.abs().max()) <= 1e-5
    assert float((mine - model.logits(model(tokens).x_BTD)).abs().max()) > 1e-3  # it was FP8
    held = dict(peer.named_parameters())
    for name, tensor in ours.state_dict().items():
        if name in held and "experts" not in name:
            assert torch.equal(tensor, held[name].float()), name


# -- refusals -------------------------------------------------------------------------------------

F8, F32 = torch.float8_e4m3fn, torch.float32
REFUSED: dict[str, tuple[dict[str, torch.Tensor], object, str]] = {
    "no scales": ({"w": torch.zeros(2, 2).to(F8)}, None, "w is FP8, but its scale_inv is missing"),
    "no weight": ({"w_scale_inv": torch.ones(1, 1)}, None, "w_scale_inv stands beside no FP8 we"),
    "weight in bf16": (
        {"w": torch.zeros(2, 2).bfloat16(), "w_scale_inv": torch.ones(1, 1)},
        None,
        "w_scale_inv stands beside no FP8 weight",
    ),
    "transposed scales": (
        {"w": torch.zeros(2, 200).to(F8), "w_scale_inv": torch.ones(2, 1)},
        None,
        r"w_scale_inv is F32 of shape \(2, 1\); .*needs F32 of shape \(1, 2\)",
    ),
    "one scale for all": (
        {"w": torch.zeros(2, 2).to(F8), "w_scale_inv": torch.ones(())},
        None,
        r"w_scale_inv is F32 of shape \(\);",
    ),
    "scales of float64": (
        {"w": torch.zeros(2, 2).to(F8), "w_scale_inv": torch.ones(1, 1).double()},
        None,
        "w_scale_inv is F64",
    ),
    "not a matrix": ({"w": torch.zeros(2).to(F8)}, None, r"w is F8_E4M3 of shape \(2,\); expected"),
    "other FP8": ({"w": torch.zeros(2, 2).to(F8)}, {"quant_method": "awq"}, "'awq' is not read"),
    "other method": ({}, {"quant_method": "gptq", "bits": 4}, "'gptq' is not read; expected 'fp8'"),
    "no method": ({}, {"bits": 4}, "quant_method None is not read"),
    "a word": ({}, "fp8", "quantization_config must be an object, not 'fp8'"),
    "one block size": (
        {},
        {"quant_method": "fp8", "weight_block_size": [128]},
        r"weight_block_size must be two positive numbers, not \[128\]",
    ),
    "a number for blocks": ({}, {"quant_method": "fp8", "weight_block_size": 128}, "not 128"),
    "empty blocks": ({}, {"quant_method": "fp8", "weight_block_size": [0, 128]}, r"not \[0, 128\]"),
    "blocks of fractions": ({}, {"quant_method": "fp8", "weight_block_size": [1.5, 2]}, "positive"),
}


@pytest.mark.parametrize(("tensors", "quantization", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(tensors, quantization, words):
    with pytest.raises(CheckpointError, match=words):
        pair_scales({n: MemoryTensor(n, t) for n, t in tensors.items()}, quantization)


def change(folder: Path, raw: dict[str, object] | None = None, **tensors: torch.Tensor | None):
    if raw is not None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | raw))
    held = load_file(folder / "model.safetensors") | tensors
    save_file({n: t for n, t in held.items() if t is not None}, folder / "model.safetensors")


def test_refusals_name_file_and_tensor(tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m", dtype=F8)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    file = re.escape(str(tmp_path / "m" / "model.safetensors"))
    change(tmp_path / "m", **{name + "_scale_inv": None})
    with pytest.raises(CheckpointError, match=rf"{file}: {re.escape(name)} is FP8, but its scale"):
        load_huggingface(tmp_path / "m")
    change(tmp_path / "m", **{name + "_scale_inv": torch.ones(1, 1).to(torch.float8_e5m2)})
    with pytest.raises(CheckpointError, match=rf"{file}: {re.escape(name)}_scale_inv"):
        load_huggingface(tmp_path / "m")
    change(tmp_path / "m", **{name: None, name + "_scale_inv": None})
    with pytest.raises(CheckpointError, match=rf"missing: {re.escape(name)}"):
        load_huggingface(tmp_path / "m")


def test_other_method_in_a_folder(tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m")
    change(tmp_path / "m", {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(CheckpointError, match="'bitsandbytes' is not read; expected 'fp8'"):
        load_huggingface(tmp_path / "m")


def test_folder_without_a_quantization_config_may_still_be_fp8(tmp_path):
    """The tensors say it themselves; some conversions forget the config."""
    save_huggingface(tiny_model(), tmp_path / "m", dtype=F8)
    expected = load_huggingface(tmp_path / "m").state_dict()
    change(tmp_path / "m", {"quantization_config": None})
    back = load_huggingface(tmp_path / "m").state_dict()
    assert all(torch.equal(back[name], expected[name]) for name in expected)
