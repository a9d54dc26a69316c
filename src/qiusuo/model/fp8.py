"""Which products of a model run in FP8, and with which scales (DeepSeek-V3, arXiv:2412.19437 §3.3).

FP8: the projections of attention and of every MLP and expert. Kept as they are: embedding, head,
routers, norms, attention itself, and ``eh_proj`` of an MTP module, which DeepSeek's files have in
bf16. "fp8" is the paper's: float32 scales, but powers of two for what is kept in more than one
tiling or sent to other devices (§3.3.3): inputs of ``o_proj`` and of the routed experts, and the
gradients that enter the experts' ``down_proj``. "fp8_ue8m0" has powers of two everywhere, as
DeepSeek-V3.1 was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

from qiusuo.kernels.fp8 import Scales
from qiusuo.model.layers import Linear
from qiusuo.model.moe import Experts
from qiusuo.model.transformer import Transformer

Fp8 = Literal["fp8", "fp8_ue8m0"]
POWERS = Scales(inputs=True, weights=True, gradients=True)


def fp8_modules(model: Transformer) -> dict[str, Linear | Experts]:
    """What computes in FP8, by the model's names."""
    return {
        f"model.layers.{number}.{part}.{name}": module
        for number, block in enumerate(model.model.layers)
        for part in ("self_attn", "mlp")
        for name, module in _part(block, part).named_modules()
        if isinstance(module, Linear | Experts)
    }


def _part(block: nn.Module, name: str) -> nn.Module:
    return block.get_submodule(name)


@contextmanager
def in_fp8(model: Transformer, how: Fp8 | None) -> Iterator[None]:
    """Forward passes of this model within run in FP8, their backward passes wherever they run."""
    chosen = fp8_modules(model) if how is not None else {}
    for name, module in chosen.items():
        if isinstance(module, Experts):
            module.fp8 = (Scales(inputs=True), Scales(gradients=True))
        else:
            module.fp8 = Scales(inputs=name.endswith("o_proj"))
        if how == "fp8_ue8m0":
            module.fp8 = (POWERS, POWERS) if isinstance(module, Experts) else POWERS
    try:
        yield
    finally:
        for module in chosen.values():
            module.fp8 = None
