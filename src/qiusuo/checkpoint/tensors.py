"""The names and shapes tensors have on disk, against those they have in memory.

Two things differ, and only here. A checkpoint stores every routed expert's three matrices apart,
memory holds all experts of a layer as two stacked tensors. And a checkpoint may repeat the
embedding and the head (inside each MTP layer, where vLLM's loader reads them, or as the head of a
tied model); memory holds them once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import meta_model
from qiusuo.model.transformer import Transformer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Part:
    """Where one tensor of a checkpoint lives in memory: ``state[name]``, or of a layer's stacked
    experts ``state[name][expert][rows]``."""

    name: str
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def of(self, state: dict[str, Tensor]) -> Tensor:
        return self.cut(state[self.name])

    def cut(self, whole: Tensor) -> Tensor:
        """This part of what stands under ``name``."""
        return whole if self.expert is None else whole[self.expert][self.rows]


def meta_state(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of the model in memory, with a shape and without storage."""
    return dict(meta_model(config).state_dict())


def memory_state(model: Transformer) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def disk_layout(config: ModelConfig, state: dict[str, Tensor]) -> Iterator[tuple[str, Part]]:
    """(name on disk, place in memory) for every tensor of a checkpoint but the copies."""
    for name, tensor in state.items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        base, _, stacked = name.rpartition(".experts.")
        if stacked not in ("gate_up_proj", "down_proj"):
            yield name, Part(name)
            continue
        experts, width = tensor.shape[0], tensor.shape[1] // 2
        for expert in range(experts):
            prefix = f"{base}.experts.{expert}"
            if stacked == "down_proj":
                yield f"{prefix}.down_proj.weight", Part(name, expert)
            else:
                yield f"{prefix}.gate_proj.weight", Part(name, expert, slice(0, width))
                yield f"{prefix}.up_proj.weight", Part(name, expert, slice(width, None))


def disk_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of this config must hold."""
    state = meta_state(config)
    return {name: tuple(part.of(state).shape) for name, part in disk_layout(config, state)}


def mtp_copies(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(name of the copy inside an MTP layer, name of what it repeats)."""
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        yield f"{prefix}.embed_tokens.weight", EMBEDDING
        yield f"{prefix}.shared_head.head.weight", head


def copies(config: ModelConfig) -> dict[str, str]:
    """Names that a checkpoint may hold beside the layout's, and what each must be equal to."""
    tied = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
    return dict(mtp_copies(config)) | tied
