"""Hugging Face folders in and out: config.json, safetensors in one file or sharded, the tokenizer.

Opening reads headers only. Writing goes tensor by tensor from any checkpoint, a model in memory or
another file, so that a conversion never holds a whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError, replacing_folder, restore_folder
from qiusuo.checkpoint.fp8 import (
    QUANTIZATION_CONFIG,
    SCALE,
    is_quantized_name,
    pair_scales,
)
from qiusuo.checkpoint.inventory import check_inventory, check_tokenizer
from qiusuo.checkpoint.load import check_copies, checkpoint_of, load_model
from qiusuo.checkpoint.low_bit import open_low_bit, stored_bits
from qiusuo.checkpoint.safetensors_format import FileTensor, Outgoing, read_header, write_file
from qiusuo.checkpoint.stored import (
    DTYPES,
    KINDS,
    NO_SAMPLING,
    Checkpoint,
    Progress,
    StoredTensor,
    chunks,
    kept_kind,
    narrowed,
)
from qiusuo.checkpoint.tensors import EMBEDDING, copies, mtp_copies
from qiusuo.data.hub_listing import CONFIGURATION, PAPERS, PICKLES
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.kernels.fp8 import SQUARE, quantize
from qiusuo.model.checks import ConfigError
from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import ROUTER_BIAS
from qiusuo.model.families import config_from_file, config_from_hf, read_config_json
from qiusuo.model.names import natural
from qiusuo.model.transformer import Transformer

SHARD_BYTES = 4 << 30
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
# Tables that old Llama files carry though they follow from the config.
_DERIVED = ".rotary_emb.inv_freq"
WRITABLE = ("F32", "BF16", "F16", "F8_E4M3")
# What may stand in a folder that is replaced: what is written here, and what comes with models.
_REPLACEABLE = (
    SINGLE_FILE,
    "model-?????-of-?????.safetensors",
    *CONFIGURATION,
    *PAPERS,
    "NOTICE*",
    "USE_POLICY*",
    ".gitattributes",
    ".pulled.json",
)


def save_huggingface(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    sampling: Mapping[str, float] = NO_SAMPLING,
) -> Path:
    """Write a model in memory; see ``write_huggingface``."""
    checkpoint = checkpoint_of(model, tokenizer, sampling)
    kind = None if dtype is None else KINDS[dtype]
    return write_huggingface(checkpoint, folder, kind, shard_bytes=shard_bytes)


def load_huggingface(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """A model from a folder; see ``load_model``."""
    return load_model(open_huggingface(folder), dtype=dtype, device=device)


# -- in -----------------------------------------------------------------------------------


def open_huggingface(folder: str | Path) -> Checkpoint:
    """A folder's headers. Raises CheckpointError (or ConfigError) for what cannot be read."""
    folder = Path(folder)
    restore_folder(folder)
    raw = read_config_json(folder)
    generation = _read_generation(folder)
    config = _with_all_ends(config_from_hf(raw), generation, folder)
    found = {n: t for n, t in _find_tensors(folder).items() if not n.endswith(_DERIVED)}
    quantization, low_bit = raw.get("quantization_config"), None
    if (bits := stored_bits(quantization)) is not None:
        tensors, low_bit = open_low_bit(folder, found, config, bits)
    else:
        tensors = pair_scales(found, quantization)
    return Checkpoint(
        folder,
        "Hugging Face" if bits is None else f"int{bits}",
        config,
        tensors,
        lambda: _read_tokenizer(folder),
        _read_sampling(generation),
        low_bit,
    )


def _read_sampling(generation: dict[str, Any]) -> dict[str, float]:
    """A recommendation that makes no sense is none: nobody has to follow it."""
    read: dict[str, float] = {}
    for name, most in (("temperature", 100.0), ("top_p", 1.0)):
        value = generation.get(name)
        if isinstance(value, int | float) and value is not True and 0 < value <= most:
            read[name] = value
    top_k = generation.get("top_k")
    if type(top_k) is int and top_k > 0:
        read["top_k"] = top_k
    return read


def _read_generation(folder: Path) -> dict[str, Any]:
    file = folder / GENERATION_FILE
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not {type(raw).__name__}")
    return raw


def _with_all_ends(config: ModelConfig, generation: dict[str, Any], folder: Path) -> ModelConfig:
    """Tuned models often name the end of a turn in generation_config.json alone."""
    ends = generation.get("eos_token_id")
    new = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and end >= 0 for end in new):
        raise CheckpointError(
            f"{folder / GENERATION_FILE}: eos_token_id must be the number of a token, not {ends!r}"
        )
    said = config.eos_token_id
    known = [] if said is None else list(said) if isinstance(said, tuple) else [said]
    every = list(dict.fromkeys(known + new))
    if every == known:
        return config
    return replace(config, eos_token_id=every[0] if len(every) == 1 else tuple(every))


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def _find_tensors(folder: Path) -> dict[str, FileTensor]:
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        weight_map = _read_index(index)
        if single.is_file() and set(weight_map.values()) != {SINGLE_FILE}:
            raise CheckpointError(
                f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}, which names other files: "
                f"transformers would read {SINGLE_FILE} alone; remove the one that is not meant"
            )
        return _sharded_tensors(folder, weight_map)
    if single.is_file():
        return read_header(single)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights in a pickle ({pickles[0]}), which can run any code when it "
            "is read and is refused; ask for safetensors, or convert it where you trust it"
        )
    raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map must give every tensor a file name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of tensors: {error!r}") from error
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places {name} in {file!r}; expected a .safetensors file of this folder"
            )
    return dict(weight_map)


def _sharded_tensors(folder: Path, weight_map: dict[str, str]) -> dict[str, FileTensor]:
    tensors: dict[str, FileTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing, but {INDEX_FILE} names it")
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{tensor.place} stands in {tensors[name].path} too")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(f"{folder / file} does not hold {name}, as {INDEX_FILE} says")
    return tensors


# -- out ----------------------------------------------------------------------------------


def write_huggingface(
    checkpoint: Checkpoint,
    folder: str | Path,
    kind: str | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write config.json, safetensors and the tokenizer.

    ``kind``: "F32", "BF16", "F16", "F8_E4M3" (the rest then in bf16), or None for the type the
    embedding is stored in, BF16 if that is a quantised one. Router biases stay float32; MTP
    modules get their copies of embedding and head. The folder is replaced whole or not at all; one
    that holds anything other than a model is left alone, with a CheckpointError."""
    if kind is not None and kind not in WRITABLE:
        raise CheckpointError(f"kind {kind!r} is not written; expected {', '.join(WRITABLE)}")
    folder = Path(folder)
    _check_place(folder)
    check_inventory(checkpoint)
    tokenizer = checkpoint.read_tokenizer()
    check_tokenizer(checkpoint, tokenizer)
    check_copies(checkpoint, checkpoint.tensors)
    kind = kind or kept_kind(checkpoint.tensors[EMBEDDING].kind)
    with replacing_folder(folder) as draft:
        if kind == "F8_E4M3":
            write_configs(draft, checkpoint, torch.bfloat16, QUANTIZATION_CONFIG)
        else:
            write_configs(draft, checkpoint, DTYPES[kind])
        outgoing = [piece for pair in _sources(checkpoint) for piece in _outgoing(*pair, kind)]
        _write_shards(draft, outgoing, shard_bytes, progress)
        if tokenizer is not None:
            tokenizer.save(draft)
    return folder


def _check_place(folder: Path) -> None:
    """Writing replaces a whole folder: not one that holds a run, or someone's home."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give a folder for the model")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    if not found:
        return
    remedy = "saving would replace it all: give a new or empty folder"
    model = (folder / "config.json").is_file()
    others = [path.name for path in found if not (model and _is_replaceable(path))]
    if others:
        what = "beside a model" if model else "no model but"
        listed = ", ".join(others[:3]) + (" ..." if others[3:] else "")
        raise CheckpointError(f"{folder} holds {what} {listed}; {remedy}")
    try:
        config_from_file(folder)
    except ConfigError as error:
        raise CheckpointError(f"{folder} holds no model ({error}); {remedy}") from error


def _is_replaceable(path: Path) -> bool:
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _REPLACEABLE)


def write_configs(
    folder: Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """config.json and generation_config.json. ``dtype``: of what is not quantised."""
    config = checkpoint.config.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    _write_json(folder / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(folder / GENERATION_FILE, special | dict(checkpoint.sampling))


def _sources(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor to write, layer by layer: a tied head once, an MTP module's copies always."""
    tensors = dict(checkpoint.tensors)
    for name in copies(checkpoint.config):
        tensors.pop(name, None)
    for name, original in mtp_copies(checkpoint.config):
        tensors[name] = checkpoint.tensors[original]
    for name in sorted(tensors, key=natural):
        yield name, tensors[name]


def _outgoing(name: str, source: StoredTensor, kind: str) -> Iterator[Outgoing]:
    if kind == "F8_E4M3" and is_quantized_name(name):
        yield from _fp8_outgoing(name, source)
        return
    kind = "F32" if name.endswith(ROUTER_BIAS) else "BF16" if kind == "F8_E4M3" else kind

    def pieces() -> Iterator[Tensor]:
        for _, rows in chunks(source):
            yield narrowed(rows, DTYPES[kind], source.place)

    yield Outgoing(name, kind, source.shape, pieces)


def _fp8_outgoing(name: str, source: StoredTensor) -> Iterator[Outgoing]:
    """The weight, and after it the scales that came out while it was written."""
    scales: list[Tensor] = []
    block = QUANTIZATION_CONFIG["weight_block_size"]

    def pieces() -> Iterator[Tensor]:
        for _, rows in chunks(source, row_multiple=block[0]):
            numbers, scale = quantize(rows, SQUARE)[:2]
            if not scale.isfinite().all():
                raise CheckpointError(
                    f"{source.place} holds numbers that are not finite (NaN or infinity), which "
                    "FP8 blocks cannot keep: write it as BF16"
                )
            scales.append(scale)
            yield numbers

    yield Outgoing(name, "F8_E4M3", source.shape, pieces)
    shape = tuple(-(-n // b) for n, b in zip(source.shape, block, strict=True))
    yield Outgoing(name + SCALE, "F32", shape, lambda: scales)


def _write_shards(
    folder: Path, tensors: list[Outgoing], shard_bytes: int, progress: Progress | None
) -> None:
    """Files of up to ``shard_bytes`` each; with one alone no index is needed."""
    shards: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    total = sum(tensor.bytes for tensor in tensors)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    if len(shards) == 1:
        write_file(folder / SINGLE_FILE, tensors, wrote)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, wrote)
        where |= dict.fromkeys((tensor.name for tensor in shard), file)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
