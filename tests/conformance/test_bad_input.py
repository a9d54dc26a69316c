"""Folders that are damaged or lie: each is refused by name, before anything large is allocated.

And writing that is stopped half-way: what was there stays, what was begun goes.
"""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from qiusuo.checkpoint import inventory
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import (
    load_huggingface,
    open_huggingface,
    save_huggingface,
    write_huggingface,
)
from qiusuo.checkpoint.tensors import disk_shapes
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.checks import ConfigError
from qiusuo.model.families import config_from_hf
from tests.model.shapes import tiny_model
from tests.model.test_published import V3

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model with an MTP module, in one file and in shards."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_model(num_nextn_predict_layers=1)
    save_huggingface(model, folder / "one")
    save_huggingface(model, folder / "many", shard_bytes=50_000)
    return folder


@pytest.fixture
def one(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "one", tmp_path / "m"))


@pytest.fixture
def many(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "many", tmp_path / "m"))


class Largest(TorchDispatchMode):
    """Watches every tensor that is made, and keeps the size of the largest with storage."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta":
            self.bytes = max(self.bytes, out.nbytes)
        return out


def refusal(folder: Path, load: Callable[[Path], object] = load_huggingface) -> str:
    """The message with which a folder is refused; nothing may have been read or made for it."""
    with Largest() as largest, pytest.raises((CheckpointError, ConfigError)) as caught:
        load(folder)
    assert largest.bytes <= 64
    assert str(folder) in str(caught.value) or isinstance(caught.value, ConfigError)
    return str(caught.value)


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    held = load_file(file) | tensors
    save_file({n: t for n, t in held.items() if t is not None}, file)


def reindex(folder: Path, name: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def test_the_watch_sees_what_loading_allocates(one):
    with Largest() as largest:
        load_huggingface(one)
    assert largest.bytes > 10_000


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_shard(share, many):
    shard = shard_of(many, NORM)
    content = shard.read_bytes()
    shard.write_bytes(content[: int(share * len(content))])
    message = refusal(many)
    assert message.startswith(f"{shard} is ")
    assert "cut short" in message
    if share > 0.9:
        assert re.search(r"cut short: model\.layers\.\S+ ends at byte", message)


def test_shard_that_is_not_there(many):
    shard = shard_of(many, NORM)
    shard.unlink()
    assert refusal(many) == f"{shard} is missing, but {INDEX} names it"


@pytest.mark.parametrize(
    "content", [b"not a file of tensors at all", b"\x80\x02}q\x00.", b"PK\3\4"]
)
def test_file_of_another_kind(content, one):
    (one / WEIGHTS).write_bytes(content)
    assert "not a safetensors file" in refusal(one)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "m.pth", "x.ckpt"]
)
def test_pickle(name, one):
    """It is not opened: its bytes would be code."""
    (one / WEIGHTS).unlink()
    (one / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    message = refusal(one)
    assert f"pickle ({name})" in message
    assert "ask for safetensors" in message


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/abs/outside.safetensors",
        "sub/inside.safetensors",
        "..",
        ".",
        "",
        "model.bin",
        "./x.safetensors",
    ],
)
def test_index_that_points_out_of_the_folder(file, many):
    (many / "sub").mkdir()
    for place in (many.parent / "outside.safetensors", many / "sub" / "inside.safetensors"):
        save_file({NORM: torch.ones(48)}, place)
    reindex(many, NORM, file)
    message = refusal(many)
    assert f"{INDEX} places {NORM} in {file!r}" in message
    assert "expected a .safetensors file of this folder" in message


def test_index_with_the_other_slash(many):
    """On Windows a path, here a strange name; in both cases nothing is opened."""
    file = "..\\outside.safetensors"
    reindex(many, NORM, file)
    message = refusal(many)
    assert file in message or repr(file) in message


def test_index_that_names_a_tensor_its_shard_lacks(many):
    shard = shard_of(many, NORM)
    change(shard, **{NORM: None})
    assert f"{shard} does not hold {NORM}, as {INDEX} says" in refusal(many)


def test_index_that_names_the_wrong_shard(many):
    other = next(file for file in sorted(many.glob("model-*")) if file != shard_of(many, NORM))
    reindex(many, NORM, other.name)
    assert f"{other} does not hold {NORM}" in refusal(many)


def test_one_tensor_in_two_shards(many):
    other = next(file for file in sorted(many.glob("model-*")) if file != shard_of(many, NORM))
    change(other, **{NORM: torch.ones(48)})
    message = refusal(many)
    assert f": {NORM} stands in " in message
    assert other.name in message
    assert shard_of(many, NORM).name in message


@pytest.mark.parametrize(
    "content", ["[]", "", "{", "3", "null", '{"weight_map": {"a": 1}}', "[" * 100_000, "\x00"]
)
def test_index_that_is_none(content, many):
    (many / INDEX).write_text(content)
    assert f"{INDEX} is not an index of tensors" in refusal(many)


# -- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "must hold a JSON object, not list"),
        ('"deepseek_v3"', "must hold a JSON object, not str"),
        ("null", "must hold a JSON object, not NoneType"),
        ("", "is not valid JSON"),
        ("{'model_type': 3}", "is not valid JSON"),
        ("{}", "model_type None is not one of"),
        ('{"model_type": "llama"}', "lacks vocab_size"),
    ],
)
def test_config_that_is_none(content, words, one):
    (one / "config.json").write_text(content)
    assert words in refusal(one)


def test_config_in_another_encoding(one):
    (one / "config.json").write_bytes('{"model_type": "é"}'.encode("latin-1"))
    assert "config.json is not valid JSON" in refusal(one)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v32", "qwen3", "", 3, None])
def test_unknown_architecture(model_type, one):
    configure(one, model_type=model_type)
    message = refusal(one)
    assert f"model_type {model_type!r} is not one of deepseek_v3, deepseek_v2, qwen2" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -48}, "hidden_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"vocab_size": "97"}, "vocab_size"),
        ({"n_group": 3}, "n_routed_experts 8 is not a multiple of n_group 3"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq' is not read"),
        ({"quantization_config": "fp8"}, "must be an object, not 'fp8'"),
    ],
)
def test_config_with_impossible_values(changes, words, one):
    configure(one, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(words)):
        load_huggingface(one)


DEEP = "[" * 100_000


def test_config_that_is_nested_without_end(one):
    (one / "config.json").write_text('{"model_type": ' + DEEP)
    assert f"{one / 'config.json'} is not valid JSON" in refusal(one)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": []}, "model_type [] is not one of"),
        ({"model_type": {}}, "model_type {} is not one of"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, not 'yarn'"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object, not [1]"),
        ({"rope_parameters": "x"}, "rope_parameters must be an object, not 'x'"),
        ({"rope_scaling": {"rope_type": []}}, "rope_scaling type [] is not supported"),
        ({"rope_scaling": {"rope_type": {}}}, "rope_scaling type {} is not supported"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a number"),
        ({"eos_token_id": {}}, "eos_token_id must be the number of a token, not {}"),
        ({"eos_token_id": [[1]]}, "eos_token_id must be the number of a token, not [1]"),
        ({"eos_token_id": "foo"}, "eos_token_id must be the number of a token, not 'foo'"),
        ({"eos_token_id": ["a"]}, "eos_token_id must be the number of a token, not 'a'"),
        ({"eos_token_id": [None]}, "eos_token_id must be the number of a token, not None"),
        ({"bos_token_id": True}, "bos_token_id must be the number of a token, not True"),
        ({"vocab_size": 10**30}, f"vocab_size {10**30} is beyond what any model has"),
        ({"hidden_size": 2**31}, "hidden_size 2147483648 is beyond"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps 1000"),
        ({"num_hidden_layers": 1_000_000}, "num_nextn_predict_layers, 1000001 is beyond"),
        ({"num_nextn_predict_layers": 1_000_000}, "num_nextn_predict_layers, 1000003 is beyond"),
        ({"n_routed_experts": 10**8}, "n_routed_experts 100000000 is beyond"),
        ({"n_routed_experts": []}, "n_routed_experts must be a whole number"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, "no model can have the sizes"),
    ],
    ids=str,
)
def test_config_that_is_made_to_break_its_reader(changes, words, one):
    configure(one, **changes)
    assert words in refusal(one)


def test_more_experts_than_names_would_fit(one, monkeypatch):
    """Within every limit, and still two hundred million names: told before any is made."""
    monkeypatch.setattr("qiusuo.model.cost.meta_model", None)
    configure(one, num_hidden_layers=1000, n_routed_experts=65536)
    message = refusal(one)
    assert "that counts 1001 layers" in message
    assert "of 65536 experts" in message
    assert "the files go on to layer 3 and expert 7, counted from 0" in message


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config.json", DEEP, "is not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token must be a token's text, not 5"),
        ("tokenizer_config.json", '{"eos_token": {"content": []}}', "eos_token must be"),
        ("tokenizer_config.json", '{"chat_template": ["x"]}', "chat_template must be a text or"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": [], "template": 1}]}', "chat_templ"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template must be a text, not 5"),
        ("tokenizer_config.json", '{"add_bos_token": "x"}', "add_bos_token must be true or false"),
        ("chat_template.jinja", "\udcff", "is not UTF-8"),
    ],
    ids=lambda x: x[:40],
)
def test_tokenizer_files_made_to_break_their_reader(file, content, words, one):
    Tokenizer.train_characters(["abc"]).save(one)
    (one / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as caught:
        open_huggingface(one).read_tokenizer()
    assert str(one / file) in str(caught.value)
    assert words in str(caught.value)


# -- config and weights that contradict each other ------------------------------------------------

COUNTED = "config.json counts {} layers (num_hidden_layers) and {} MTP modules"


def test_missing_tensor(one):
    change(one / WEIGHTS, **{NORM: None})
    assert f"missing: {NORM}" in refusal(one)


def test_surplus_tensor(one):
    change(one / WEIGHTS, **{"model.layers.1.self_attn.q_bias": torch.ones(3)})
    assert "surplus: model.layers.1.self_attn.q_bias" in refusal(one)


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers", "model", "model.layers.²", "model.layers.-1.x", "model.layers.1", "…"),
        *(f"model.layers.{'9' * 5000}.x", f"model.layers.1.mlp.experts.{'9' * 5000}.x"),
    ],
    ids=lambda name: name[:30],
)
def test_surplus_tensor_with_a_strange_name(name, one):
    change(one / WEIGHTS, **{name: torch.ones(3)})
    assert f"surplus: {name:.200}" in refusal(one)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_numbers_that_are_no_weights(dtype, one, tmp_path):
    change(one / WEIGHTS, **{NORM: torch.ones(48, dtype=dtype)})
    for use in (load_huggingface, lambda folder: convert(folder, tmp_path / "new")):
        message = refusal(one, use)
        assert f"{one / WEIGHTS}: {NORM} is stored as " in message
        assert "which is no type of weights" in message


def test_one_file_and_an_index_of_others(made, many):
    shutil.copy(made / "one" / WEIGHTS, many / WEIGHTS)
    message = refusal(many)
    assert f"{many} holds both {WEIGHTS} and {INDEX}" in message
    assert f"transformers would read {WEIGHTS} alone" in message
    names = json.loads((many / INDEX).read_text())["weight_map"]
    (many / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    load_huggingface(many)  # an index of the one file says nothing else


@pytest.mark.parametrize("shape", [(49,), (1,), (48, 1), (), (0,)])
def test_wrong_shape(shape, one):
    change(one / WEIGHTS, **{NORM: torch.ones(shape)})
    assert f"{one / WEIGHTS}: {NORM} has shape {shape}, expected (48,)" in refusal(one)


def test_too_few_layers_in_the_config(one):
    configure(one, num_hidden_layers=2)  # layer 2 is then MTP's, layer 3 nobody's
    message = refusal(one)
    assert COUNTED.format(2, 1) in message
    assert "the files go on to layer 3" in message


def test_too_many_layers_in_the_config(one):
    configure(one, num_hidden_layers=7)
    message = refusal(one)
    assert COUNTED.format(7, 1) in message
    assert "the files go on to layer 3" in message
    assert re.search(r"missing: and \d+ more", message)


def test_no_mtp_in_the_config(one):
    configure(one, num_nextn_predict_layers=0)
    message = refusal(one)
    assert COUNTED.format(3, 0) in message
    assert "surplus: model.layers.3.eh_proj.weight" in message


@pytest.mark.parametrize("modules", [1, 2])
def test_mtp_in_the_config_alone(modules, one):
    """Half the conversions of V3 leave its module out and its count in."""
    held = load_file(one / WEIGHTS)
    if modules == 1:
        held = {name: t for name, t in held.items() if ".layers.3." not in name}
        save_file(held, one / WEIGHTS)
    configure(one, num_nextn_predict_layers=modules)
    message = refusal(one)
    assert "All of it belongs to MTP modules" in message
    assert f"set num_nextn_predict_layers to {modules - 1} in its config.json (now {modules})" in (
        message
    )
    configure(one, num_nextn_predict_layers=modules - 1)
    load_huggingface(one)  # the advice helps


def test_untied_in_the_config_alone(tmp_path):
    save_huggingface(tiny_model(tie_word_embeddings=True), tmp_path / "m")
    configure(tmp_path / "m", tie_word_embeddings=False)
    message = refusal(tmp_path / "m")
    assert "missing: lm_head.weight" in message
    assert "must say tie_word_embeddings: true" in message


def test_tied_head_that_is_another(tmp_path):
    """Neither loading nor converting may silently drop a head."""
    model = tiny_model(tie_word_embeddings=True)
    save_huggingface(model, tmp_path / "m")
    head = model.lm_head.weight.detach() + 1
    change(tmp_path / "m" / WEIGHTS, **{"lm_head.weight": head})
    for use in (load_huggingface, lambda folder: convert(folder, tmp_path / "new")):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the main model's"):
            use(tmp_path / "m")
    assert not (tmp_path / "new").exists()


def test_tokenizer_bigger_than_the_embedding(one, tmp_path):
    from qiusuo.engine.loading import load

    text = "".join(chr(0x4E00 + number) for number in range(200))
    Tokenizer.train_characters([text]).save(one)
    for use in (load, lambda folder: convert(folder, tmp_path / "new")):
        message = refusal(one, use)
        assert re.search(r"the tokenizer has 2\d\d tokens, the embedding only 97 rows", message)


# -- size -----------------------------------------------------------------------------------------


def test_not_enough_memory(one, monkeypatch):
    monkeypatch.setattr("qiusuo.checkpoint.load.available_memory", lambda: 100_000)
    message = refusal(one)
    assert re.search(r"needs \d+\.\d kB of memory in float32, and 100\.0 kB are free", message)
    assert "choose a smaller dtype" in message
    monkeypatch.setattr("qiusuo.checkpoint.load.available_memory", lambda: 10_000_000)
    load_huggingface(one)


def write_sparse(folder: Path, raw: dict[str, Any]) -> None:
    """A whole model in bfloat16 as its header and one long hole."""
    header, start = {}, 0
    for name, shape in disk_shapes(config_from_hf(raw)).items():
        stop = start + 2 * torch.Size(shape).numel()
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        header[name], start = entry, stop
    text = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(raw))
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)


def test_a_model_larger_than_any_machine(tmp_path):
    """Three terabytes, whole and in order: only the memory is missing."""
    sizes = dict(hidden_size=32768, intermediate_size=131072, num_hidden_layers=90)
    raw = {"model_type": "llama", "vocab_size": 97, "num_attention_heads": 32, **sizes}
    write_sparse(tmp_path, raw)
    assert (tmp_path / WEIGHTS).stat().st_size > 3e12
    message = refusal(tmp_path)
    assert re.search(r"needs 309\d\.\d GB of memory in bfloat16, and .* GB are free", message)


@pytest.mark.filterwarnings("ignore:config.json keys")
def test_config_of_v3_beside_a_tiny_file(one):
    """Said at once, with the first few of 46,000 names."""
    (one / "config.json").write_text(json.dumps(V3))
    message = refusal(one)
    assert re.search(r"missing: and 4[5-7]\d\d\d more", message)
    assert COUNTED.format(61, 1) in message
    assert len(message.splitlines()) < 15


def test_names_of_v3_that_are_all_others(tmp_path, monkeypatch):
    """The nearest name is looked for in its own layer: among all it would take half a minute."""
    compare, looked_at = inventory.difflib.get_close_matches, []

    def watched(name: str, others: list[str], most: int) -> list[str]:
        looked_at.append(len(others))
        return compare(name, others, most)

    monkeypatch.setattr(inventory.difflib, "get_close_matches", watched)
    write_sparse(tmp_path, {k: v for k, v in V3.items() if k != "quantization_config"})
    file = tmp_path / WEIGHTS
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        text = handle.read(length).replace(b".gate_proj.", b".gate_prot.")
        handle.seek(8)
        handle.write(text)
    message = refusal(tmp_path)
    assert 0 < max(looked_at) < 1000
    name = "model.layers.0.mlp.gate_pro{}.weight"
    assert f"missing: {name.format('j')} (nearest: {name.format('t')})" in message


# -- writing --------------------------------------------------------------------------------------


def convert(source: Path, target: Path, kind: str = "BF16", progress: Any = None) -> None:
    write_huggingface(open_huggingface(source), target, kind, shard_bytes=60_000, progress=progress)


def in_a_child(program: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``program``; ``limit``: no file may grow beyond it, as on a full disk."""

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    start = "import os, signal\nfrom pathlib import Path\n"
    start += "from tests.conformance.test_bad_input import convert\n"
    return subprocess.run(
        [sys.executable, "-c", start + program],
        cwd=ROOT,
        preexec_fn=small_files if limit else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3"])
def test_full_disk(kind, one, tmp_path):
    """Said as such; a new folder is not begun, an old one stays as it was."""
    convert(one, tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    program = f"""
from qiusuo.checkpoint.files import CheckpointError
for name in ("old", "new"):
    try:
        convert(Path({str(one)!r}), Path({str(tmp_path)!r}, name), {kind!r})
    except CheckpointError as error:
        print(error)
"""
    done = in_a_child(program, limit=20_000)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for line, name in zip(said, ("old", "new"), strict=True):
        assert line.startswith(f"could not write {tmp_path / name}: ")
        assert "File too large" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_killed_conversion(old, one, tmp_path):
    if old:
        convert(one, tmp_path / "out", "F32")
    program = f"""
def die(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert(Path({str(one)!r}), Path({str(tmp_path / "out")!r}), progress=die)
"""
    assert in_a_child(program).returncode == -signal.SIGKILL
    assert (tmp_path / "out").exists() == old
    if old:
        assert load_huggingface(tmp_path / "out").lm_head.weight.dtype == torch.float32
    convert(one, tmp_path / "out")  # the next one clears up
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]
    assert load_huggingface(tmp_path / "out").lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupted_conversion(error, one, tmp_path):
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise error

    with pytest.raises(error):
        convert(one, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_source_that_shrinks_while_it_is_converted(one, tmp_path):
    def shrink(done: int, total: int) -> None:
        if done > total / 2:
            with (one / WEIGHTS).open("r+b") as file:
                file.truncate(20_000)

    with pytest.raises(CheckpointError, match="cannot be read to its end: the file shrank"):
        convert(one, tmp_path / "out", progress=shrink)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_damaged_source_is_refused_before_a_byte_is_written(one, tmp_path):
    change(one / WEIGHTS, **{NORM: torch.ones(3)})
    with pytest.raises(CheckpointError, match=re.escape(NORM)):
        convert(one, tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_progress_counts_every_byte(one, tmp_path):
    for kind in ("F32", "BF16", "F8_E4M3"):
        told: list[tuple[int, int]] = []
        convert(
            one, tmp_path / kind, kind, lambda done, total, told=told: told.append((done, total))
        )
        written = sum(
            t.nbytes for f in (tmp_path / kind).glob("*.safetensors") for t in load_file(f).values()
        )
        assert told[-1] == (written, written)
        assert told == sorted(told)
