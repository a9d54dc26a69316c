"""From any checkpoint to a Hugging Face folder or a GGUF file, tensor by tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.gguf.file import write_gguf
from qiusuo.checkpoint.huggingface import write_huggingface
from qiusuo.checkpoint.stored import Checkpoint, Progress
from qiusuo.checkpoint.tensors import layer_of

HUGGINGFACE_KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "fp8": "F8_E4M3"}
GGUF_KINDS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "q8_0": "q8_0"}


def export(
    checkpoint: Checkpoint,
    place: str | Path,
    format: str,
    dtype: str | None = None,
    *,
    mtp: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write ``checkpoint`` to ``place``, a folder in the format "hf" (``dtype`` float32, bfloat16,
    float16 or fp8), a file in the format "gguf" (float32, bfloat16, float16 or q8_0).

    ``dtype=None`` keeps the type the weights are stored in, bfloat16 if that is a quantised one.
    ``mtp=False`` leaves the MTP modules out. What stands at ``place`` is replaced whole or not at
    all; CheckpointError where that is no model, or this one cannot be written so."""
    kinds = {"hf": HUGGINGFACE_KINDS, "gguf": GGUF_KINDS}
    if format not in kinds:
        raise CheckpointError(f"format {format!r} is not written; expected {' or '.join(kinds)}")
    if dtype is not None and dtype not in kinds[format]:
        known = ", ".join(kinds[format])
        raise CheckpointError(f"dtype {dtype!r} is not written as {format}; expected {known}")
    if (format == "gguf") != (Path(place).suffix == ".gguf"):
        expected = "a file NAME.gguf" if format == "gguf" else "a folder; for a file ask for gguf"
        raise CheckpointError(f"{place}: the format {format} is written to {expected}")
    if not mtp:
        checkpoint = without_mtp(checkpoint)
    if format == "hf":
        kind = None if dtype is None else HUGGINGFACE_KINDS[dtype]
        return write_huggingface(checkpoint, place, kind, progress=progress)
    return write_gguf(
        checkpoint, Path(place), GGUF_KINDS[dtype or _own_dtype(checkpoint)], progress
    )


def without_mtp(checkpoint: Checkpoint) -> Checkpoint:
    """The main model alone."""
    config = checkpoint.config
    layers = config.num_hidden_layers
    tensors = {n: tensor for n, tensor in checkpoint.tensors.items() if layer_of(n) < layers}
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def _own_dtype(checkpoint: Checkpoint) -> str:
    kind = checkpoint.tensors["model.embed_tokens.weight"].kind
    return {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")
