"""LoRA adapters on disk, as Hugging Face's PEFT writes and reads them.

A folder with `adapter_config.json` (rank, alpha, which modules, on which model) and
`adapter_model.safetensors`, where the two matrices of a module stand under
`base_model.model.<module>.lora_A.weight` [R, I] and `….lora_B.weight` [O, R]. The module's weight
with its adapter is W + alpha / R · B A. What PEFT knows beyond that (DoRA, own ranks per module,
trained embeddings) is refused by name: read as plain LoRA it would be another model.

PEFT on transformers 5 takes any `gate_proj`, `up_proj` or `down_proj` of a model with experts for
those of its routed experts (its `transformers_weight_conversion.py`), so it reads adapters of such
models where they are on the attention alone; dense models' it reads whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError, replacing_folder
from qiusuo.checkpoint.safetensors_format import FileTensor, Outgoing, read_header, write_file
from qiusuo.checkpoint.stored import KINDS

# R rank, I in, O out.

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_FLOATS = ("F32", "BF16", "F16")
# Settings under which the matrices mean something else than W + alpha / R · B A.
_REFUSED = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_INITIAL = (True, False, "gaussian", "orthogonal", "eva")  # which leave the model's weights alone


@dataclass(frozen=True)
class StoredAdapter:
    """``base``: name or folder of the model it belongs to. ``matrices``: A [R, I] and B [O, R] by
    the module's name."""

    base: str
    rank: int
    alpha: float
    matrices: dict[str, tuple[Tensor, Tensor]]


def write_adapter(
    adapter: StoredAdapter, folder: str | Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a folder that `peft.PeftModel.from_pretrained` reads. One that stands there is
    replaced whole or not at all; one that holds anything else is left alone: CheckpointError."""
    folder = Path(folder)
    if folder.exists():
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if others := sorted(found - {CONFIG_FILE, WEIGHTS_FILE}):
            raise CheckpointError(
                f"{folder} holds no adapter but {', '.join(others[:3])}; writing would replace it "
                "all: give a new or empty folder"
            )
    tensors = [
        _outgoing(f"{_PREFIX}{name}{suffix}", matrix.detach().to("cpu", dtype))
        for name, pair in adapter.matrices.items()
        for suffix, matrix in zip((_A, _B), pair, strict=True)
    ]
    with replacing_folder(folder) as draft:
        text = json.dumps(_config(adapter), indent=2, ensure_ascii=False)
        (draft / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        write_file(draft / WEIGHTS_FILE, tensors, lambda count: None)
    return folder


def _config(adapter: StoredAdapter) -> dict[str, Any]:
    """What differs from PEFT's defaults, and what other readers ask for. Modules by their full
    names: short ones would catch modules here and there that have no adapter."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(adapter.matrices),
    }


def _outgoing(name: str, matrix: Tensor) -> Outgoing:
    return Outgoing(name, KINDS[matrix.dtype], tuple(matrix.shape), lambda: [matrix])


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Read an adapter, its matrices as float32. CheckpointError for what is none, is damaged or
    is no plain LoRA."""
    folder = Path(folder)
    raw = _read_config(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}; an adapter has one")
    found = read_header(folder / WEIGHTS_FILE)
    rank, matrices = raw["r"], {}
    for name in dict.fromkeys(_module_of(tensor) for tensor in found.values()):
        pair = [found.get(f"{_PREFIX}{name}{suffix}") for suffix in (_A, _B)]
        a, b = (_read(tensor, folder, name) for tensor in pair)
        if a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{folder}: {name} has matrices {list(a.shape)} and {list(b.shape)}; "
                f"{CONFIG_FILE} says rank {rank}"
            )
        matrices[name] = a, b
    base = raw.get("base_model_name_or_path") or ""
    return StoredAdapter(str(base), rank, float(raw["lora_alpha"]), matrices)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha = raw["r"], raw["lora_alpha"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; an adapter has one") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not an adapter's configuration: {error!r}") from error
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not alpha > 0:
        raise CheckpointError(f"{file}: r {rank!r} and lora_alpha {alpha!r} must be positive")
    told = {"peft_type": "LORA", "bias": "none"}
    strange = [key for key, value in told.items() if raw.get(key, value) != value]
    strange += [key for key in _REFUSED if raw.get(key)]
    if raw.get("init_lora_weights", True) not in _INITIAL:
        strange.append("init_lora_weights")
    if strange:
        listed = ", ".join(f"{key} = {raw[key]!r}" for key in strange)
        raise CheckpointError(
            f"{file}: {listed} is not supported, only plain LoRA is; merge the adapter into its "
            "model with peft's merge_and_unload and use that"
        )
    assert isinstance(raw, dict)
    return raw


def _module_of(tensor: FileTensor) -> str:
    name = tensor.name.removeprefix(_PREFIX)
    for suffix in (_A, _B):
        if name != tensor.name and name.endswith(suffix):
            return name.removesuffix(suffix)
    raise CheckpointError(
        f"{tensor.place} is not known in an adapter; expected {_PREFIX}MODULE{_A} or …{_B}"
    )


def _read(tensor: FileTensor | None, folder: Path, name: str) -> Tensor:
    if tensor is None:
        raise CheckpointError(f"{folder}: {name} has one matrix; an adapter has {_A} and {_B}")
    if tensor.kind not in _FLOATS or len(tensor.shape) != 2:
        raise CheckpointError(f"{tensor.place} is {tensor.kind} {tensor.shape}, not a matrix")
    return tensor.rows(0, tensor.shape[0]).float()
