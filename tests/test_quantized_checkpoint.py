"""Quantised folders: made, mapped, run, taken elsewhere; and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qiusuo
from qiusuo.checkpoint import load as loading
from qiusuo.checkpoint import quantize as quantizing
from qiusuo.checkpoint.export import export
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import load_huggingface, save_huggingface
from qiusuo.checkpoint.load import checkpoint_of, load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.quantize import quantize_checkpoint
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import RequestError
from qiusuo.kernels.low_bit import LEVELS, quantize
from qiusuo.kernels.native import VARIABLE, native
from qiusuo.model.cost import needed_bytes
from qiusuo.model.low_bit import LowBitExperts, LowBitLinear, is_low_bit
from qiusuo.training.lora import LoRA
from qiusuo.training.recipe import RecipeError
from tests.commands import Ask, asker, refused
from tests.model.shapes import FAMILIES, tiny_model
from tests.training import lives, tasks

ROOT = Path(__file__).parents[1]
TEXT = "路漫漫其修远兮，吾将上下而求索。 The road is long: abcdefghijklmnopqrstuvwxyz?\n"
IDS = [1, 5, 9, 33, 2, 70, 14, 8]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without native kernels: what is computed is what is written in kernels/low_bit.py."""
    monkeypatch.setenv(VARIABLE, "reference")
    native.cache_clear()
    yield
    native.cache_clear()


def made(place: Path, to: str = "int4", **changes: Any) -> tuple[Path, Path]:
    """A tiny model and the same quantised."""
    plain, small = place / "plain", place / to
    if not plain.exists():
        save_huggingface(tiny_model(**changes), plain)
    quantize_checkpoint(open_checkpoint(plain), small, to)
    return plain, small


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def rewrite(folder: Path, header: dict[str, Any]) -> None:
    """Put another header, of the same length, before the same numbers."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= size
    file.write_bytes(content[:8] + text.ljust(size) + content[8 + size :])


def meant(codes: np.ndarray, scales: np.ndarray, columns: int) -> np.ndarray:
    """What codes and scales stand for, number by number of the format's description."""
    rows, blocks = scales.reshape(-1, scales.shape[-1]).shape
    out = np.zeros((rows, blocks * 32), np.float32)
    codes = codes.reshape(rows, blocks, -1)
    for row in range(rows):
        for block in range(blocks):
            scale = np.float32(scales.reshape(rows, blocks)[row, block])
            for i in range(32):
                if codes.dtype == np.int8:
                    level = int(codes[row, block, i])
                else:
                    byte = int(codes[row, block, i % 16])
                    level = LEVELS[byte & 15 if i < 16 else byte >> 4]
                out[row, block * 32 + i] = level * scale
    return out[:, :columns].reshape(*scales.shape[:-1], columns)


# The file


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_the_file_is_what_the_page_says(tmp_path: Path, to: str) -> None:
    """Read by the safetensors library; names, order, alignment and every number of some weights."""
    _, small = made(tmp_path, to, num_nextn_predict_layers=1)
    bits = int(to[-1])
    config = json.loads((small / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qiusuo", "bits": bits, "block": 32}
    assert config["torch_dtype"] == "bfloat16"
    header, start = header_of(small / "model.safetensors")
    assert start % 64 == 0
    held = {name: entry for name, entry in header.items() if not name.startswith("padding.")}
    assert all(entry["data_offsets"][0] % 64 == 0 for entry in held.values())
    kinds = [name.rpartition(".")[2] for name in held]
    order = ["codes"] * kinds.count("codes") + ["scales"] * kinds.count("scales")
    assert kinds[: len(order)] == order
    assert not {"codes", "scales"} & set(kinds[len(order) :])
    source = load_huggingface(tmp_path / "plain").state_dict()
    with safe_open(small / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(header)
        for weight in (
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.1.mlp.experts.gate_up_proj",
            "model.layers.3.mlp.experts.down_proj",
            "model.layers.2.self_attn.kv_b_proj.weight",
            "model.layers.3.eh_proj.weight",
            "lm_head.weight",
        ):
            stem, columns = weight.removesuffix(".weight"), source[weight].shape[-1]
            codes, scales = file.get_tensor(f"{stem}.codes"), file.get_tensor(f"{stem}.scales")
            eight = bits == 8 or weight.split(".")[-2] in ("lm_head", "kv_b_proj", "eh_proj")
            assert codes.dtype is (torch.int8 if eight else torch.uint8)
            again = meant(codes.numpy(), scales.numpy(), columns)
            error = np.square(again - source[weight].numpy()).sum()
            error /= source[weight].square().sum().item()
            assert error < (1e-4 if eight else 8e-3)
            expected = quantize(source[weight], 8 if eight else 4)
            assert torch.equal(codes, expected.codes)
            assert torch.equal(scales, expected.scales)
        for name, kind in (
            ("model.embed_tokens.weight", torch.bfloat16),
            ("model.norm.weight", torch.bfloat16),
            ("model.layers.1.mlp.gate.weight", torch.float32),
            ("model.layers.1.mlp.gate.e_score_correction_bias", torch.float32),
        ):
            kept = file.get_tensor(name)
            assert kept.dtype is kind
            assert torch.equal(kept, source[name].to(kind))


def test_a_large_model_needs_no_padding(tmp_path: Path) -> None:
    """Sizes as real models have them leave nothing to fill."""
    sizes = dict(hidden_size=128, intermediate_size=256, moe_intermediate_size=64, vocab_size=64)
    heads = dict(q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32)
    heads |= dict(num_attention_heads=4, qk_rope_head_dim=32)
    _, small = made(tmp_path, **sizes, **heads, n_routed_experts=16)
    header, _ = header_of(small / "model.safetensors")
    assert not [name for name in header if name.startswith("padding.")]


# The model


@pytest.mark.parametrize(
    ("family", "to"), [*((family, "int4") for family in FAMILIES), ("v3", "int8")]
)
def test_it_computes_what_its_numbers_mean(
    tmp_path: Path, family: str, to: str, reference: None
) -> None:
    """In float32 and with the reference kernels: the plain model made of the same numbers, which
    the other way of loading gives."""
    plain, small = made(tmp_path, to, **FAMILIES[family])
    low, full = qiusuo.load(small, "float32", quantize=to), qiusuo.load(small, "float32")
    assert is_low_bit(low.model)
    assert not is_low_bit(full.model)
    expected = full.logits(IDS)
    assert (low.logits(IDS) - expected).abs().max() < 1e-5 * expected.abs().max()
    # Made while loading, it is the same bit for bit: but for bf16 norms and embedding, so in bf16.
    state = qiusuo.load(plain, quantize=to).model.state_dict()
    for name, held in qiusuo.load(small).model.state_dict().items():
        assert torch.equal(held, state[name]), name
    loaded = sum(tensor.nbytes for n, tensor in state.items() if _held(full.model, n))
    assert loaded == needed_bytes(low.config, torch.bfloat16, int(to[-1]))


def _held(model: Any, name: str) -> bool:
    return name != "lm_head.weight" or not model.config.tie_word_embeddings


@pytest.mark.parametrize(("to", "most"), [("int8", 0.08), ("int4", 0.5)])
@pytest.mark.parametrize("family", ["v2-lite", "llama", "qwen2-tied"])
def test_it_computes_about_what_the_model_did(
    tmp_path: Path, family: str, to: str, most: float
) -> None:
    """As it is run: bfloat16, whatever kernels there are. Random weights are the hardest."""
    plain, small = made(tmp_path, to, **FAMILIES[family])
    full = qiusuo.load(small, "float32")
    expected, found = full.logits(IDS), qiusuo.load(small).logits(IDS)
    assert (found - expected).std() < 0.08 * expected.std()  # bf16 and the activations' 8 bits
    original = qiusuo.load(plain).logits(IDS)
    assert (found - original).std() < most * original.std()


def test_in_the_engine(tmp_path: Path) -> None:
    """Prompts in pieces, decoding side by side and MTP drafts give the tokens of the model itself;
    in the batch-invariant mode also its log-probabilities, to the bit."""
    _, small = made(tmp_path, num_nextn_predict_layers=1)
    lm = qiusuo.load(small, limits=Limits(batch_invariant=True))
    assert lm.drafting == "mtp"
    prompts: list[Any] = [IDS, IDS[:3], IDS[2:] * 3]
    together = lm.generate(prompts, max_tokens=12)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = qiusuo.load(small, draft="none", limits=Limits(batch_invariant=True))
        [again] = alone.generate([prompt], max_tokens=12)
        assert again.token_ids == answer.token_ids
        assert again.logprobs == answer.logprobs
    for module in lm.model.modules():
        if isinstance(module, LowBitLinear | LowBitExperts):
            assert module.rows is not None


@pytest.mark.parametrize("absorbed", [True, False])
def test_both_forms_of_attention(tmp_path: Path, absorbed: bool, reference: None) -> None:
    _, small = made(tmp_path, "int8")
    below = {"absorbed_below": 1000 if absorbed else 0}
    low = qiusuo.load(small, "float32", quantize="int8", limits=Limits(**below))
    full = qiusuo.load(small, "float32", limits=Limits(**below))
    assert low.model.model.main_blocks[0].self_attn.absorbed is None
    answers = [lm.generate([IDS], max_tokens=10)[0] for lm in (low, full)]
    assert answers[0].token_ids == answers[1].token_ids
    assert low.model.model.main_blocks[0].self_attn.absorbed is not None


# In memory


def smaps(path: Path, pid: int | str = "self") -> dict[str, int]:
    """What the mappings of a file take of a process, in kB by the kernel's words."""
    found: dict[str, int] = {}
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(":")
        if "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and rest.endswith("kB"):
            found[word] = found.get(word, 0) + int(rest.split()[0])
    return found


@linux
def test_pages_are_the_files_own_and_shared(tmp_path: Path) -> None:
    """Nothing is copied; a second process that runs the model takes hardly any memory for it; and
    who writes into the weights changes no file."""
    _, small = made(tmp_path, vocab_size=4096, hidden_size=256)
    file = small / "model.safetensors"
    lm = qiusuo.load(small)
    lm.logits(IDS)
    for name, tensor in lm.model.state_dict().items():
        assert tensor.data_ptr() % 64 == 0, name
    mine = smaps(file)
    assert mine["Size"] * 1024 >= file.stat().st_size
    assert mine["Rss"] > 1000
    assert mine["Anonymous"] == mine["Private_Dirty"] == 0
    code = "\n".join(
        [
            "import json, qiusuo",
            "from pathlib import Path",
            "from tests.test_quantized_checkpoint import IDS, smaps",
            f"lm = qiusuo.load({str(small)!r})",
            "lm.logits(IDS)",
            f"print(json.dumps(smaps(Path({str(file)!r}))))",
        ]
    )
    other = json.loads(run(code))
    assert other["Pss"] < 0.6 * other["Rss"]
    assert other["Anonymous"] == 0
    before = file.read_bytes()
    lm.model.lm_head.codes += 1
    assert file.read_bytes() == before


def run(code: str) -> str:
    """What another Python prints."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@linux
def test_quantizing_holds_a_few_rows(tmp_path: Path) -> None:
    """120 MB of weights, and a few beside what the process had."""
    code = f"""
import torch
from pathlib import Path
from qiusuo.checkpoint.huggingface import write_configs
from qiusuo.checkpoint.load import checkpoint_of
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.quantize import quantize_checkpoint
from qiusuo.checkpoint.safetensors_format import Outgoing, write_file
from qiusuo.checkpoint.tensors import disk_shapes
from tests.model.shapes import tiny_config, tiny_model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
place = Path({str(tmp_path)!r})
quantize_checkpoint(checkpoint_of(tiny_model(), None), place / "warm", "int8")
config = tiny_config(vocab_size=128, hidden_size=1024, moe_intermediate_size=512,
    n_routed_experts=16, num_hidden_layers=3, first_k_dense_replace=1)
row = torch.randn(1 << 20).bfloat16()
def filled(name, shape):
    size = torch.Size(shape).numel()
    def pieces():
        for start in range(0, size, len(row)):
            yield row[:min(len(row), size - start)]
    return Outgoing(name, "BF16", shape, pieces)
tensors = [filled(*pair) for pair in disk_shapes(config).items()]
(place / "big").mkdir()
write_file(place / "big" / "model.safetensors", tensors, lambda count: None)
from dataclasses import replace
big = replace(checkpoint_of(tiny_model(), None), config=config)
write_configs(place / "big", big, torch.bfloat16)
size = (place / "big" / "model.safetensors").stat().st_size
before = peak()
quantize_checkpoint(open_checkpoint(place / "big"), place / "small", "int8")
print(size >> 10, peak() - before)
"""
    size, grown = map(int, run(code).split())
    assert size > 100_000
    assert grown < 30_000


def test_memory_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, small = made(tmp_path)
    config = open_checkpoint(small).config
    needed = needed_bytes(config, torch.bfloat16, 4)
    assert needed < 0.3 * needed_bytes(config, torch.float32)
    monkeypatch.setattr(loading, "available_memory", lambda: needed)
    qiusuo.load(small)
    qiusuo.load(plain, quantize="int4")
    with pytest.raises(CheckpointError, match="of memory in float32"):
        qiusuo.load(plain)
    monkeypatch.setattr(loading, "available_memory", lambda: needed - 1)
    with pytest.raises(CheckpointError, match="of memory in int4, and"):
        qiusuo.load(small)


# From anything, to anything


def test_from_fp8_and_back(tmp_path: Path) -> None:
    """The numbers that FP8 meant are those that are quantised, and a quantised model leaves for
    either format as the numbers that it means."""
    tokenizer = Tokenizer.train_bpe([TEXT], 300)
    model = tiny_model(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1)
    checkpoint = checkpoint_of(model, tokenizer)
    export(checkpoint, tmp_path / "fp8", dtype="fp8")
    export(open_checkpoint(tmp_path / "fp8"), tmp_path / "wide", dtype="float32")
    for source in ("fp8", "wide"):
        quantize_checkpoint(open_checkpoint(tmp_path / source), tmp_path / f"{source}-4", "int4")
    files = [(tmp_path / name / "model.safetensors") for name in ("fp8-4", "wide-4")]
    assert files[0].read_bytes() == files[1].read_bytes()
    small = open_checkpoint(tmp_path / "fp8-4")
    kinds = {tensor.kind for tensor in small.tensors.values()}
    assert kinds == {"INT4", "INT8", "BF16", "F32"}
    expected = qiusuo.load(tmp_path / "fp8-4", "float32").logits(IDS)
    for place in (tmp_path / "hf", tmp_path / "out.gguf"):
        export(small, place, dtype="float32")
        back = qiusuo.load(place, "float32")
        assert (back.logits(IDS) - expected).abs().max() < 1e-5
        assert back.tokenizer is not None
    low = qiusuo.load(tmp_path / "fp8-4")
    low.save(tmp_path / "saved", dtype="float32")
    assert torch.equal(qiusuo.load(tmp_path / "saved").logits(IDS), expected)
    export(small, tmp_path / "main", mtp=False)
    assert qiusuo.load(tmp_path / "main").config.num_nextn_predict_layers == 0


def test_from_gguf(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe([TEXT], 300)
    dense = {"model_type": "qwen2", "hidden_size": 96, "intermediate_size": 64}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    model = tiny_model(vocab_size=tokenizer.vocab_size, **dense, **heads)
    file = export(checkpoint_of(model, tokenizer), tmp_path / "m.gguf", dtype="q8_0")
    quantize_checkpoint(open_checkpoint(file), tmp_path / "int8", "int8")
    lm = qiusuo.load(tmp_path / "int8")
    assert lm.tokenizer is not None
    assert lm.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    # Q8_0 has the same blocks and steps: quantised again, next to nothing changes.
    first, again = (qiusuo.load(p, "float32").model for p in (file, tmp_path / "int8"))
    for name, weight in first.state_dict().items():
        found = again.state_dict()[name]
        assert (found - weight).abs().max() <= 0.005 * weight.abs().max(), name


# Made whole or not at all


@linux
def test_stopped_half_way(tmp_path: Path) -> None:
    """Ctrl-C leaves nothing; a killed process a hidden draft, which goes with the next writing."""
    save_huggingface(tiny_model(), tmp_path / "plain")
    code = f"""
import json, os, signal
from pathlib import Path
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.quantize import quantize_checkpoint

place = Path({str(tmp_path)!r})
for number in (signal.SIGINT, signal.SIGKILL):
    def progress(done, total):
        if done > total / 2:
            os.kill(os.getpid(), number)

    child = os.fork()
    if child == 0:
        try:
            quantize_checkpoint(open_checkpoint(place / "plain"), place / "small", "int4", progress)
        except KeyboardInterrupt:
            os._exit(7)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([ended, sorted(path.name for path in place.iterdir())]))
"""
    (stopped, clean), (killed, left) = map(json.loads, run(code).splitlines())
    assert (stopped, clean) == (7, ["plain"])
    assert killed == -signal.SIGKILL
    assert left[0].startswith(".small.draft-")
    assert left[1:] == ["plain"]
    for name in ("small", "other"):
        quantize_checkpoint(open_checkpoint(tmp_path / "plain"), tmp_path / name, "int4")
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "small", "other"}
    files = [tmp_path / name / "model.safetensors" for name in ("small", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, small = made(tmp_path)
    source = open_checkpoint(plain)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="'int3' is not one of int8, int4"):
        quantize_checkpoint(source, out, "int3")
    for to in ("int8", "int4"):
        with pytest.raises(CheckpointError, match=r"is quantised to int4 already.*made from"):
            quantize_checkpoint(open_checkpoint(small), out, to)
    for place in (small, plain, plain / "config.json"):
        with pytest.raises(CheckpointError, match="is there already: give a new or empty folder"):
            quantize_checkpoint(source, place, "int4")
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(quantizing.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(CheckpointError, match=r"needs .*, and 1[.]0 kB are free on that disk"):
        quantize_checkpoint(source, out, "int4")
    monkeypatch.undo()
    broken = tiny_model()
    broken.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] = float("nan")
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj.*not finite.*doctor"):
        quantize_checkpoint(checkpoint_of(broken, None), out, "int8")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    out.mkdir()
    quantize_checkpoint(source, out, "int4")  # an empty folder may be given


# Damage


def renamed(header: dict[str, Any], old: str, new: str) -> None:
    header[new] = header.pop(old)


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    header, _ = header_of(file)
    config = json.loads((folder / "config.json").read_text())
    match how:
        case "cut":
            os.truncate(file, file.stat().st_size - 100)
        case "renamed":
            header["lm_head.codex"] = header.pop("lm_head.codes")
            rewrite(folder, header)
        case "other type":
            header["lm_head.codes"]["dtype"] = "U8"
            rewrite(folder, header)
        case "other shape":
            header["lm_head.codes"]["shape"].reverse()
            rewrite(folder, header)
        case "rewritten":
            save_file(load_file(file), file)
        case "experts":
            config["n_routed_experts"] = 65_536
        case "layers":
            config["num_hidden_layers"] = 900
        case "bits":
            config["quantization_config"]["bits"] = 8
        case "three":
            config["quantization_config"]["bits"] = 3
        case "block":
            config["quantization_config"]["block"] = 64
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "model.safetensors is cut short"),
        ("renamed", "missing lm_head.codes; surplus lm_head.codex.*qiusuo quantize"),
        ("other type", r"lm_head.codes is U8 of \(97, 64\), not I8 of \(97, 64\)"),
        ("other shape", r"lm_head.codes is I8 of \(64, 97\), not I8 of \(97, 64\)"),
        ("rewritten", "begins at byte .*, no multiple of 64"),
        ("experts", r"not U8 of \(65536, 48, 32\)"),
        ("layers", "counts 900 layers .* go on to layer 2, counted from 0"),
        ("bits", "is not what its config says, a model of 8 bits"),
        ("three", "has 3 bits in blocks of 32; expected 8 or 4 bits in blocks of 32"),
        ("block", "has 4 bits in blocks of 64"),
    ],
)
def test_damage_is_told(tmp_path: Path, how: str, message: str) -> None:
    _, small = made(tmp_path)
    damage(small, how)
    with pytest.raises(CheckpointError, match=message):
        qiusuo.load(small)


def test_a_file_that_shrank_after_it_was_opened(tmp_path: Path) -> None:
    _, small = made(tmp_path)
    checkpoint = open_checkpoint(small)
    os.truncate(small / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="the file shrank"):
        load_model(checkpoint)


# It runs, and does not learn


def test_a_quantised_model_is_not_changed(tmp_path: Path) -> None:
    _, small = made(tmp_path)
    lm = qiusuo.load(small)
    with pytest.raises(
        RequestError, match=r'is quantised.*load it with a dtype, such as "bfloat16"'
    ):
        lm.engine.swap_weights({"model.norm.weight": torch.ones(48)})
    lm.engine.swap_weights({})
    with pytest.raises(CheckpointError, match=r"is quantised.*begin with the model"):
        LoRA(lm.model, torch.Generator())
    with pytest.raises(
        CheckpointError, match=r"quantised to int4 already.*for int8 take the model"
    ):
        qiusuo.load(small, quantize="int8")
    with pytest.raises(CheckpointError, match="quantize 'int2' is not one of int8, int4"):
        qiusuo.load(small, quantize="int2")


def test_training_does_not_begin_with_it(tmp_path: Path) -> None:
    base, small, run = tmp_path / "base", tmp_path / "small", tmp_path / "run"
    assert lives.live(tasks.recipe(tasks.sft(steps=1)), base)
    quantize_checkpoint(open_checkpoint(base), small, "int8")  # a run folder is a model too
    with pytest.raises(
        RecipeError, match="small is quantised to int8 and cannot be trained: begin"
    ):
        lives.live(tasks.recipe(tasks.sft(), base=small), run)


# Commands


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return asker(monkeypatch, capsys)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_huggingface(tiny_model(), "m")
    code, said, told = ask("quantize", "m", "small", "--to", "int4")
    assert (code, told) == (0, "")
    rows = {line.split("  ")[0]: line.split() for line in said.splitlines()}
    assert list(rows)[1:-3] == [
        "embedding", "attention", "norms, routers", "dense layers", "routed experts",
        "shared experts", "head",
    ]  # fmt: skip
    assert rows["routed experts"][2] == "55,296"
    assert rows["routed experts"][7] == "6.00"  # 24 or 48 columns in whole blocks of 32
    assert 3 < float(rows["routed experts"][8].rstrip("%")) < 9
    assert said.endswith("m is in small\n")
    assert "is there already" in refused(ask("quantize", "m", "small", "--to", "int8"))
    assert "'int2' is not one of" in refused(ask("quantize", "m", "other", "--to", "int2"))
    unused = ask("quantize", "m", "other", "--to", "int8", "--calibrate", "no/such")
    assert "--calibrate is for int4" in refused(unused)  # before the text, or anything, is read
    assert "The largest error is that of model.layers." in said
    answer = ask("inspect", "small")
    assert "int4, " in answer.out
    assert "INT4" in answer.out
    assert "Bits per weight" in answer.out
    answer = ask("doctor", "small")
    assert answer.code == 0
    assert "Forward pass: 32 tokens, all finite" in answer.out
    for words in (["chat", "small"], ["chat", "m", "--quantize", "int4"]):
        assert "no chat template" in refused(ask(*words))
    assert "'int2' is not one of" in refused(ask("chat", "m", "--quantize", "int2"))
    assert "cache 'int4' is not one of int8" in refused(ask("chat", "m", "--cache", "int4"))
