"""From any checkpoint to a Hugging Face folder or a GGUF file, tensor by tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.gguf.file import write_gguf
from qiusuo.checkpoint.huggingface import write_huggingface
from qiusuo.checkpoint.inventory import check_inventory
from qiusuo.checkpoint.stored import Checkpoint, Progress, kept_kind
from qiusuo.checkpoint.tensors import EMBEDDING
from qiusuo.model.names import layer_of

PLAIN_KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
KINDS = {"hf": PLAIN_KINDS | {"fp8": "F8_E4M3"}, "gguf": PLAIN_KINDS | {"q8_0": "Q8_0"}}


def export(
    checkpoint: Checkpoint,
    place: str | Path,
    format: str | None = None,
    dtype: str | None = None,
    *,
    mtp: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write ``checkpoint`` to ``place``, a folder in the format "hf" (``dtype`` float32, bfloat16,
    float16 or fp8), a file in the format "gguf" (float32, bfloat16, float16 or q8_0).

    ``format=None`` goes by the name: a file NAME.gguf, else a folder. ``dtype=None`` keeps the type
    the weights are stored in, bfloat16 if that is a quantised one.
    ``mtp=False`` leaves the MTP modules out. What stands at ``place`` is replaced whole or not at
    all; CheckpointError where that is no model, or this one cannot be written so."""
    place = Path(place)
    if format is None:
        format = "gguf" if place.suffix == ".gguf" else "hf"
    if format not in KINDS:
        raise CheckpointError(f"format {format!r} is not written; expected {' or '.join(KINDS)}")
    if dtype is not None and dtype not in KINDS[format]:
        known = ", ".join(KINDS[format])
        raise CheckpointError(f"dtype {dtype!r} is not written as {format}; expected {known}")
    if (format == "gguf") != (place.suffix == ".gguf"):
        expected = "a file NAME.gguf" if format == "gguf" else "a folder; for a file ask for gguf"
        raise CheckpointError(f"{place}: the format {format} is written to {expected}")
    if place.exists() and checkpoint.place.exists() and place.samefile(checkpoint.place):
        raise CheckpointError(f"{place} is the checkpoint itself; write to another place")
    if not mtp:
        checkpoint = without_mtp(checkpoint)
    if dtype is None and EMBEDDING not in checkpoint.tensors:
        check_inventory(checkpoint)  # has the words for it
    kind = KINDS[format][dtype] if dtype else kept_kind(checkpoint.tensors[EMBEDDING].kind)
    if format == "hf":
        return write_huggingface(checkpoint, place, kind, progress=progress)
    return write_gguf(checkpoint, place, kind.lower(), progress)


def without_mtp(checkpoint: Checkpoint) -> Checkpoint:
    """The main model alone."""
    config = checkpoint.config
    layers = config.num_hidden_layers
    tensors = {n: tensor for n, tensor in checkpoint.tensors.items() if layer_of(n) < layers}
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors, low_bit=None)
