"""What an engine may take, and where it switches between two ways of doing the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qiusuo.engine.paged_cache import PAGE_TOKENS
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig

STEP_TOKENS = 512
MAX_RUNNING = 64
PREFIX_BYTES = 4 << 30
FEW_SHARED = 32  # queries for which a dense model's heads are rows of one product: docs/log.md


@dataclass
class Limits:
    """``cache_bytes``: None takes a share of what is free. ``absorbed_below``: up to how many new
    tokens a sequence attends in the form for few queries; None: by the arithmetic of both.
    ``batch_invariant``: the same bits for a token whatever runs beside it and however its prompt
    is cut, in any precision, at a cost (benchmarks/invariance.py). ``prefix_folder``: beginnings
    are kept there too, in files of ``prefix_disk_bytes`` in all (``Engine.keep_on_disk``)."""

    cache_bytes: int | None = None
    page_tokens: int = PAGE_TOKENS
    step_tokens: int = STEP_TOKENS
    max_running: int = MAX_RUNNING
    prefix_cache: bool = True
    prefix_folder: Path | None = None
    prefix_disk_bytes: int = PREFIX_BYTES
    absorbed_below: int | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("page_tokens", "step_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.prefix_folder is not None and not self.prefix_cache:
            raise ValueError("prefix_folder keeps what prefix_cache finds: do not switch that off")


def few_queries(config: ModelConfig) -> int:
    """Up to how many new tokens the absorbed form takes less arithmetic than the expanded one.

    For each key seen and each head: absorbed, a query costs 2C + R products (scores with latent
    and rope key, values from the latent); expanded, N + R + V, and the key itself C(N + V)."""
    if not isinstance(config, DeepseekConfig):
        return FEW_SHARED
    nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    saved = 2 * latent - nope - value
    return max(1, latent * (nope + value) // saved) if saved > 0 else STEP_TOKENS
