"""What a GGUF file will hold of a checkpoint: the tensors by name, and how each is put together.

The way out of tensors.py: experts are stacked, kv_b_proj is cut into keys and values, a
Llama's heads are interleaved. A plan gives shapes at once and numbers when they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from qiusuo.checkpoint.gguf.config import rope_factors
from qiusuo.checkpoint.gguf.tensors import (
    IN_LAYER,
    KEYS,
    ROPE_FREQS,
    VALUES,
    WHOLE_MODEL,
    is_interleaved,
)
from qiusuo.checkpoint.stored import Checkpoint, StoredTensor, chunks
from qiusuo.checkpoint.tensors import copies
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.names import natural
from qiusuo.model.rope_scaling import LlamaScaling

EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
ROUTER = "ffn_gate_inp.weight"
Q8_0_BLOCK = 32


@dataclass(frozen=True)
class Planned:
    """A tensor to write; ``pieces`` are its rows in their order, a few at a time."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    def kind(self, wanted: str) -> str:
        """``wanted`` for matrices whose width allows it. Vectors and routers stay float32."""
        if len(self.shape) == 1 or self.name.endswith(ROUTER):
            return "F32"
        return "F16" if wanted == "Q8_0" and self.shape[-1] % Q8_0_BLOCK else wanted


def planned_tensors(checkpoint: Checkpoint) -> list[Planned]:
    """All tensors of the file for a checkpoint that holds what its config says
    (``check_inventory``). The MTP modules' copies are left out: llama.cpp takes the model's own."""
    config = checkpoint.config
    plans: dict[str, Planned] = {}
    if isinstance(config.rope_scaling, LlamaScaling):
        factors_P = rope_factors(config)
        plans[ROPE_FREQS] = Planned(ROPE_FREQS, tuple(factors_P.shape), lambda: iter([factors_P]))
    stacks: dict[str, list[StoredTensor]] = {}
    for name in sorted(checkpoint.tensors.keys() - copies(config).keys(), key=natural):
        tensor = checkpoint.tensors[name]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            plans[name] = _as_it_is(WHOLE_MODEL[name], tensor)
            continue
        block, rest = f"blk.{match[1]}.", match[2]
        if (expert := EXPERT.fullmatch(rest)) is not None:
            stack = f"{block}ffn_{expert[2]}_exps.weight"
            stacks.setdefault(stack, []).append(tensor)
            plans[stack] = _stacked(stack, stacks[stack])
        elif rest == "self_attn.kv_b_proj.weight":
            assert isinstance(config, DeepseekConfig)
            plans[block + KEYS] = _key_heads(block + KEYS, tensor, config)
            plans[block + VALUES] = _value_heads(block + VALUES, tensor, config)
        elif rest in IN_LAYER and is_interleaved(config, IN_LAYER[rest]):
            assert isinstance(config, DenseConfig)
            plans[name] = _paired(block + IN_LAYER[rest], tensor, config.head_dim)
        elif rest in IN_LAYER:  # and not a table that follows from the config
            plans[name] = _as_it_is(block + IN_LAYER[rest], tensor)
    return list(plans.values())


def _as_it_is(name: str, tensor: StoredTensor) -> Planned:
    return Planned(name, tensor.shape, lambda: (rows for _, rows in chunks(tensor)))


def _paired(name: str, tensor: StoredTensor, width: int) -> Planned:
    def pieces() -> Iterator[Tensor]:
        return (pairs(rows, width) for _, rows in chunks(tensor, row_multiple=width))

    return Planned(name, tensor.shape, pieces)


def pairs(rows: Tensor, width: int) -> Tensor:
    """The rows of each head from halves to pairs (p, p + width/2 side by side)."""
    halved = rows.unflatten(0, (-1, 2, width // 2))
    return halved.transpose(1, 2).flatten(0, 2)


def _stacked(name: str, experts: list[StoredTensor]) -> Planned:
    def pieces() -> Iterator[Tensor]:
        return (rows for expert in experts for _, rows in chunks(expert))

    return Planned(name, (len(experts), *experts[0].shape), pieces)


def _key_heads(name: str, tensor: StoredTensor, config: DeepseekConfig) -> Planned:
    nope, step = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim

    def pieces() -> Iterator[Tensor]:
        return (tensor.rows(start, start + nope).T for start in range(0, tensor.shape[0], step))

    return Planned(name, (config.num_attention_heads, config.kv_lora_rank, nope), pieces)


def _value_heads(name: str, tensor: StoredTensor, config: DeepseekConfig) -> Planned:
    nope, step = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim

    def pieces() -> Iterator[Tensor]:
        starts = range(0, tensor.shape[0], step)
        return (tensor.rows(start + nope, start + step) for start in starts)

    shape = (config.num_attention_heads, config.v_head_dim, config.kv_lora_rank)
    return Planned(name, shape, pieces)
