"""`qiusuo quantize`: any checkpoint in 8 or 4 bits, without ever holding it.

A few rows are read, quantised and written to their two places in the file, codes and scales; so a
model larger than memory can be made small on the machine that will run it. On the way each weight's
error is measured: what was meant against what the file now says.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qiusuo.checkpoint.calibration import Calibration
from qiusuo.checkpoint.files import CheckpointError, replacing_folder
from qiusuo.checkpoint.huggingface import SINGLE_FILE, write_configs
from qiusuo.checkpoint.inventory import check_inventory, check_tokenizer
from qiusuo.checkpoint.load import check_copies
from qiusuo.checkpoint.low_bit import (
    ALIGNMENT,
    BITS,
    first_row,
    planned_file,
    quantization_config,
    quantized_rows,
)
from qiusuo.checkpoint.safetensors_format import FILE_DTYPES, Planned, encode_header
from qiusuo.checkpoint.stored import Checkpoint, Progress, StoredTensor, chunks, narrowed
from qiusuo.checkpoint.tensors import EMBEDDING, Part, disk_layout, meta_state
from qiusuo.data.cache import show_bytes
from qiusuo.kernels.low_bit import dequantize
from qiusuo.model.cost import meta_model
from qiusuo.model.low_bit import CODES, SCALES, low_bit_weights, stem

_PROJECTIONS = {  # kinds of quantised tensors, by what stands in their names; the first that fits
    ".self_attn.": "attention",
    ".mlp.experts.": "routed experts",
    ".mlp.shared_experts.": "shared experts",
    ".mlp.": "dense layers",
    ".eh_proj.": "MTP input",
}


@dataclass
class Group:
    """What became of one kind of tensors. ``error``: of the worst of them, the root of squared
    error over squared weights; ``worst`` is its name."""

    numbers: int = 0
    before: int = 0  # bytes
    after: int = 0
    error: float = 0.0
    worst: str = ""

    def add(self, other: Group) -> None:
        self.numbers += other.numbers
        self.before += other.before
        self.after += other.after
        if other.error > self.error:
            self.error, self.worst = other.error, other.worst


@dataclass
class Made:
    """A quantised folder, and what it cost, by kind of tensor."""

    folder: Path
    groups: dict[str, Group] = field(default_factory=dict)

    @property
    def whole(self) -> Group:
        total = Group()
        for group in self.groups.values():
            total.add(group)
        return total


def check_quantizable(checkpoint: Checkpoint, folder: Path, to: str) -> None:
    """Refuse what ``quantize_checkpoint`` could not make, before any time is spent on it."""
    if to not in BITS:
        raise CheckpointError(f"{to!r} is not one of {', '.join(BITS)}")
    if checkpoint.low_bit is not None:
        raise CheckpointError(
            f"{checkpoint.place} is quantised to int{checkpoint.low_bit.bits} already, and what "
            "was rounded once is not rounded again: quantise the model that it was made from"
        )
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already: give a new or empty folder")
    check_inventory(checkpoint)
    check_tokenizer(checkpoint, checkpoint.read_tokenizer())
    check_copies(checkpoint, checkpoint.tensors)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    folder: str | Path,
    to: str,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Made:
    """Write ``checkpoint`` to a new folder, ``to`` "int8" or "int4". It is there whole or not at
    all; ``progress`` is told of bytes written. ``calibration``: which columns matter, for 4 bits.
    CheckpointError where there is something already,
    for a checkpoint that is quantised so or not whole, a weight that is not finite, and a disk
    without room."""
    folder = Path(folder)
    check_quantizable(checkpoint, folder, to)
    tokenizer = checkpoint.read_tokenizer()
    planned = planned_file(checkpoint.config, BITS[to])
    _check_room(folder, sum(tensor.bytes for tensor in planned))
    made = Made(folder)
    with replacing_folder(folder) as draft:
        facts = quantization_config(BITS[to])
        if calibration is not None:
            facts["calibration_tokens"] = calibration.tokens
        write_configs(draft, checkpoint, torch.bfloat16, facts)
        if tokenizer is not None:
            tokenizer.save(draft)
        with (draft / SINGLE_FILE).open("wb") as file:
            _write(_OpenFile(file, planned), checkpoint, BITS[to], made, calibration, progress)
    return made


def _check_room(folder: Path, needed: int) -> None:
    above = next(place for place in folder.absolute().parents if place.is_dir())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise CheckpointError(
            f"{folder} needs {show_bytes(needed)}, and {show_bytes(free)} are free on that disk"
        )


class _OpenFile:
    """A safetensors file whose tensors all grow at once; what no one writes is zeros."""

    def __init__(self, file: BinaryIO, planned: list[Planned]) -> None:
        header = encode_header(planned, ALIGNMENT)
        file.write(header)
        self.file, self.tensors = file, {tensor.name: tensor for tensor in planned}
        self.starts: dict[str, int] = {}
        end = len(header)
        for tensor in planned:
            self.starts[tensor.name] = end
            end += tensor.bytes
        file.truncate(end)
        self.written, self.total = 0, end - len(header)

    def put(self, name: str, row: int, rows: Tensor) -> None:
        """``rows`` as those from ``row`` on, counted over all but the last dimension."""
        content = rows.contiguous().view(-1).view(torch.uint8).numpy().data
        self.file.seek(self.starts[name] + row * (len(content) // len(rows)))
        self.file.write(content)
        self.written += len(content)


def _write(
    out: _OpenFile,
    checkpoint: Checkpoint,
    bits: int,
    made: Made,
    calibration: Calibration | None,
    progress: Progress | None,
) -> None:
    plain = meta_state(checkpoint.config)
    low = low_bit_weights(meta_model(checkpoint.config), bits)
    for name, part in disk_layout(checkpoint.config, plain):
        source, first = checkpoint.tensors[name], first_row(part, plain[part.name])
        before, lost, held = out.written, 0.0, 0.0
        matters = None if calibration is None else calibration.of(part)
        for start, rows in chunks(source):
            kept = _put(out, part, first + start, rows, low.get(part.name), source, matters)
            lost += _squares(rows.float() - kept.float())
            held += _squares(rows.float())
            if progress is not None:
                progress(out.written, out.total)
        error, size = math.sqrt(lost / held) if held else 0.0, out.written - before
        group = made.groups.setdefault(_kind(name, part.name in low), Group())
        group.add(Group(math.prod(source.shape), source.stored_bytes, size, error, name))


def _squares(rows: Tensor) -> float:
    flat = rows.flatten()
    return float(flat.dot(flat))


def _put(
    out: _OpenFile,
    part: Part,
    row: int,
    rows: Tensor,
    bits: int | None,
    source: StoredTensor,
    importance_I: Tensor | None,
) -> Tensor:
    """Write some rows; the numbers that the file now means."""
    if bits is None:
        kept = narrowed(rows, FILE_DTYPES[out.tensors[part.name].kind], source.place)
        out.put(part.name, row, kept)
        return kept
    found = quantized_rows(rows, bits, source.place, importance_I)
    out.put(stem(part.name) + CODES, row, found.codes)
    out.put(stem(part.name) + SCALES, row, found.scales)
    return dequantize(found)


def _kind(name: str, quantised: bool) -> str:
    if not quantised:
        return "embedding" if name == EMBEDDING else "norms, routers"
    return next((kind for piece, kind in _PROJECTIONS.items() if piece in name), "head")
