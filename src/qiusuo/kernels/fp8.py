"""Matrix products of e4m3 numbers with fine-grained scales, forwards and backwards.

DeepSeek-V3 trains in FP8 (arXiv:2412.19437 §3.3). An e4m3 number has four significant bits and
reaches 448, so each small group of numbers gets a scale of its own from its largest one: 1×128 of
activations and gradients along the summed axis, 128×128 of weights. All three products of a layer
run so:

    forward          y  = x Wᵀ      x in 1×128 tiles of channels, W in 128×128 blocks
    input gradient   dx = dy W      dy in 1×128 tiles of channels, the same W transposed
    weight gradient  dW = dyᵀ x     both in 128×1 tiles of tokens

x is kept for the weight gradient as its e4m3 tiles, and quantised anew along the tokens (§3.5.2).
The equation is  Σ over blocks k of 128:  s_a[k] s_b[k] Σ a8 b8,  summed in float32.

Without FP8 hardware it is computed from dequantised numbers. Products of two e4m3 numbers are exact
in float32; their scales are not powers of two in general, so a dequantised number is rounded to 24
bits, as much as float32's sums are anyway. With scales that are powers of two, dequantised numbers
have four bits: exact in bfloat16 too, whose products are many times as fast on a CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# N rows, C columns, n and c blocks of them; M tokens, O out, I in; K what is summed over, k blocks.

BLOCK = 128
ROW, COLUMN, SQUARE = (1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK)
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it a scale would itself lose digits


class Scales(NamedTuple):
    """Which operands of a layer have scales rounded up to powers of two."""

    inputs: bool = False
    weights: bool = False
    gradients: bool = False


PLAIN = Scales()


class Quantized(NamedTuple):
    """``codes · scales``: e4m3 numbers [N, C], a float32 scale [n, c] for each ``block`` of them,
    smaller at the edges. ``powers``: all scales are powers of two."""

    codes_NC: Tensor
    scales_nc: Tensor
    block: tuple[int, int]
    powers: bool

    def t(self) -> Quantized:
        high, wide = self.block
        return Quantized(self.codes_NC.t(), self.scales_nc.t(), (wide, high), self.powers)

    def rows(self, start: int, stop: int) -> Quantized:
        """Of tiles that are one row high."""
        return self._replace(
            codes_NC=self.codes_NC[start:stop], scales_nc=self.scales_nc[start:stop]
        )


def quantize(x_NC: Tensor, block: tuple[int, int], powers: bool = False) -> Quantized:
    """A block's largest number becomes 448, the format's largest, or with ``powers`` comes as near
    below as a power of two takes it. A block with a number that is not finite has a scale that is
    not finite."""
    rows, columns = x_NC.shape
    blocks_nNcC = _in_blocks(x_NC.float(), block)
    scales_nc = (blocks_nNcC.abs().amax((1, 3)) / LARGEST).clamp_min(SMALLEST_SCALE)
    if powers:
        scales_nc = _next_power(scales_nc)
    scaled = (blocks_nNcC / scales_nc[:, None, :, None]).flatten(0, 1).flatten(1)
    codes_NC = scaled[:rows, :columns].to(torch.float8_e4m3fn)
    return Quantized(codes_NC, scales_nc, block, powers)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers meant [N, C]."""
    rows, columns = q.codes_NC.shape
    numbers, unit = _numbers(q.codes_NC)
    scaled = _in_blocks(numbers, q.block) * (q.scales_nc * unit)[:, None, :, None]
    return scaled.flatten(0, 1).flatten(1)[:rows, :columns].to(dtype)


def product(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """a bᵀ [A, B] of a [A, K] and b [B, K], whose blocks are 128 wide along K."""
    if on_tensor_cores(a.codes_NC.device, a, b):
        return tensor_core_product(a, b, dtype)
    # What is exact in bfloat16, and is wanted in it, is one product with float32 sums.
    exact = a.powers and b.powers and dtype is torch.bfloat16
    kind = torch.bfloat16 if exact else torch.float32
    with torch.autocast(a.codes_NC.device.type, enabled=False):
        return torch.mm(dequantize(a, kind), dequantize(b, kind).t()).to(dtype)


def weight_gradient(grad_MO: Tensor, x: Quantized, scales: Scales) -> Tensor:
    """dyᵀ x [O, I] in float32, from the x that the forward pass kept."""
    grad = quantize(grad_MO, COLUMN, scales.gradients)
    again = quantize(dequantize(x), COLUMN, scales.inputs)
    return product(grad.t(), again.t(), torch.float32)


def fp8_linear_reference(x_MI: Tensor, weight_OI: Tensor, scales: Scales = PLAIN) -> Tensor:
    """The equation of the forward pass, block by block; float32."""
    x, weight = quantize(x_MI, ROW, scales.inputs), quantize(weight_OI, SQUARE, scales.weights)
    out_MO = x_MI.new_zeros(len(x_MI), len(weight_OI), dtype=torch.float32)
    for k in range(x.scales_nc.shape[1]):
        here = slice(k * BLOCK, (k + 1) * BLOCK)
        sums_MO = x.codes_NC[:, here].float() @ weight.codes_NC[:, here].float().t()
        scale_O = weight.scales_nc[:, k].repeat_interleave(BLOCK)[: len(weight_OI)]
        out_MO += sums_MO * x.scales_nc[:, k, None] * scale_O
    return out_MO


def fp8_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, scales: Scales = PLAIN
) -> Tensor:
    """x Wᵀ + b for x [..., I] with all three products in FP8, in the autocast type where there is
    one. The gradient of the weight has the weight's type: float32 for master weights."""
    dtype = result_type(x)
    out_MO: Tensor = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight_OI, scales, dtype)
    if bias_O is not None:
        out_MO = out_MO + bias_O.to(dtype)
    return out_MO.view(*x.shape[:-1], -1)


def result_type(x: Tensor) -> torch.dtype:
    """The type that a layer's product has for such an input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, weight_OI: Tensor, scales: Scales, dtype: torch.dtype
    ) -> Tensor:
        x = quantize(x_MI, ROW, scales.inputs)
        weight = quantize(weight_OI, SQUARE, scales.weights)
        ctx.save_for_backward(*x[:2], *weight[:2])
        ctx.scales, ctx.dtypes = scales, (x_MI.dtype, weight_OI.dtype)
        return product(x, weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MO,) = grads
        scales, (x_dtype, weight_dtype) = ctx.scales, ctx.dtypes
        x_codes_MI, x_scales, weight_codes_OI, weight_scales = ctx.saved_tensors
        grad_x_MI = grad_weight_OI = None
        if ctx.needs_input_grad[0]:
            weight = Quantized(weight_codes_OI, weight_scales, SQUARE, scales.weights)
            grad = quantize(grad_MO, ROW, scales.gradients)
            grad_x_MI = product(grad, weight.t(), x_dtype)
        if ctx.needs_input_grad[1]:
            x = Quantized(x_codes_MI, x_scales, ROW, scales.inputs)
            grad_weight_OI = weight_gradient(grad_MO, x, scales).to(weight_dtype)
        return grad_x_MI, grad_weight_OI, None, None


def _in_blocks(x_NC: Tensor, block: tuple[int, int]) -> Tensor:
    """[n, high, c, wide], filled up with zeros at the edges."""
    high, wide = block
    below, beside = -x_NC.shape[0] % high, -x_NC.shape[1] % wide
    if below or beside:
        x_NC = F.pad(x_NC, (0, beside, 0, below))
    return x_NC.unflatten(1, (-1, wide)).unflatten(0, (-1, high))


def _next_power(scales: Tensor) -> Tensor:
    """The least power of two that is not below: a float32's exponent alone, one up where there are
    other bits."""
    powers = (scales.view(torch.int32) + 0x007FFFFF & 0x7F800000).view(torch.float32)
    return torch.where(scales.isfinite(), powers, scales)


def _numbers(codes_NC: Tensor) -> tuple[Tensor, float]:
    """Float32 numbers and the unit they are in. PyTorch takes e4m3 apart one by one on a CPU; as
    the upper bits of a float16, whose exponent counts from 8 lower, it takes a fifth of the time.
    (NaN becomes a number: a block that had one has a scale that is NaN.)"""
    if codes_NC.device.type != "cpu":
        return codes_NC.float(), 1.0
    bits_NC = (codes_NC.view(torch.int8).to(torch.int16) << 7) & ~0x4000
    return bits_NC.view(torch.float16).float(), 256.0


# -- tensor cores: written after torch's ScaledBlas.cpp and its shape checks; run on no GPU yet --


def on_tensor_cores(device: torch.device, a: Quantized, b: Quantized) -> bool:
    """Whether PyTorch multiplies such operands in FP8 on this device: Hopper's tensor cores, with
    cuBLAS from CUDA 12.9 on."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    version = tuple(map(int, torch.version.cuda.split(".")[:2]))
    if version < (12, 9) or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    fits = b.codes_NC.shape[0] % BLOCK == 0 and (b.block == ROW or a.codes_NC.shape[1] % BLOCK == 0)
    return a.block == ROW and b.block in (ROW, SQUARE) and fits


def tensor_core_product(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """As ``product``. Scales of tiles are wanted column by column, those of blocks with their
    columns filled up to a multiple of four; tokens are filled up to whole tiles."""
    kind = F.ScalingType.BlockWise1x128
    b_kind = F.ScalingType.BlockWise128x128 if b.block == SQUARE else kind
    b_scales = b.scales_nc.t().contiguous().t()
    if b.block == SQUARE:
        b_scales = F.pad(b.scales_nc, (0, -b.scales_nc.shape[1] % 4)).contiguous().t()
    return F.scaled_mm(
        _whole_tiles(a.codes_NC),
        _whole_tiles(b.codes_NC).t(),
        a.scales_nc.t().contiguous().t(),
        kind,
        b_scales,
        b_kind,
        output_dtype=dtype,
    )


def _whole_tiles(codes_NK: Tensor) -> Tensor:
    bytes_NK = codes_NK.contiguous().view(torch.uint8)
    return F.pad(bytes_NK, (0, -codes_NK.shape[1] % BLOCK)).view(torch.float8_e4m3fn)
