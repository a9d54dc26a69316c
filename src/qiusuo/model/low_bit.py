"""Low-bit weights in a model: modules that hold codes and scales where others hold numbers.

What takes the bytes of a model is quantised: the projections of attention, the SwiGLU networks, the
routed experts. Two of them are small and sensitive and always have 8 bits: the head, and MLA's
``kv_b_proj``, which every key and value passes through; so has an MTP module's ``eh_proj``. Norms,
the router and the embedding (with it a tied head) stay as they are. Such a model runs, it does not
learn: rounded weights cannot move by the small steps of an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qiusuo.kernels.low_bit import LowBit, code_shapes, low_bit_experts, low_bit_linear
from qiusuo.model.layers import Linear
from qiusuo.model.moe import Experts, Routing

# O out, I in, E experts, M tokens, D hidden, F expert width.

CODES, SCALES = ".codes", ".scales"  # of a tensor, in a state dict and in a file
_ALWAYS_EIGHT = ("lm_head", "kv_b_proj", "eh_proj")


class Packed(nn.Module):
    """A weight [..., O, I] as two buffers; the values are to be loaded."""

    codes: Tensor
    scales: Tensor

    def __init__(self, shape: tuple[int, ...], bits: int) -> None:
        super().__init__()
        code_shape, scale_shape = code_shapes(shape, bits)
        kind = torch.int8 if bits == 8 else torch.uint8
        self.columns = shape[-1]
        self.register_buffer("codes", torch.zeros(code_shape, dtype=kind))
        self.register_buffer("scales", torch.zeros(scale_shape, dtype=torch.float16))

    @property
    def low_bit(self) -> LowBit:
        return LowBit(self.codes, self.scales, self.columns)


class LowBitLinear(Packed):
    """In the place of a ``Linear``, whose bias it keeps as it is."""

    rows: int | None = None

    def __init__(self, shape: tuple[int, int], bits: int, bias: nn.Parameter | None = None) -> None:
        super().__init__(shape, bits)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return low_bit_linear(x, self.low_bit, self.bias, self.rows)


class LowBitExperts(nn.Module):
    """In the place of ``Experts``: gate_up [E, 2F, D] and down [E, D, F]."""

    rows: int | None = None

    def __init__(self, experts: Experts, bits: int) -> None:
        super().__init__()
        self.gate_up_proj = Packed(tuple(experts.gate_up_proj.shape), bits)
        self.down_proj = Packed(tuple(experts.down_proj.shape), bits)

    def forward(self, x_MD: Tensor, routing: Routing) -> Tensor:
        return low_bit_experts(
            x_MD,
            routing.weights_MK,
            routing.indices_MK,
            self.gate_up_proj.low_bit,
            self.down_proj.low_bit,
            self.rows,
        )


def low_bit_weights(model: nn.Module, bits: int) -> dict[str, int]:
    """How many bits each weight gets in a model of ``bits``, by its name in the state dict. A tied
    head is the embedding and gets none."""
    return {
        weight: found
        for name, module in _replaceable(model)
        for weight, found in _weights(name, module, bits)
    }


def make_low_bit(model: nn.Module, bits: int) -> None:
    """Put low-bit modules, empty, in the place of the others. The values are to be loaded: with the
    model on the meta device nothing is allocated."""
    for name, module in list(_replaceable(model)):
        parent, _, leaf = name.rpartition(".")
        new: nn.Module
        with module_device(module):
            if isinstance(module, Experts):
                new = LowBitExperts(module, bits)
            else:
                shape = (module.out_features, module.in_features)
                new = LowBitLinear(shape, _bits(name, bits), module.bias)
        setattr(model.get_submodule(parent), leaf, new)


def is_low_bit(model: nn.Module) -> bool:
    return any(isinstance(module, Packed) for module in model.modules())


def stem(weight: str) -> str:
    """The name of a weight without what its codes and scales do not have."""
    return weight.removesuffix(".weight")


def module_device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _replaceable(model: nn.Module) -> Iterator[tuple[str, Linear | Experts]]:
    held: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            held[id(module.weight)] = name
        elif isinstance(module, Experts) or (
            isinstance(module, Linear) and id(module.weight) not in held
        ):
            yield name, module


def _weights(name: str, module: Linear | Experts, bits: int) -> Iterator[tuple[str, int]]:
    if isinstance(module, Experts):
        yield f"{name}.gate_up_proj", bits
        yield f"{name}.down_proj", bits
    else:
        yield f"{name}.weight", _bits(name, bits)


def _bits(name: str, bits: int) -> int:
    return 8 if name.rpartition(".")[2] in _ALWAYS_EIGHT else bits
