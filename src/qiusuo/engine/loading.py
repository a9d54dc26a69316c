"""From what a person names to a model that answers."""

from __future__ import annotations

from pathlib import Path

import torch

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.inventory import check_tokenizer
from qiusuo.checkpoint.load import load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.stored import Progress
from qiusuo.engine.language_model import DRAFTS, LanguageModel
from qiusuo.engine.limits import Limits


def load(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    limits: Limits | None = None,
    draft: str | Path | LanguageModel = "auto",
) -> LanguageModel:
    """Load a model: a folder in Hugging Face layout, a .gguf file, a run folder (its finished
    model), or a name that was pulled.

    ``dtype``: "float32", "bfloat16", "float16", or None for the type the weights were saved in
    (bfloat16 for FP8 and quantised ones). ``draft``: as ``LanguageModel`` knows it, or another,
    smaller model of the same vocabulary, named and loaded in the same way. CheckpointError for what
    is not there, does not fit together or needs more memory than is free.
    """
    if fault := device_fault(device):
        raise CheckpointError(fault)
    wanted = _dtype(dtype)
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.read_tokenizer()
    check_tokenizer(checkpoint, tokenizer)
    model = load_model(checkpoint, dtype=wanted, device=device, progress=progress)
    if isinstance(draft, Path) or (isinstance(draft, str) and draft not in DRAFTS):
        draft = load(draft, dtype, device, progress, draft="none")
    return LanguageModel(model, tokenizer, limits, draft, checkpoint.sampling)


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
