"""What this machine and these weights allow: bytes read a second, and bytes that a pass must read.

Decoding reads every weight that a token uses once, whatever the program. So the bytes of a pass
over the memory's bandwidth are the least time it can take.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.tensors import EMBEDDING
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.names import layer_of

READ_BYTES = 3 << 29  # far beyond the caches of the machines measured
CACHE_ITEM = 2  # bfloat16 here, float16 there


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second of the fastest of a few loops that only read, in large pages where the
    kernel gives them: what a kernel can hope for at best."""
    torch.set_num_threads(threads)
    memory = mmap.mmap(-1, READ_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    numbers = torch.frombuffer(memory, dtype=torch.int32).fill_(1)
    loops: list[Callable[[], torch.Tensor]] = [
        numbers.view(torch.float32).sum,
        numbers.view(torch.int64).sum,
        numbers.amax,
    ]
    least = min(_seconds(loop) for _ in range(rounds) for loop in loops)
    return READ_BYTES / least


def _seconds(work: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def pass_bytes(
    model: Path, sequences: int = 1, context: int = 0, touched: float | None = None
) -> float:
    """Bytes that one pass must read for ``sequences`` with ``context`` tokens each. ``touched``:
    experts of a layer that it uses, without it those of one token."""
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    assert isinstance(config, DeepseekConfig)
    share = (touched or config.num_experts_per_tok) / config.n_routed_experts
    total = float(sequences * context * config.num_hidden_layers * config.cache_width * CACHE_ITEM)
    for name, tensor in checkpoint.tensors.items():
        if name == EMBEDDING:
            total += sequences * tensor.stored_bytes / config.vocab_size
        elif layer_of(name) < config.num_hidden_layers:
            total += tensor.stored_bytes * (share if ".experts." in name else 1.0)
    return total


def weight_bytes(model: Path) -> int:
    return open_checkpoint(model).stored_bytes


def cache_bytes(model: Path, tokens: int) -> int:
    config = open_checkpoint(model).config
    return tokens * config.num_hidden_layers * config.cache_width * CACHE_ITEM
