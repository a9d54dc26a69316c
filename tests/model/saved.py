"""A model as a stranger finds it on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.model.transformer import Transformer


def save_and_read(model: Transformer, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors in float64 under their on-disk names, config.json)."""
    save_huggingface(model, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: tensor.astype(np.float64) for name, tensor in tensors.items()}, config
