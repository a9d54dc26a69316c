"""Hugging Face folders out and in: the same bits, and every damage named."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import (
    load_huggingface,
    open_huggingface,
    save_huggingface,
    write_huggingface,
)
from qiusuo.checkpoint.load import checkpoint_of
from qiusuo.checkpoint.tensors import disk_layout
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.checks import ConfigError
from qiusuo.model.transformer import Transformer
from tests.model.shapes import VARIANTS, tiny_model

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"


def assert_same_bits(actual: Transformer, expected: Transformer) -> None:
    assert actual.config == expected.config
    a, e = actual.state_dict(), expected.state_dict()
    assert list(a) == list(e)
    for name in e:
        assert a[name].dtype == e[name].dtype, name
        assert torch.equal(a[name], e[name]), name


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a saved model, add them, or (None) take them out."""
    file = folder / "model.safetensors"
    held = load_file(file) | tensors
    save_file({n: t.contiguous() for n, t in held.items() if t is not None}, file)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_same_bits_in_float32(changes, tmp_path):
    model = tiny_model(**changes)
    assert save_huggingface(model, tmp_path / "m") == tmp_path / "m"
    back = load_huggingface(tmp_path / "m")
    assert_same_bits(back, model)
    tied = back.lm_head.weight is back.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert all(p.requires_grad and not p.is_meta for p in back.parameters())


def test_same_bits_in_bfloat16_with_float32_biases(tmp_path):
    model = tiny_model()
    biases = {n: r.e_score_correction_bias.clone() for n, r in model.routers().items()}
    model.bfloat16()
    for number, router in model.routers().items():
        router.e_score_correction_bias = biases[number]
    save_huggingface(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    back = load_huggingface(tmp_path / "m")
    assert_same_bits(back, model)
    assert back.routers()[1].e_score_correction_bias.dtype == torch.float32
    assert back.lm_head.weight.dtype == torch.bfloat16


def test_types_asked_for(tmp_path):
    model = tiny_model(num_nextn_predict_layers=1)
    save_huggingface(model, tmp_path / "m", dtype=torch.bfloat16)
    held = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in held.items():
        kept = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    back = load_huggingface(tmp_path / "m", dtype=torch.float32)
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert torch.equal(back.lm_head.weight, model.lm_head.weight.bfloat16().float())
    assert load_huggingface(tmp_path / "m").lm_head.weight.dtype == torch.bfloat16


def test_what_stands_in_the_folder(tmp_path):
    tokenizer = Tokenizer.train_characters(["求索"])
    save_huggingface(tiny_model(eos_token_id=(1, 5)), tmp_path / "m", tokenizer=tokenizer)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    special = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert special == {"bos_token_id": 0, "eos_token_id": [1, 5]}
    assert Tokenizer.load(tmp_path / "m").encode("求索") == tokenizer.encode("求索")


def test_experts_are_apart_on_disk_and_are_the_right_ones(tmp_path):
    model = tiny_model()
    save_huggingface(model, tmp_path / "m")
    held = load_file(tmp_path / "m" / "model.safetensors")
    experts = model.model.layers[2].mlp.experts
    for e in range(8):
        prefix = f"model.layers.2.mlp.experts.{e}."
        assert torch.equal(held[prefix + "gate_proj.weight"], experts.gate_up_proj[e, :24])
        assert torch.equal(held[prefix + "up_proj.weight"], experts.gate_up_proj[e, 24:])
        assert torch.equal(held[prefix + "down_proj.weight"], experts.down_proj[e])
    assert not any("gate_up" in name for name in held)


def test_tied_embedding_is_written_once(tmp_path):
    save_huggingface(tiny_model(tie_word_embeddings=True), tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")


# -- shards -------------------------------------------------------------------------------------


@given(st.integers(1, 400_000))
@settings(max_examples=12)
def test_shards_of_any_size(tmp_path_factory, shard_bytes):
    folder = tmp_path_factory.mktemp("shards") / "m"
    model = tiny_model(num_nextn_predict_layers=1, num_hidden_layers=2)
    save_huggingface(model, folder, shard_bytes=shard_bytes)
    assert_same_bits(load_huggingface(folder), model)
    shards = sorted(folder.glob("*.safetensors"))
    found, total = {}, 0
    for path in shards:
        held = load_file(path)
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= shard_bytes or len(held) == 1
        assert not found.keys() & held.keys()
        found |= dict.fromkeys(held, path.name)
        total += size
    if len(shards) == 1:
        assert shards[0].name == "model.safetensors"
        assert not (folder / INDEX).exists()
        assert total <= shard_bytes
        return
    count = f"{len(shards):05d}"
    assert [p.name for p in shards] == [
        f"model-{n + 1:05d}-of-{count}.safetensors" for n in range(len(shards))
    ]
    index = json.loads((folder / INDEX).read_text())
    assert index == {"metadata": {"total_size": total}, "weight_map": found}


def test_layers_stand_in_their_order(tmp_path):
    model = tiny_model(num_hidden_layers=11, n_shared_experts=0, first_k_dense_replace=11)
    save_huggingface(model, tmp_path / "m", shard_bytes=1)
    order = list(json.loads((tmp_path / "m" / INDEX).read_text())["weight_map"])
    layers = [int(name.split(".")[2]) for name in order if ".layers." in name]
    assert layers == sorted(layers)
    assert layers[-1] == 10


def test_missing_shard_is_named(tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m", shard_bytes=50_000)
    gone = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        load_huggingface(tmp_path / "m")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": [1]}'])
def test_damaged_index_is_named(content, tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m", shard_bytes=50_000)
    (tmp_path / "m" / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        load_huggingface(tmp_path / "m")


# -- MTP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_mtp_copies_are_written(tied, tmp_path):
    model = tiny_model(num_nextn_predict_layers=2, tie_word_embeddings=tied)
    save_huggingface(model, tmp_path / "m")
    held = load_file(tmp_path / "m" / "model.safetensors")
    for layer in (3, 4):
        prefix = f"model.layers.{layer}."
        assert torch.equal(held[prefix + "embed_tokens.weight"], model.model.embed_tokens.weight)
        assert torch.equal(held[prefix + "shared_head.head.weight"], model.lm_head.weight)
    assert_same_bits(load_huggingface(tmp_path / "m"), model)


@pytest.mark.parametrize("copy", ["embed_tokens.weight", "shared_head.head.weight"])
def test_mtp_copies_may_be_absent_but_not_different(copy, tmp_path):
    model = tiny_model(num_nextn_predict_layers=1)
    save_huggingface(model, tmp_path / "m")
    name = "model.layers.3." + copy
    different = load_file(tmp_path / "m" / "model.safetensors")[name].clone()
    change(tmp_path / "m", **{name: None})
    assert_same_bits(load_huggingface(tmp_path / "m"), model)
    different[-1, -1] += 1e-3
    change(tmp_path / "m", **{name: different})
    with pytest.raises(CheckpointError, match=rf"{name} differs from the main model's"):
        load_huggingface(tmp_path / "m")


def test_mtp_copy_without_its_layer_is_surplus(tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m")
    change(tmp_path / "m", **{"model.layers.3.embed_tokens.weight": torch.zeros(97, 48)})
    with pytest.raises(CheckpointError, match=r"surplus: model\.layers\.3\.embed_tokens\.weight"):
        load_huggingface(tmp_path / "m")


# -- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_name() -> list[str]:
    model = tiny_model()
    return [name for name, _ in disk_layout(model.config, model.state_dict())]


@given(st.data())
@settings(max_examples=15)
def test_any_tensor_missing_or_misshapen_is_named(tmp_path_factory, every_name, data):
    folder = tmp_path_factory.mktemp("damage") / "m"
    save_huggingface(tiny_model(), folder)
    name = data.draw(st.sampled_from(every_name))
    tensor = load_file(folder / "model.safetensors")[name]
    change(folder, **{name: torch.cat((tensor, tensor[:1]))})
    longer = (tensor.shape[0] + 1, *tensor.shape[1:])
    with pytest.raises(CheckpointError) as caught:
        load_huggingface(folder)
    assert name in str(caught.value)
    assert f"{longer}" in str(caught.value)
    assert f"{tuple(tensor.shape)}" in str(caught.value)
    change(folder, **{name: None})
    with pytest.raises(CheckpointError, match="missing") as caught:
        load_huggingface(folder)
    assert name in str(caught.value)


def test_shape_that_would_broadcast_is_refused(tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m")
    change(tmp_path / "m", **{"model.norm.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(1,\)"):
        load_huggingface(tmp_path / "m")


def test_misnamed_tensor_is_named_with_the_nearest(tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m")
    right, wrong = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gates.weight"
    change(tmp_path / "m", **{right: None, wrong: torch.zeros(8, 48)})
    with pytest.raises(CheckpointError) as caught:
        load_huggingface(tmp_path / "m")
    assert f"missing: {right} (nearest: {wrong})" in str(caught.value)
    assert f"surplus: {wrong} (nearest: {right})" in str(caught.value)


def test_many_missing_are_counted(tmp_path):
    save_huggingface(tiny_model(num_hidden_layers=2, first_k_dense_replace=2), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing: and \d+ more"):
        load_huggingface(tmp_path / "m")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99, 0.99999])
def test_file_that_was_cut_short(share, tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (damaged, )?cut short"):
        load_huggingface(tmp_path / "m")


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is not there"):
        load_huggingface(tmp_path)
    save_huggingface(tiny_model(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_huggingface(tmp_path / "m")
    save_file({"x": torch.ones(1)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight"):
        load_huggingface(tmp_path / "m")


# -- where it is saved --------------------------------------------------------------------------


def test_saving_over_a_model_replaces_all_of_it(tmp_path):
    save_huggingface(tiny_model(seed=1), tmp_path / "m", shard_bytes=50_000)
    model = tiny_model(seed=2)
    save_huggingface(model, tmp_path / "m")
    assert not list((tmp_path / "m").glob("model-*"))
    assert_same_bits(load_huggingface(tmp_path / "m"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_saving_over_the_folder_a_model_came_from(tmp_path):
    model = tiny_model()
    save_huggingface(model, tmp_path / "m")
    save_huggingface(load_huggingface(tmp_path / "m"), tmp_path / "m")
    assert_same_bits(load_huggingface(tmp_path / "m"), model)


def test_what_is_no_model_is_not_replaced(tmp_path):
    """A run folder, or a home: saving there must not take it away."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("precious")
    save_huggingface(tiny_model(), tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match=r"holds no model but log\.jsonl, model"):
        save_huggingface(tiny_model(), tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").read_text() == "precious"
    with pytest.raises(CheckpointError, match="is a file"):
        save_huggingface(tiny_model(), tmp_path / "run" / "log.jsonl")
    (tmp_path / "empty").mkdir()
    save_huggingface(tiny_model(), tmp_path / "empty")
    assert_same_bits(load_huggingface(tmp_path / "empty"), tiny_model())


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_full_disk_is_an_error_and_leaves_the_old_model(tmp_path):
    """A limit on the size of files stands for a full disk: it needs no disk of its own."""
    save_huggingface(tiny_model(seed=1), tmp_path / "m")
    program = f"""
from pathlib import Path
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import save_huggingface
from tests.model.shapes import tiny_model
try:
    save_huggingface(tiny_model(seed=2), {str(tmp_path / "m")!r})
except CheckpointError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        preexec_fn=_small_files,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: could not write")
    assert "File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert_same_bits(load_huggingface(tmp_path / "m"), tiny_model(seed=1))


def test_load_brings_back_a_model_that_stands_aside(tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.aside")
    assert_same_bits(load_huggingface(tmp_path / "m"), tiny_model())


def test_files_do_not_stay_open(tmp_path):
    """The model owns its memory: the folder may go while the model lives."""
    model = tiny_model()
    save_huggingface(model, tmp_path / "m")
    back = load_huggingface(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))  # zeros into whatever is still mapped
    assert_same_bits(back, model)
    shutil.rmtree(tmp_path / "m")


def test_file_says_it_is_of_torch(tmp_path):
    """Readers of older transformers refuse a file without this mark."""
    save_huggingface(tiny_model(), tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_ends_of_generation_config_count_too(tmp_path):
    save_huggingface(tiny_model(eos_token_id=1), tmp_path / "m")
    generation = tmp_path / "m" / "generation_config.json"
    for said, ends in (([1, 7, 9], (1, 7, 9)), (1, 1), (8, (1, 8)), (None, 1)):
        generation.write_text(json.dumps({"eos_token_id": said}))
        assert open_huggingface(tmp_path / "m").config.eos_token_id == ends
    strange = [f'{{"eos_token_id": {end}}}' for end in STRANGE_ENDS]
    for content in ("[", "[]", "[" * 100_000, *strange):
        generation.write_text(content)
        with pytest.raises(CheckpointError, match=r"m/generation_config\.json"):
            open_huggingface(tmp_path / "m")


STRANGE_ENDS = ['"x"', "[[1]]", "{}", "[true]", "-1", '["a"]', "1.0"]


# -- what is not replaced, what is not written ----------------------------------------------------


def test_a_folder_with_anything_else_is_not_replaced(tmp_path):
    """A config.json makes no model of a project, nor a model of all that lies beside it."""
    project = tmp_path / "proj"
    (project / "src").mkdir(parents=True)
    (project / "config.json").write_text('{"port": 80}')
    (project / "src" / "main.c").write_text("int main;")
    with pytest.raises(CheckpointError, match="holds beside a model src; saving would replace"):
        save_huggingface(tiny_model(), project)
    assert (project / "src" / "main.c").read_text() == "int main;"
    shutil.rmtree(project / "src")
    with pytest.raises(CheckpointError, match=r"holds no model .*model_type None"):
        save_huggingface(tiny_model(), project)
    save_huggingface(tiny_model(), tmp_path / "m")
    for name in ("thesis.tex", "weights.bin", "model.safetensors.old", ".env"):
        (tmp_path / "m" / name).write_text("mine")
        with pytest.raises(CheckpointError, match=f"holds beside a model {name};"):
            save_huggingface(tiny_model(), tmp_path / "m")
        assert (tmp_path / "m" / name).read_text() == "mine"
        (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / "README.md").mkdir()
    with pytest.raises(CheckpointError, match=r"holds beside a model README\.md;"):
        save_huggingface(tiny_model(), tmp_path / "m")


def test_a_model_with_its_papers_is_replaced(tmp_path):
    names = ("README.md", "LICENSE-MODEL", ".gitattributes", "special_tokens_map.json")
    save_huggingface(tiny_model(), tmp_path / "m", shard_bytes=50_000)
    for name in names:
        (tmp_path / "m" / name).write_text("{}")
    save_huggingface(tiny_model(), tmp_path / "m")
    assert not any((tmp_path / "m" / name).exists() for name in names)


@pytest.mark.parametrize("kind", ["I8", "F64", "f32", "Q8_0", "", "F8_E5M2"])
def test_kinds_that_are_not_written(kind, tmp_path):
    with pytest.raises(CheckpointError, match="is not written; expected F32, BF16, F16, F8_E4M3"):
        write_huggingface(checkpoint_of(tiny_model(), None), tmp_path / "m", kind)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_float16_cannot_hold(tmp_path):
    """Neither written nor loaded as infinity; NaN and infinity of the model's own stay."""
    model = tiny_model()
    model.lm_head.weight.data[3, 3] = 1e6
    words = r"lm_head\.weight holds 1e\+06, beyond the largest number of float16, 65504"
    with pytest.raises(CheckpointError, match=words):
        save_huggingface(model, tmp_path / "m", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    save_huggingface(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_huggingface(tmp_path / "m", dtype=torch.float16)
    assert str(tmp_path / "m" / "model.safetensors") in str(caught.value)
    model.lm_head.weight.data[3, 3] = math.inf
    save_huggingface(model, tmp_path / "m", dtype=torch.float16)
    assert load_huggingface(tmp_path / "m").lm_head.weight[3, 3] == math.inf


def test_float32_that_bfloat16_cannot_hold(tmp_path):
    model = tiny_model()
    model.lm_head.weight.data[3, 3] = torch.finfo(torch.float32).max
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds 3\.4"):
        save_huggingface(model, tmp_path / "m", dtype=torch.bfloat16)


def test_float64_is_kept_as_float32(tmp_path):
    model = tiny_model().double()
    write_huggingface(checkpoint_of(model, None), tmp_path / "m")
    assert {t.dtype for t in load_huggingface(tmp_path / "m").state_dict().values()} == {
        torch.float32
    }
