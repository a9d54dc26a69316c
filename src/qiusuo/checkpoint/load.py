"""From a checkpoint to a model in memory, and back to a checkpoint without a file.

Loading allocates the model once, in its final type, and fills it a few rows at a time; the peak is
the final weights and a few megabytes. Everything that can be refused is refused before that. A
quantised folder is not even copied: its file is mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.inventory import check_inventory
from qiusuo.checkpoint.low_bit import in_memory, quantized_rows
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
    Part,
    copies,
    disk_layout,
    memory_state,
    meta_state,
    mtp_copies,
)
from qiusuo.data.cache import show_bytes
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import available_memory, held_tensors, meta_model, needed_bytes
from qiusuo.model.low_bit import CODES, SCALES, low_bit_weights, make_low_bit, stem
from qiusuo.model.transformer import Transformer


def loaded_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type a model is loaded in where none is asked for: as the embedding is stored,
    bfloat16 if that is a quantised one."""
    return DTYPES[kept_kind(checkpoint.tensors[EMBEDDING].kind)]


def loaded_bits(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, bits: int | None = None
) -> int | None:
    """Of the weights once loaded, None for plain numbers: as asked, or as a quantised folder has
    them where no type is asked for. CheckpointError for one of other bits than are asked for."""
    stored = None if checkpoint.low_bit is None else checkpoint.low_bit.bits
    if bits is None:
        return stored if dtype is None else None
    if stored not in (None, bits):
        raise CheckpointError(
            f"{checkpoint.place} is quantised to int{stored} already, and what was rounded once is "
            f"not rounded again: for int{bits} take the model that it was made from"
        )
    return bits


def loaded_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, bits: int | None = None
) -> int:
    """Memory that ``load_model`` needs. Mapped pages count as others do: those that are in memory
    already, in the system's cache or for another process, are free memory to the system too."""
    kind = dtype or _rest_dtype(checkpoint, bits)
    return needed_bytes(checkpoint.config, kind, loaded_bits(checkpoint, dtype, bits))


class Held(NamedTuple):
    """The rows of a tensor that a process holds: those of ``tensor``, from number ``first`` on. Of
    stacked experts: its experts."""

    tensor: Tensor
    first: int = 0

    def of(self, part: Part) -> Held:
        """What is held of a part of the whole: an expert's matrix is held with its expert, all of
        it or no row."""
        if part.expert is None:
            return self
        expert = part.expert - self.first
        if 0 <= expert < len(self.tensor):
            return Held(replace(part, expert=expert).cut(self.tensor))
        return Held(self.tensor[:0, 0])


def fill_held(checkpoint: Checkpoint, held: Mapping[str, Held]) -> None:
    """Read into a model's tensors, by their names in memory, as much as is held of each; nothing
    else is read but copies, to compare them. A tied head is its embedding. Raises CheckpointError
    as ``load_model`` does."""
    check_inventory(checkpoint)
    layout = list(disk_layout(checkpoint.config, meta_state(checkpoint.config)))
    room = [held[name].tensor for name in {part.name for _, part in layout}]
    embedding = held[EMBEDDING].tensor
    if embedding.device.type == "cpu":
        needed = sum(tensor.nbytes for tensor in room)
        _check_memory(checkpoint, embedding.dtype, None, needed)
    for name, part in layout:
        for _ in _read(checkpoint.tensors[name], part, held[part.name]):
            pass
    check_copies(checkpoint, checkpoint.tensors)


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Transformer:
    """``dtype=None``: see ``loaded_dtype``. ``bits``: 8 or 4 keeps the weights in so many, and the
    rest (and what is computed) in ``dtype``, bfloat16 if that is None; a quantised folder with
    neither is taken as it is, with a ``dtype`` alone it is made plain numbers. Raises
    CheckpointError for a checkpoint that contradicts its config, where the machine has not the
    memory for it, and for a number that is too large for ``dtype`` or for low bits."""
    check_inventory(checkpoint)
    device, needed = torch.device(device), loaded_bytes(checkpoint, dtype, bits)
    bits, dtype = loaded_bits(checkpoint, dtype, bits), dtype or _rest_dtype(checkpoint, bits)
    if device.type == "cpu":
        _check_memory(checkpoint, dtype, bits, needed)
    if checkpoint.low_bit is not None and bits is not None:
        held = held_tensors(checkpoint.config, dtype, bits)
        mapped = checkpoint.low_bit.mapped()
        state = {
            name: _of_type(mapped[name], meta.dtype, f"{checkpoint.place}: {name}").to(device)
            for name, meta in held.items()
        }
        if progress is not None:
            progress(needed, needed)
        return _assembled(checkpoint, state, bits)
    state = _filled(checkpoint, dtype, bits, device, progress)
    originals = checkpoint.tensors
    if bits is None:
        originals = {name: MemoryTensor(name, held) for name, held in state.items()}
    check_copies(checkpoint, originals)
    return _assembled(checkpoint, state, bits)


def _rest_dtype(checkpoint: Checkpoint, bits: int | None) -> torch.dtype:
    return loaded_dtype(checkpoint) if bits is None else torch.bfloat16


def _filled(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    bits: int | None,
    device: torch.device,
    progress: Progress | None,
) -> dict[str, Tensor]:
    """The state dict of a new model, a few rows of the checkpoint at a time."""
    config, plain = checkpoint.config, meta_state(checkpoint.config)
    held = held_tensors(config, dtype, bits)
    low = {} if bits is None else low_bit_weights(meta_model(config), bits)
    state = {name: torch.empty_like(meta, device=device) for name, meta in held.items()}
    done, total = 0, sum(tensor.nbytes for tensor in state.values())
    for name, part in disk_layout(config, plain):
        source, packed = checkpoint.tensors[name], low.get(part.name)
        if packed is None:
            read = _read(source, part, Held(state[part.name]))
        else:
            read = _read_packed(source, part, state, packed)
        for count in read:
            done += count
            if progress is not None:
                progress(done, total)
    return state


def _read(source: StoredTensor, part: Part, held: Held) -> Iterator[int]:
    """Copy what is held of one tensor of a checkpoint; the bytes of each piece."""
    target, first = held.of(part)
    for start, rows in chunks(source, first=first, count=len(target)):
        kept = narrowed(rows, target.dtype, source.place)
        target[start - first : start - first + len(rows)].copy_(kept)
        yield kept.nbytes


def _read_packed(
    source: StoredTensor, part: Part, state: dict[str, Tensor], packed: int
) -> Iterator[int]:
    """As ``_read``, of a whole tensor that is rounded to low bits."""
    for start, rows in chunks(source):
        found = quantized_rows(rows, packed, source.place)
        for end, content in ((CODES, found.codes), (SCALES, found.scales)):
            target = replace(part, name=stem(part.name) + end).of(state)
            target[start : start + len(rows)].copy_(content)
        yield found.nbytes


def _of_type(mapped: Tensor, dtype: torch.dtype, place: str) -> Tensor:
    """Where it stands, if it is of that type already."""
    return mapped if mapped.dtype is dtype else narrowed(mapped, dtype, place)


def checkpoint_of(
    model: Transformer,
    tokenizer: Tokenizer | None,
    sampling: Mapping[str, float] = NO_SAMPLING,
) -> Checkpoint:
    """A model in memory as the writers want it."""
    tensors = in_memory(model.config, memory_state(model))
    return as_checkpoint(model.config, tensors, tokenizer, sampling)


def as_checkpoint(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer | None,
    sampling: Mapping[str, float],
) -> Checkpoint:
    """Tensors without a file, to which MTP modules' copies are added."""
    whole = {**tensors, **{name: tensors[original] for name, original in mtp_copies(config)}}
    return Checkpoint(Path("the model"), "memory", config, whole, lambda: tokenizer, sampling)


def check_copies(checkpoint: Checkpoint, originals: Mapping[str, StoredTensor]) -> None:
    """Raises CheckpointError for a repeated embedding or head whose bits differ: it would be lost,
    for memory and what is written from it hold one."""
    for name, original in copies(checkpoint.config).items():
        if name not in checkpoint.tensors:
            continue
        copy = checkpoint.tensors[name]
        if copy is originals[original]:
            continue
        for start, rows in chunks(copy):
            expected = originals[original].rows(start, start + len(rows))
            if not torch.equal(_bits(rows.to(expected.dtype)), _bits(expected)):
                raise CheckpointError(
                    f"{copy.place} differs from the main model's; MTP modules and tied models "
                    "with an embedding or head of their own are not supported"
                )


def _bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)  # NaN is equal to itself here


def _check_memory(
    checkpoint: Checkpoint, dtype: torch.dtype, bits: int | None, needed: int
) -> None:
    free = available_memory()
    if needed > free:
        kind = str(dtype).removeprefix("torch.") if bits is None else f"int{bits}"
        remedy = "a smaller dtype, " if bits is None else ""
        raise CheckpointError(
            f"{checkpoint.place} needs {show_bytes(needed)} of memory in {kind}, and "
            f"{show_bytes(free)} are free: close other programs, choose {remedy}int4 "
            "(qiusuo quantize) or a smaller model"
        )


def _assembled(checkpoint: Checkpoint, state: dict[str, Tensor], bits: int | None) -> Transformer:
    model = meta_model(checkpoint.config)
    if bits is not None:
        make_low_bit(model, bits)
    if checkpoint.config.tie_word_embeddings:
        state = state | {"lm_head.weight": state[EMBEDDING]}
    model.load_state_dict(state, assign=True, strict=True)
    if checkpoint.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
