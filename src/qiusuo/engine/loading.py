"""From what a person names to a model that answers."""

from __future__ import annotations

from pathlib import Path

import torch

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.inventory import check_tokenizer
from qiusuo.checkpoint.load import load_model
from qiusuo.checkpoint.low_bit import BITS
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.stored import Progress
from qiusuo.engine.language_model import DRAFTS, LanguageModel
from qiusuo.engine.limits import Limits
from qiusuo.engine.paged_cache import check_cache


def load(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    limits: Limits | None = None,
    draft: str | Path | LanguageModel = "auto",
    quantize: str | None = None,
    cache: str | None = None,
) -> LanguageModel:
    """Load a model: a folder in Hugging Face layout or a quantised one, a .gguf file, a run folder
    (its finished model), or a name that was pulled.

    ``dtype``: "float32", "bfloat16", "float16", or None for the type the weights were saved in
    (bfloat16 for FP8 and quantised ones; a folder that `qiusuo quantize` made is run as it is, and
    with a ``dtype`` becomes plain numbers). ``quantize``: "int8" or "int4" holds the weights in so
    many bits, and ``dtype`` is then that of the rest and of what is computed, bfloat16 if None.
    ``draft``: as ``LanguageModel`` knows it, or another, smaller model of the same vocabulary,
    named and loaded in the same way, but not quantised. ``cache``: "int8" keeps what is known of
    each token in little more than half the bytes of bfloat16, to hold longer contexts; None in the
    type that is computed (docs/engine.md). CheckpointError for what is not there, does
    not fit together or needs more memory than is free.
    """
    if fault := device_fault(device):
        raise CheckpointError(fault)
    if quantize is not None and quantize not in BITS:
        raise CheckpointError(f"quantize {quantize!r} is not one of {', '.join(BITS)}")
    try:
        check_cache(cache)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    wanted, bits = _dtype(dtype), None if quantize is None else BITS[quantize]
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.read_tokenizer()
    check_tokenizer(checkpoint, tokenizer)
    model = load_model(checkpoint, dtype=wanted, bits=bits, device=device, progress=progress)
    if isinstance(draft, Path) or (isinstance(draft, str) and draft not in DRAFTS):
        draft = load(draft, dtype, device, progress, draft="none")
    return LanguageModel(model, tokenizer, limits, draft, checkpoint.sampling, cache)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(known)}")
    return known[dtype]


def device_fault(device: str | torch.device) -> str | None:
    """Why that device cannot be used, or None."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # which of them depends on the device
        reason = str(error).partition("\n")[0]
        return f"device {str(device)!r} cannot be used: {reason}"
    return None
