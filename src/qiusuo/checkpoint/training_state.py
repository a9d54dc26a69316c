"""A training state on disk: weights, optimizers, the loader's place and counters in one file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from qiusuo.checkpoint.files import CheckpointError

STATE_FILE = "state.pt"


def save_state(folder: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them into a checkpoint folder."""
    path = folder / STATE_FILE
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's word for what the disk refuses
        raise CheckpointError(f"{path} could not be written: {error}") from error


def load_state(folder: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote; nothing in the file is executed."""
    path = folder / STATE_FILE
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a training state: {error}") from error
    return content
