"""The shape of the dense models that R1 was distilled into: Qwen2 and Llama.

One block for both: grouped-query attention, where several query heads share a key and a value
head, and a SwiGLU network. Qwen2 has biases on its query, key and value projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from qiusuo.model.checks import ConfigError, check_numbers
from qiusuo.model.config import ModelConfig

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


@dataclass(frozen=True, kw_only=True)
class DenseConfig(ModelConfig):
    """``head_dim=0`` is hidden_size / num_attention_heads; ``num_key_value_heads=0`` gives
    every query head its own."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = tuple(ARCHITECTURES)
    FIXED_KEYS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
    }
    OTHER_KEYS: ClassVar[frozenset[str]] = frozenset(("attention_bias", "sliding_window"))
    # The ends that transformers assumes belong to Llama 1: no end is better than a wrong one.
    SILENT: ClassVar[dict[str, dict[str, Any]]] = {
        "qwen2": {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None},
        "llama": {"max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None},
    }

    model_type: str = "llama"
    num_key_value_heads: int = 0
    head_dim: int = 0

    def __post_init__(self) -> None:
        # Frozen, but what is left out follows from the rest: it is filled in here, once.
        if self.num_key_value_heads == 0:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        super().__post_init__()
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: give head_dim"
                )
            width = self.hidden_size // self.num_attention_heads
            object.__setattr__(self, "head_dim", width)
        check_numbers(self, ("num_key_value_heads", "head_dim"), whole=True)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even: RoPE turns pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_nextn_predict_layers:
            raise ConfigError(f"num_nextn_predict_layers must be 0 for {self.model_type}")

    @property
    def query_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.model_type == "qwen2"

    @property
    def head_widths(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def cache_parts(self) -> tuple[int, int]:
        """Keys and values of all key-value heads."""
        width = self.num_key_value_heads * self.head_dim
        return width, width

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Self:
        biased = raw["model_type"] == "qwen2"
        if raw.get("attention_bias", biased) not in (biased, None):
            raise ConfigError(f"attention_bias must be {biased} for {raw['model_type']}")
        if raw["model_type"] == "qwen2" and raw.get("num_key_value_heads") is None:
            raise ConfigError("config.json lacks num_key_value_heads")
        return super().from_hf(raw)

    def to_hf(self) -> dict[str, Any]:
        raw = super().to_hf() | {"architectures": [ARCHITECTURES[self.model_type]]}
        del raw["num_nextn_predict_layers"]  # no key of these families
        if self.model_type == "qwen2":
            return raw | {"use_sliding_window": False}
        return raw | {"attention_bias": False, "mlp_bias": False}
