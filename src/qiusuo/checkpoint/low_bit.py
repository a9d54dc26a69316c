"""Quantised folders: codes and scales in safetensors, laid out as a model in memory holds them.

config.json says ``quantization_config = {"quant_method": "qiusuo", "bits": 4, "block": 32}``. A
weight X is two tensors, ``X.codes`` and ``X.scales`` (kernels/low_bit.py has the format); the
experts of a layer are stacked. First all codes, then all scales, then what is not quantised:
routers and their biases in float32, everything else in bfloat16. Every tensor begins at a multiple
of 64 bytes; where its neighbour's size does not see to that, ``padding.N`` (zeros) stands between.

So the file is mapped and used where it stands. Nothing is copied or repacked: a model starts as
soon as its first pages are read, and all processes that serve it share them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.safetensors_format import FILE_DTYPES, FileTensor, Planned
from qiusuo.checkpoint.stored import MemoryTensor, StoredTensor
from qiusuo.checkpoint.tensors import Part, disk_layout, meta_state
from qiusuo.kernels.low_bit import BLOCK, LowBit, dequantize, quantize
from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import held_tensors, meta_model
from qiusuo.model.low_bit import CODES, SCALES, low_bit_weights, stem
from qiusuo.model.names import layer_of, natural

METHOD = "qiusuo"
BITS = {"int8": 8, "int4": 4}
ALIGNMENT = 64  # bytes: a line of the processor's cache, and its longest register
PADDING = "padding."
SHOWN = 3
_KINDS = {dtype: kind for kind, dtype in FILE_DTYPES.items()}


@dataclass(frozen=True)
class LowBitFile:
    """What the files of a quantised folder hold, by the names of a model's state dict."""

    bits: int
    tensors: Mapping[str, FileTensor]

    def mapped(self) -> dict[str, Tensor]:
        """Every tensor where it stands in its file. The mapping is private: a tensor that is
        changed gets pages of its own, and the file stays what it is. CheckpointError for a file
        that has become shorter."""
        maps = {path: _map(path) for path in {tensor.path for tensor in self.tensors.values()}}
        state = {}
        for name, tensor in self.tensors.items():
            end = tensor.offset + tensor.stored_bytes
            content = maps[tensor.path][tensor.offset : end]
            if len(content) != tensor.stored_bytes:
                raise CheckpointError(f"{tensor.place} cannot be mapped: the file shrank")
            state[name] = content.view(FILE_DTYPES[tensor.kind]).view(tensor.shape)
        return state


@dataclass(frozen=True)
class LowBitTensor:
    """A matrix of the checkpoint (a ``StoredTensor``): rows from ``first`` on of codes [N, I'] and
    scales [N, n], which may be a whole stack's."""

    place: str
    bits: int
    codes: StoredTensor
    scales: StoredTensor
    first: int
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        return f"INT{self.bits}"

    @property
    def stored_bytes(self) -> int:
        return self.shape[0] * (self.codes.shape[1] + 2 * self.scales.shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        start, stop = self.first + start, self.first + stop
        codes, scales = self.codes.rows(start, stop), self.scales.rows(start, stop)
        return dequantize(LowBit(codes, scales, self.shape[1]))


# -- reading ------------------------------------------------------------------------------


def quantization_config(bits: int) -> dict[str, Any]:
    return {"quant_method": METHOD, "bits": bits, "block": BLOCK}


def stored_bits(quantization: Any) -> int | None:
    """8 or 4 where a config.json's ``quantization_config`` is ours, None where it is another's or
    none. CheckpointError for one of ours that this version cannot read."""
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
        return None
    bits, block = quantization.get("bits"), quantization.get("block")
    if type(bits) is not int or bits not in BITS.values() or block != BLOCK:
        raise CheckpointError(
            f"quantization_config has {bits!r} bits in blocks of {block!r}; expected 8 or 4 bits "
            f"in blocks of {BLOCK}"
        )
    return bits


def open_low_bit(
    folder: Path, files: Mapping[str, FileTensor], config: ModelConfig, bits: int
) -> tuple[dict[str, StoredTensor], LowBitFile]:
    """A quantised folder's tensors as any checkpoint has them, and as they stand in the files.
    CheckpointError where these are not what the config says."""
    found = {name: tensor for name, tensor in files.items() if not name.startswith(PADDING)}
    _check_layers(folder, found, config)
    expected = held_tensors(config, torch.bfloat16, bits)
    _check_held(folder, found, expected, bits)
    tensors: dict[str, StoredTensor] = {}
    weights, plain = low_bit_weights(meta_model(config), bits), meta_state(config)
    for name, part in disk_layout(config, plain):
        if part.name not in weights:
            tensors[name] = found[part.name]
            continue
        codes, scales = (found[stem(part.name) + end] for end in (CODES, SCALES))
        place, held = f"{codes.path}: {name}", weights[part.name]
        tensors[name] = _cut(place, held, part, plain[part.name], _flat(codes), _flat(scales))
    return tensors, LowBitFile(bits, found)


def in_memory(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint out of a low-bit model's state dict."""
    tensors: dict[str, StoredTensor] = {}
    plain = meta_state(config)
    for name, part in disk_layout(config, plain):
        if (packed := stem(part.name)) + CODES not in state:
            tensors[name] = MemoryTensor(name, part.of(state))
            continue
        codes, scales = (state[packed + end].flatten(0, -2) for end in (CODES, SCALES))
        bits = LowBit(codes, scales, 0).bits
        pair = MemoryTensor(name, codes), MemoryTensor(name, scales)
        tensors[name] = _cut(name, bits, part, plain[part.name], *pair)
    return tensors


def _flat(tensor: FileTensor) -> FileTensor:
    *lead, width = tensor.shape
    return replace(tensor, shape=(torch.Size(lead).numel(), width))


def _cut(
    place: str, bits: int, part: Part, whole: Tensor, codes: StoredTensor, scales: StoredTensor
) -> LowBitTensor:
    first, shape = first_row(part, whole), tuple(part.cut(whole).shape)
    return LowBitTensor(place, bits, codes, scales, first, shape)


def first_row(part: Part, whole: Tensor) -> int:
    """Of a matrix in a stack, counted over the whole stack."""
    if part.expert is None:
        return 0
    return part.expert * whole.shape[1] + part.rows.indices(whole.shape[1])[0]


def _check_layers(place: Path, found: Iterable[str], config: ModelConfig) -> None:
    """Before a model of all those layers is made, even one without storage."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    last = max(map(layer_of, found), default=-1)
    if layers != last + 1:
        raise CheckpointError(
            f"{place} does not hold what its config says: that counts {layers} layers "
            "(num_hidden_layers and num_nextn_predict_layers), and the files go on to layer "
            f"{last}, counted from 0"
        )


def _check_held(
    place: Path, found: Mapping[str, FileTensor], expected: Mapping[str, Tensor], bits: int
) -> None:
    wrong = [f"missing {name}" for name in sorted(expected.keys() - found, key=natural)]
    wrong += [f"surplus {name}" for name in sorted(found.keys() - expected, key=natural)]
    for name in sorted(expected.keys() & found, key=natural):
        tensor, wanted = found[name], expected[name]
        kind, shape = _KINDS[wanted.dtype], tuple(wanted.shape)
        if (tensor.kind, tensor.shape) != (kind, shape):
            wrong.append(f"{name} is {tensor.kind} of {tensor.shape}, not {kind} of {shape}")
        elif tensor.offset % ALIGNMENT:
            wrong.append(f"{name} begins at byte {tensor.offset:,}, no multiple of {ALIGNMENT}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(
            f"{place} is not what its config says, a model of {bits} bits: "
            f"{'; '.join(wrong[:SHOWN])}{more}. Quantise the original anew: qiusuo quantize"
        )


def _map(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: it is empty by now
        raise CheckpointError(f"{path} cannot be mapped: {error}") from error
    if hasattr(mmap, "MADV_WILLNEED"):
        mapping.madvise(mmap.MADV_WILLNEED)  # read on while the rest is made ready
    return torch.frombuffer(mapping, dtype=torch.uint8)


# -- making -------------------------------------------------------------------------------


def quantized_rows(
    rows: Tensor, bits: int, place: str, importance_I: Tensor | None = None
) -> LowBit:
    """Some rows in low bits. CheckpointError naming ``place`` for what cannot be."""
    try:
        return quantize(rows, bits, importance_I)
    except ValueError as error:
        raise CheckpointError(
            f"{place} cannot be quantised: {error}; look at the whole with `qiusuo doctor`"
        ) from error


def planned_file(config: ModelConfig, bits: int) -> list[Planned]:
    """Everything in a file of ``bits``, in its order."""
    held = held_tensors(config, torch.bfloat16, bits)
    ends = (CODES, SCALES, "")
    groups: dict[str, list[str]] = {end: [] for end in ends}
    for name in sorted(held, key=natural):
        groups[next(end for end in ends if name.endswith(end))].append(name)
    ordered = [name for end in ends for name in groups[end]]
    return list(_padded(Planned(n, _KINDS[held[n].dtype], tuple(held[n].shape)) for n in ordered))


def _padded(tensors: Iterable[Planned]) -> Iterator[Planned]:
    count = 0
    for tensor in tensors:
        yield tensor
        if gap := -tensor.bytes % ALIGNMENT:
            yield Planned(f"{PADDING}{count}", "U8", (gap,))
            count += 1
