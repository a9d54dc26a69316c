"""GGUF files, llama.cpp's format, in and out: one file with config, tokenizer and weights.

Reading gives a checkpoint as any other: its tensors under Hugging Face's names, each read a few
rows at a time. Writing streams tensor by tensor to a temporary name beside the place, which the
file gets when every byte is on the disk.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qiusuo.checkpoint.files import CheckpointError, replacing_file
from qiusuo.checkpoint.gguf.config import Fields, config_from_metadata
from qiusuo.checkpoint.gguf.header import ALIGNMENT, MAGIC, Entry, header_bytes, read_header
from qiusuo.checkpoint.gguf.limits import check_writable
from qiusuo.checkpoint.gguf.metadata import metadata_from_config, stop_metadata
from qiusuo.checkpoint.gguf.plan import Planned, planned_tensors
from qiusuo.checkpoint.gguf.tensors import ROPE_FREQS, has_mtp, stored_tensors
from qiusuo.checkpoint.gguf.tokenizer import read_tokenizer, tokenizer_metadata
from qiusuo.checkpoint.gguf.weights import encode, file_tensors
from qiusuo.checkpoint.inventory import check_inventory
from qiusuo.checkpoint.load import check_copies
from qiusuo.checkpoint.stored import Checkpoint, Progress
from qiusuo.data.tokenizer import Tokenizer

MODEL_KEY = "tokenizer.ggml.model"
NO_TOKENIZER = (None, "no_vocab", "none")
QUANTIZATION_VERSION = 2
# The kinds that can be written, and llama.cpp's number for a file of each (llama_ftype).
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


# Reading


def open_gguf(path: Path) -> Checkpoint:
    """Read the header; weights when they are asked for.

    CheckpointError if the file is damaged or cut short, if its metadata lacks something, or if it
    holds a model, or a type of numbers, that cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:  # an empty file cannot even be mapped
                raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    header = read_header(path, data)
    metadata = header.metadata
    if metadata.get("split.count", 1) != 1:
        raise CheckpointError(
            f"{path} is one of {metadata['split.count']} parts; join them with "
            "`llama-gguf-split --merge`"
        )
    found = file_tensors(path, data, header)
    try:
        mtp = has_mtp(found, Fields(metadata).whole("block_count"))
        factors = found.get(ROPE_FREQS)
        config = config_from_metadata(
            metadata,
            tied="output.weight" not in found,
            factors_P=None if factors is None else factors.rows(0, factors.shape[0]).float(),
            mtp=mtp,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error

    def tokenizer() -> Tokenizer | None:
        if metadata.get(MODEL_KEY) in NO_TOKENIZER:
            return None
        try:
            return read_tokenizer(metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    return Checkpoint(path, "GGUF", config, stored_tensors(found, config), tokenizer)


# Writing


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    kind: str = "bf16",
    progress: Progress | None = None,
) -> Path:
    """Write one file that llama.cpp loads, and that ``open_gguf`` reads back.

    ``kind``: f32, f16, bf16 or q8_0 for the matrices; norms, biases and routers stay float32, and
    a matrix whose width is no multiple of 32 is F16 in a q8_0 file. A file at ``path`` is replaced
    whole or not at all. CheckpointError, before anything is written, for what llama.cpp cannot run.
    """
    if kind not in FILE_TYPES:
        raise CheckpointError(f"kind {kind!r} is not one of {', '.join(FILE_TYPES)}")
    _check_place(path)
    config = checkpoint.config
    check_writable(config)
    check_inventory(checkpoint)
    check_copies(checkpoint, checkpoint.tensors)
    metadata = _metadata(checkpoint, path.stem, kind)
    metadata |= metadata_from_config(config)
    metadata |= stop_metadata(config, metadata)
    plans = planned_tensors(checkpoint)
    entries, size = _table(plans, kind.upper())
    with replacing_file(path) as file:
        file.write(header_bytes(metadata, entries))
        written = 0
        for plan, entry in zip(plans, entries, strict=True):
            for content in _encoded(plan, entry):
                file.write(content)
                written += len(content)
                if progress is not None:
                    progress(written, size)
            file.write(bytes(-entry.nbytes % ALIGNMENT))
            written += -entry.nbytes % ALIGNMENT
    return path


def _metadata(checkpoint: Checkpoint, name: str, kind: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "general.architecture": "",  # comes with the config; readers expect it first
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    tokenizer = checkpoint.read_tokenizer()
    if tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.place} has no tokenizer, and llama.cpp's programs stop at a GGUF file "
            "without one; put its tokenizer.json beside the weights"
        )
    return metadata | tokenizer_metadata(tokenizer, checkpoint.config.vocab_size)


def _table(plans: list[Planned], kind: str) -> tuple[list[Entry], int]:
    """Every tensor's place, and the bytes of them all."""
    entries, offset = [], 0
    for plan in plans:
        entry = Entry(plan.name, plan.shape, plan.kind(kind), offset)
        entries.append(entry)
        offset += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
    return entries, offset


def _encoded(plan: Planned, entry: Entry) -> Iterator[bytes]:
    for rows in plan.pieces():
        yield encode(rows, entry.kind, plan.name)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of a file, such as model.gguf")
    if not path.exists():
        return
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path} is there and is not a GGUF file: choose another name")
