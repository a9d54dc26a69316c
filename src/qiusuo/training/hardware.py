"""What this machine can do at most: the rate that a step's arithmetic is held against."""

from __future__ import annotations

import time
from functools import cache

import torch


@cache
def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Measured floating-point operations a second of a large matrix product (best of several).

    A kernel's first calls pick its code, so some are not counted. About 0.1 s on a CPU.
    """
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    deadline = time.perf_counter() + 0.1
    rounds = 0
    while rounds < 4 or time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
        rounds += 1
    return 2.0 * size**3 / best
