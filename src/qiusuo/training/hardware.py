"""What this machine can do at most: the rate that a step's arithmetic is held against."""

from __future__ import annotations

import ctypes
import sys
import time
from functools import cache

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


@cache
def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Measured floating-point operations a second of a large matrix product (best of several).

    A kernel's first calls pick its code, so some are not counted. A product too small does not show
    what all cores can do together. About 0.2 s on a CPU.
    """
    rows, size = (4096, 1024) if device == "cpu" else (8192, 8192)
    a = torch.randn(rows, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    best = float("inf")
    deadline = time.perf_counter() + 0.2
    rounds = 0
    while rounds < 4 or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
        rounds += 1
    return 2.0 * rows * size**2 / best


def keep_freed_memory() -> None:
    """Tell glibc not to give a step's memory back to the system between two tensors: to have it
    mapped and zeroed anew, page by page, takes longer than the arithmetic of a small model, most
    of all beside other processes (docs/log.md). Nothing elsewhere."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(library, "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_TOP_PAD, 1 << 26)
