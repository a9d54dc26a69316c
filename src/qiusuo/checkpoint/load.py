"""From a checkpoint to a model in memory, and back to a checkpoint without a file.

Loading allocates the model once, in its final type, and fills it a few rows at a time; the peak is
the final weights and a few megabytes. Everything that can be refused is refused before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.inventory import check_inventory
from qiusuo.checkpoint.stored import (
    DTYPES,
    NO_SAMPLING,
    Checkpoint,
    MemoryTensor,
    Progress,
    StoredTensor,
    chunks,
    kept_kind,
    narrowed,
)
from qiusuo.checkpoint.tensors import (
    EMBEDDING,
    copies,
    disk_layout,
    memory_state,
    meta_state,
    mtp_copies,
)
from qiusuo.data.cache import show_bytes
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.cost import ROUTER_BIAS, available_memory, meta_model, needed_bytes
from qiusuo.model.transformer import Transformer


def loaded_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type a model is loaded in where none is asked for: as the embedding is stored,
    bfloat16 if that is a quantised one."""
    return DTYPES[kept_kind(checkpoint.tensors[EMBEDDING].kind)]


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Transformer:
    """``dtype=None``: see ``loaded_dtype``. Raises CheckpointError for a checkpoint that
    contradicts its config, where the machine has not the memory for it, and for a number that is
    too large for ``dtype``."""
    check_inventory(checkpoint)
    dtype = dtype or loaded_dtype(checkpoint)
    device, config = torch.device(device), checkpoint.config
    shapes = meta_state(config)
    types = {name: torch.float32 if name.endswith(ROUTER_BIAS) else dtype for name in shapes}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    needed = needed_bytes(config, dtype)
    if device.type == "cpu":
        _check_memory(checkpoint, dtype, needed)
    state = {
        name: torch.empty(meta.shape, dtype=types[name], device=device)
        for name, meta in shapes.items()
    }
    done = 0
    for name, part in disk_layout(config, state):
        target = part.of(state)
        source = checkpoint.tensors[name]
        for start, rows in chunks(source):
            target[start : start + len(rows)].copy_(narrowed(rows, target.dtype, source.place))
            done += rows.numel() * target.itemsize
            if progress is not None:
                progress(done, needed)
    check_copies(checkpoint, {name: MemoryTensor(name, held) for name, held in state.items()})
    return _assembled(checkpoint, state)


def checkpoint_of(
    model: Transformer,
    tokenizer: Tokenizer | None,
    sampling: Mapping[str, float] = NO_SAMPLING,
) -> Checkpoint:
    """A model in memory as the writers want it."""
    state = memory_state(model)
    layout = {name: part.of(state) for name, part in disk_layout(model.config, state)}
    layout |= {name: state[original] for name, original in mtp_copies(model.config)}
    tensors: dict[str, StoredTensor] = {n: MemoryTensor(n, tensor) for n, tensor in layout.items()}
    place = Path("the model")
    return Checkpoint(place, "memory", model.config, tensors, lambda: tokenizer, sampling)


def check_copies(checkpoint: Checkpoint, originals: Mapping[str, StoredTensor]) -> None:
    """Raises CheckpointError for a repeated embedding or head whose bits differ: it would be lost,
    for memory and what is written from it hold one."""
    for name, original in copies(checkpoint.config).items():
        if name not in checkpoint.tensors:
            continue
        copy = checkpoint.tensors[name]
        for start, rows in chunks(copy):
            expected = originals[original].rows(start, start + len(rows))
            if not torch.equal(_bits(rows.to(expected.dtype)), _bits(expected)):
                raise CheckpointError(
                    f"{copy.place} differs from the main model's; MTP modules and tied models "
                    "with an embedding or head of their own are not supported"
                )


def _bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)  # NaN is equal to itself here


def _check_memory(checkpoint: Checkpoint, dtype: torch.dtype, needed: int) -> None:
    free = available_memory()
    if needed > free:
        raise CheckpointError(
            f"{checkpoint.place} needs {show_bytes(needed)} of memory in "
            f"{str(dtype).removeprefix('torch.')}, and {show_bytes(free)} are free: close other "
            "programs, choose a smaller dtype or a smaller model"
        )


def _assembled(checkpoint: Checkpoint, state: dict[str, Tensor]) -> Transformer:
    model = meta_model(checkpoint.config)
    if checkpoint.config.tie_word_embeddings:
        state = state | {"lm_head.weight": state[EMBEDDING]}
    model.load_state_dict(state, assign=True, strict=True)
    if checkpoint.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
