"""Hugging Face folders in and out: config.json and safetensors, in one file or sharded.

Reading maps the files into memory and copies tensor by tensor into the model's own storage, so the
model is never held twice. Every tensor must be where the config says and no other may be there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError, replacing_folder, restore_folder
from qiusuo.checkpoint.tensors import disk_layout, memory_state, mtp_copies
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.families import config_from_file
from qiusuo.model.transformer import Transformer

SHARD_BYTES = 4 << 30
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def save_huggingface(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write config.json, safetensors and the tokenizer. ``dtype=None`` keeps the weights' type;
    router biases stay float32. The folder is replaced whole or not at all; a folder that holds
    something other than a model is left alone, with a CheckpointError."""
    folder = Path(folder)
    _check_place(folder)
    with replacing_folder(folder) as draft:
        dtype = dtype or model.model.embed_tokens.weight.dtype
        config = model.config.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        _write_json(draft / "config.json", config)
        special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(draft / "generation_config.json", special)
        _write_shards(draft, _tensors_to_write(model, dtype), shard_bytes)
        if tokenizer is not None:
            tokenizer.save(draft)
    return folder


def load_huggingface(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Transformer:
    """A model from a folder. ``dtype=None`` takes the files' own type (the embedding's).

    Raises CheckpointError naming the tensor that is missing, surplus or of the wrong shape.
    """
    folder = Path(folder)
    restore_folder(folder)
    config = config_from_file(folder)
    with ExitStack() as stack:
        files = _open_tensors(folder, stack)
        if "model.embed_tokens.weight" not in files:
            raise CheckpointError(f"{folder}: model.embed_tokens.weight is missing")
        if dtype is None:
            dtype = files["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight").dtype
        with torch.device("meta"):
            model = Transformer(config)
        state = _allocate(model, dtype, torch.device(device))
        layout = dict(disk_layout(config, state))
        copies = dict(mtp_copies(config))
        _check_names(folder, set(files), set(layout), set(copies))
        for name, part in layout.items():
            _copy(folder, name, files[name].get_tensor(name), part.of(state))
        for name, original in copies.items():
            if name in files:
                _check_copy(folder, name, files[name].get_tensor(name), state[original])
    model.load_state_dict(state, assign=True, strict=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _check_place(folder: Path) -> None:
    """Saving replaces a whole folder: not one that holds a run, or someone's home."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give a folder for the model")
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    if found := sorted(path.name for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds no model but {', '.join(found[:3])}{' ...' if found[3:] else ''}; "
            "saving would replace it all: give a new or empty folder"
        )


def _tensors_to_write(model: Transformer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    state = memory_state(model)
    places: dict[str, Tensor] = {}
    for name, part in disk_layout(model.config, state):
        places[name] = part.of(state)
    for name, original in mtp_copies(model.config):
        places[name] = state[original]
    for name in sorted(places, key=_natural):
        kept = name.endswith("e_score_correction_bias")
        yield name, places[name].to("cpu", torch.float32 if kept else dtype).contiguous()


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Layer 2 before layer 10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Fill files up to ``shard_bytes`` each, holding no more than one of them in memory."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        try:
            file = folder / f"shard-{len(shards)}"
            save_file(_own_storage(pending), file, {"format": "pt"})
            file.chmod((folder / "config.json").stat().st_mode)  # it is made for the owner alone
        except SafetensorError as error:  # a full disk, in Rust's words
            raise CheckpointError(
                f"could not write the weights in {folder.parent}: {error}"
            ) from error
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE_FILE)
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        where |= dict.fromkeys(names, file)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


def _own_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory: the MTP copies do until cloned."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return owned


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of every tensor name."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = sorted({folder / file for file in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of tensors: {error!r}") from error
    elif (folder / SINGLE_FILE).is_file():
        paths = [folder / SINGLE_FILE]
    else:
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    tensors: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {INDEX_FILE} names it")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged or cut short: {error}") from error
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _allocate(model: Transformer, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    kept = "e_score_correction_bias"
    return {
        name: torch.empty(
            tensor.shape, dtype=torch.float32 if name.endswith(kept) else dtype, device=device
        )
        for name, tensor in model.state_dict().items()
    }


def _check_names(folder: Path, found: set[str], expected: set[str], optional: set[str]) -> None:
    scales = [name for name in found if name.endswith("_scale_inv")]
    if scales:
        raise CheckpointError(f"{folder} holds FP8 weights ({scales[0]}), which are not read yet")
    missing = sorted(expected - found, key=_natural)
    surplus = sorted(found - expected - optional, key=_natural)
    if not missing and not surplus:
        return
    lines = [f"{folder} does not hold what its config.json says:"]
    for kind, names, others in (("missing", missing, surplus), ("surplus", surplus, missing)):
        for name in names[:5]:
            near = difflib.get_close_matches(name, others, 1)
            lines.append(f"  {kind}: {name}" + (f" (nearest: {near[0]})" if near else ""))
        if len(names) > 5:
            lines.append(f"  {kind}: and {len(names) - 5} more")
    raise CheckpointError("\n".join(lines))


def _copy(folder: Path, name: str, source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        raise CheckpointError(
            f"{folder}: {name} has shape {tuple(source.shape)}, "
            f"config.json asks for {tuple(target.shape)}"
        )
    target.copy_(source)


def _check_copy(folder: Path, name: str, source: Tensor, original: Tensor) -> None:
    if source.shape != original.shape or not torch.equal(source.to(original.dtype), original.cpu()):
        raise CheckpointError(
            f"{folder}: {name} differs from the main model's; "
            "MTP modules with an embedding or head of their own are not supported"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
