"""How a context is stretched beyond the one a model was trained on, as config.json says it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qiusuo.model.checks import ConfigError, check_numbers

PREFIX = "rope_scaling."


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): slow pairs are slowed by ``factor``, fast ones kept.

    DeepSeek's ``mscale_all_dim`` also sharpens the softmax; Qwen's files have neither mscale.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, ("original_max_position_embeddings",), whole=True, prefix=PREFIX)
        check_numbers(self, ("factor", "beta_fast", "beta_slow"), prefix=PREFIX)
        check_numbers(self, ("mscale", "mscale_all_dim"), least=0, prefix=PREFIX)

    def magnitude(self, mscale: float) -> float:
        """``0.1·mscale·ln(factor) + 1``; 1 where nothing is extended or mscale is absent."""
        if self.factor <= 1 or mscale == 0:
            return 1.0
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def to_hf(self) -> dict[str, Any]:
        return {"type": "yarn", **asdict(self)}


@dataclass(frozen=True)
class LlamaScaling:
    """Llama 3.1's rule: pairs whose wavelength is beyond ``original / low_freq_factor`` are slowed
    by ``factor``, those within ``original / high_freq_factor`` kept, the others blended."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        check_numbers(self, ("original_max_position_embeddings",), whole=True, prefix=PREFIX)
        check_numbers(self, ("factor", "low_freq_factor", "high_freq_factor"), prefix=PREFIX)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(f"{PREFIX}high_freq_factor must be above low_freq_factor")

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": "llama3", **asdict(self)}
