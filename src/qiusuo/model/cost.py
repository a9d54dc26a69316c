"""What a model costs, known from its config alone: parameters, memory, cache, arithmetic.

Everything is counted on a model built on the meta device, which has shapes and no storage, so a
671B model is weighed in a second on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qiusuo.model.checks import ConfigError
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.low_bit import CODES, SCALES, make_low_bit
from qiusuo.model.names import layer_of
from qiusuo.model.transformer import Transformer

ROUTER, ROUTER_BIAS = ".mlp.gate.weight", ".e_score_correction_bias"
BYTES_PER_WEIGHT = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "fp8 (128×128 blocks)": 1 + 4 / 128**2,
    "int8 (blocks of 32)": 1 + 2 / 32,
    "int4 (blocks of 32)": 0.5 + 2 / 32,
}


@dataclass(frozen=True)
class Cost:
    """Counts are of numbers stored in a checkpoint (router biases included, MTP copies not).

    ``active``: parameters one token's forward pass multiplies with, head and embedding row
    included, MTP modules not. ``matmul_active``: those of them in matrix products. Cache sizes in
    elements per token, over all layers: latents, and the keys and values they stand for."""

    parameters: int
    mtp_parameters: int
    active: int
    matmul_active: int
    matmul_active_mtp: int
    cache_elements: int
    expanded_cache_elements: int
    attention_width: int
    attention_width_mtp: int

    def weight_bytes(self, precision: str) -> int:
        return int((self.parameters + self.mtp_parameters) * BYTES_PER_WEIGHT[precision])

    def forward_flops(self, context: float, mtp: bool = False) -> float:
        """Floating-point operations for one token that sees ``context`` tokens: two for each
        weight of a product, two for each of attention's scores and of their products."""
        weights = self.matmul_active + (self.matmul_active_mtp if mtp else 0)
        width = self.attention_width + (self.attention_width_mtp if mtp else 0)
        return 2.0 * weights + 2.0 * context * width

    def training_flops(self, sequence_length: int) -> float:
        """One token forward and backward, MTP included: three forward passes' worth. A causal
        token sees half the sequence on average."""
        return 3.0 * self.forward_flops(sequence_length / 2, mtp=True)


def meta_model(config: ModelConfig) -> Transformer:
    """The model with shapes and without storage. ConfigError where a tensor would have more
    numbers than can be counted."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"no model can have the sizes of this config: {reason}") from error


def held_tensors(
    config: ModelConfig, dtype: torch.dtype, bits: int | None = None
) -> dict[str, Tensor]:
    """Every tensor as a loaded model holds it, on the meta device: router biases in float32
    whatever ``dtype`` is, a tied head not again. With ``bits`` there are codes and scales in the
    place of most weights, and routers are in float32 too: a rounded score is another expert."""
    model = meta_model(config)
    if bits is not None:
        make_low_bit(model, bits)
    exact = ROUTER_BIAS if bits is None else (ROUTER_BIAS, ROUTER)
    held: dict[str, Tensor] = {}
    for name, meta in model.state_dict().items():
        if name.endswith((CODES, SCALES)):
            held[name] = meta
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            held[name] = meta.to(torch.float32 if name.endswith(exact) else dtype)
    return held


def needed_bytes(config: ModelConfig, dtype: torch.dtype, bits: int | None = None) -> int:
    """Memory of the weights as ``load_model`` holds them."""
    return sum(tensor.nbytes for tensor in held_tensors(config, dtype, bits).values())


def measure(config: ModelConfig) -> Cost:
    """Count a model. Exact for every config that ModelConfig accepts."""
    model = meta_model(config)
    total = {False: 0, True: 0}  # by whether in an MTP layer
    used = {False: 0, True: 0}
    matmul = {False: 0, True: 0}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        mtp = layer_of(name) >= config.num_hidden_layers
        count = tensor.numel()
        total[mtp] += count
        if ".experts." in name and isinstance(config, DeepseekConfig):
            count = count * config.num_experts_per_tok // config.n_routed_experts
        if name == "model.embed_tokens.weight":
            used[mtp] += config.hidden_size
            continue
        used[mtp] += count
        matmul[mtp] += count if tensor.ndim > 1 else 0
    head = config.vocab_size * config.hidden_size
    if config.tie_word_embeddings:
        used[False] += head - config.hidden_size  # the embedding's row is one of the head's
        matmul[False] += head
    matmul[True] += head * config.num_nextn_predict_layers
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    widths = sum(config.head_widths)
    return Cost(
        parameters=total[False],
        mtp_parameters=total[True],
        active=used[False],
        matmul_active=matmul[False],
        matmul_active_mtp=matmul[True],
        cache_elements=layers * config.cache_width,
        expanded_cache_elements=layers * heads * widths,
        attention_width=layers * heads * widths,
        attention_width_mtp=config.num_nextn_predict_layers * heads * widths,
    )


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory a new process can still use: of this machine, and of the control
    groups (a container's limit) that this process is in."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):
        for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                free += _rooms(groups, path, "memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
                free += _rooms(groups / "memory", path, *names)
    return max(min(free), 0)


def _rooms(root: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[int]:
    """What each group from ``path`` up to ``root`` has left; pages of files can be given back.
    Inside a container the path may be the host's, and the root is then the container's group."""
    place = root / path.strip("/")
    for folder in (place, *place.parents):
        with suppress(OSError, ValueError):  # not there, or "max": no limit
            most = int((folder / limit).read_text(encoding="ascii"))
            room = most - int((folder / usage).read_text(encoding="ascii"))
            for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
                key, _, value = line.partition(" ")
                if key in (f"{prefix}inactive_file", f"{prefix}active_file"):
                    room += int(value)
            yield room
        if folder == root:
            return
