"""Weights of 8 and 4 bits: blocks of 32 numbers of a row, and one scale for each block.

A number is ``scale · level``. In 8 bits a level is an integer from −127 to 127. In 4 bits it is one
of the sixteen of ``LEVELS``, which lie close together where weights are many and far apart where
they are few: fitted to blocks of normally distributed numbers (Lloyd's iteration) they leave 28%
less squared error than sixteen equal steps. All levels are 8-bit integers, so that one instruction
of the processor multiplies them, whatever they are stored in (native/README.md).

A block's scale is the one that leaves the least squared error among a few candidates. It may be
negative: the sixteen levels reach further below zero than above. Where it is known how much each
column matters, 4 bits weigh its error by that (checkpoint/calibration.py).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qiusuo.kernels.expert_rows import gather_rows, sort_by_expert, sum_choices
from qiusuo.kernels.linear import in_blocks
from qiusuo.kernels.native import Native, native, native_for
from qiusuo.kernels.swiglu import WeightedRows

# O out, I in, I' = I rounded up to whole blocks, n = I'/32 blocks of a row, c the 32 of a block.
# M rows of x, K experts per token, E experts, D hidden, F expert width, R rows sorted by expert.

BLOCK = 32
LEVELS = (-127, -101, -80, -62, -47, -34, -21, -9, 2, 13, 25, 37, 50, 65, 83, 108)
_STRETCHES = (0.88, 0.94, 1.0, 1.07)  # of the scale that just reaches the largest number
_LARGEST = torch.finfo(torch.float16).max
_CHUNK = 1 << 20  # numbers whose scales are sought at a time
_MANY = 32  # rows from which, without AMX, a weight is worth making bfloat16 first
_room = threading.local()


@dataclass(frozen=True)
class LowBit:
    """A matrix [O, I], or a stack of them, in blocks.

    ``codes``: 8 bits: int8 [..., O, I'], the levels. 4 bits: uint8 [..., O, I'/2]; of a block's 16
    bytes, byte i holds number i below and number 16 + i above. ``scales``: float16 [..., O, I'/32].
    What a row has beyond ``columns`` means nothing."""

    codes: Tensor
    scales: Tensor
    columns: int

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype is torch.int8 else 4

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.columns)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, index: int) -> LowBit:
        """One matrix of a stack."""
        return LowBit(self.codes[index], self.scales[index], self.columns)


def code_shapes(shape: tuple[int, ...], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``codes`` and ``scales`` for a weight of that shape."""
    *lead, columns = shape
    blocks = -(-columns // BLOCK)
    return (*lead, blocks * BLOCK * bits // 8), (*lead, blocks)


def quantize(weight_OI: Tensor, bits: int, importance_I: Tensor | None = None) -> LowBit:
    """``weight`` [..., O, I] in 8 or 4 bits. ``importance``: how much a squared error of each
    column counts, positive; 8 bits have no use for it. ValueError for another number of bits, and
    for a weight that is not finite or too large for a float16 scale."""
    if bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4, not {bits}")
    weight_OI = weight_OI.detach()
    for values in weight_OI.flatten().split(_CHUNK):
        least, most = values.aminmax()
        if not bool(least.isfinite() & most.isfinite()):
            raise ValueError("a weight is not finite")
        if float(torch.maximum(-least, most)) > 0.8 * _LARGEST * 108:
            raise ValueError("a weight is too large for a float16 scale")
    if importance_I is not None:
        importance_I = importance_I.float().contiguous()
        positive = bool((importance_I > 0).all())
        if importance_I.shape != weight_OI.shape[-1:] or not positive:
            raise ValueError(f"importance: {weight_OI.shape[-1]} positive numbers are wanted")
    library = native() if weight_OI.device.type == "cpu" else None
    return (
        _quantize_reference(weight_OI, bits, importance_I)
        if library is None
        else _quantize_native(library, weight_OI, bits, importance_I)
    )


def _quantize_native(
    library: Native, weight_OI: Tensor, bits: int, importance_I: Tensor | None
) -> LowBit:
    shape, scale_shape = code_shapes(tuple(weight_OI.shape), bits)
    codes = torch.empty(shape, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(scale_shape, dtype=torch.float16)
    rows_OI = weight_OI.flatten(0, -2)
    if rows_OI.dtype is not torch.bfloat16:
        rows_OI = rows_OI.float()
    flat = codes.flatten(0, -2), scales.flatten(0, -2)
    library.quantize(rows_OI.contiguous(), *flat, importance_I)
    return LowBit(codes, scales, weight_OI.shape[-1])


def _quantize_reference(weight_OI: Tensor, bits: int, importance_I: Tensor | None = None) -> LowBit:
    rest = -weight_OI.shape[-1] % BLOCK
    padded = F.pad(weight_OI, (0, rest))
    if importance_I is None:
        importance_I = padded.new_ones(weight_OI.shape[-1], dtype=torch.float32)
    every = F.pad(importance_I, (0, rest), value=1.0).expand(padded.shape).reshape(-1, BLOCK)
    shape, scale_shape = code_shapes(tuple(weight_OI.shape), bits)
    codes, scales = [], []
    chunk = _CHUNK // BLOCK
    for block_nc, counts_nc in zip(
        padded.reshape(-1, BLOCK).split(chunk), every.split(chunk), strict=True
    ):
        values_nc = block_nc.float()
        code_nc, scale_n = _eight(values_nc) if bits == 8 else _four(values_nc, counts_nc)
        codes.append(code_nc)
        scales.append(scale_n)
    return LowBit(
        torch.cat(codes).view(shape), torch.cat(scales).view(scale_shape), weight_OI.shape[-1]
    )


def dequantize(weight: LowBit, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers meant [..., O, I]."""
    if weight.bits == 8:
        level = weight.codes.float()
    else:
        pair = weight.codes.unflatten(-1, (-1, BLOCK // 2))
        index = torch.cat((pair & 15, pair >> 4), -1).flatten(-2)
        level = torch.tensor(LEVELS, dtype=torch.float32, device=index.device)[index.int()]
    value = level.unflatten(-1, (-1, BLOCK)) * weight.scales.float()[..., None]
    return value.flatten(-2)[..., : weight.columns].to(dtype)


def dequantize_bf16(weight: LowBit, out_OI: Tensor | None = None) -> Tensor:
    """As ``dequantize`` to bfloat16, by the native kernel where there is one; into ``out``."""
    if out_OI is None:
        out_OI = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.codes.device)
    library = native() if out_OI.device.type == "cpu" else None
    if library is None:
        return out_OI.copy_(dequantize(weight, torch.bfloat16))
    codes, scales = weight.codes.flatten(0, -2), weight.scales.flatten(0, -2)
    library.dequantize(codes, scales, weight.columns, out_OI.flatten(0, -2))
    return out_OI


def low_bit_linear_reference(x: Tensor, weight: LowBit) -> Tensor:
    """x Wᵀ [..., O] in float32, returned in x's type."""
    return (x.float() @ dequantize(weight).T).to(x.dtype)


def low_bit_linear(
    x: Tensor, weight: LowBit, bias_O: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """x Wᵀ + b [..., O] in x's type, for x [..., I].

    On a CPU, without gradients, few rows go to the native kernel, which makes x 8-bit codes too;
    for many the weight is made bfloat16 first, by AMX a few rows of it at a time. ``rows``: a row's
    result must not depend on the others, as in ``linear``; the kernel for few rows keeps to that
    by itself, so it takes any number."""
    x_MI = x.reshape(-1, x.shape[-1])
    library = _library(x, rows)
    if library is not None and len(x_MI) and _takes(library, x, rows, len(x_MI)):
        bias = None if bias_O is None else bias_O.float().contiguous()
        out_MO = library.linear(x_MI.contiguous(), weight.codes, weight.scales, bias)
        return out_MO.view(*x.shape[:-1], -1)
    if library is not None and x.dtype is torch.bfloat16:
        out_MO = torch.mm(x_MI, _as_bf16(weight).t())
    elif rows is None:
        out_MO = low_bit_linear_reference(x_MI, weight)
    else:
        blocks = [low_bit_linear_reference(block, weight) for block in in_blocks(x_MI, rows)]
        out_MO = torch.cat(blocks)[: len(x_MI)]
    if bias_O is not None:
        out_MO = out_MO + bias_O.to(out_MO.dtype)
    return out_MO.view(*x.shape[:-1], -1)


def low_bit_experts(
    x_MD: Tensor,
    weights_MK: Tensor,
    indices_MK: Tensor,
    gate_up: LowBit,
    down: LowBit,
    rows: int | None = None,
) -> Tensor:
    """Sum over a token's experts of weight · down(silu(gate x) · up x) [M, D], as in
    ``experts_grouped``; ``gate_up`` [E, 2F, D], ``down`` [E, D, F]."""
    library = _library(x_MD, rows)
    per_expert = indices_MK.numel() / len(gate_up.codes)
    if library is not None and len(x_MD) and _takes(library, x_MD, rows, per_expert):
        return library.experts(
            x_MD.contiguous(),
            weights_MK.float().contiguous(),
            indices_MK.contiguous(),
            (gate_up.codes, gate_up.scales),
            (down.codes, down.scales),
        )
    if library is not None and x_MD.dtype is torch.bfloat16:
        return _experts_of_many(x_MD, weights_MK, indices_MK, gate_up, down)
    return low_bit_experts_reference(x_MD, weights_MK, indices_MK, gate_up, down, rows)


def low_bit_experts_reference(
    x_MD: Tensor,
    weights_MK: Tensor,
    indices_MK: Tensor,
    gate_up: LowBit,
    down: LowBit,
    rows: int | None = None,
) -> Tensor:
    """Expert by expert, of which one at a time is dequantised."""
    out_MKD = x_MD.new_zeros(*indices_MK.shape, x_MD.shape[1], dtype=torch.float32)
    for expert in indices_MK.unique().tolist():
        token, choice = torch.where(indices_MK == expert)
        x_RD, rest = x_MD[token].float(), -len(token) % (rows or 1)
        y_RD = []
        for block in F.pad(x_RD, (0, 0, 0, rest)).split(rows or len(token)):
            gate, up = low_bit_linear_reference(block, gate_up[expert]).chunk(2, dim=-1)
            y_RD.append(low_bit_linear_reference(F.silu(gate) * up, down[expert]))
        out_MKD[token, choice] = torch.cat(y_RD)[: len(token)]
    return (out_MKD * weights_MK[..., None].float()).sum(1).to(x_MD.dtype)


def _experts_of_many(
    x_MD: Tensor, weights_MK: Tensor, indices_MK: Tensor, gate_up: LowBit, down: LowBit
) -> Tensor:
    """Pairs sorted by expert; each expert is made bfloat16 and multiplied with its rows."""
    layout = sort_by_expert(indices_MK, len(gate_up.codes))
    weights_P = weights_MK.flatten().float()
    x_RD = gather_rows(x_MD, layout.pair_R, indices_MK.shape[1], x_MD.dtype)
    y_RD = torch.empty_like(x_RD)
    for expert, start, stop in layout.segments():
        h_RG = torch.mm(x_RD[start:stop], _as_bf16(gate_up[expert]).t())
        weighted_RF = WeightedRows(h_RG, weights_P, layout.pair_R[start:stop]).weighted()
        torch.mm(weighted_RF, _as_bf16(down[expert]).t(), out=y_RD[start:stop])
    return sum_choices(y_RD, layout.place_P, indices_MK.shape[1])


def _library(x: Tensor, rows: int | None) -> Native | None:
    """The native kernels, where they can take x; with ``rows`` those that work row by row."""
    library = native_for(x)
    return library if library is None or rows is None else library.without_tiles()


def _takes(library: Native, x: Tensor, rows: int | None, count: float) -> bool:
    """Whether so many rows of x are best multiplied by the native kernel."""
    amx = library.has_tiles and x.dtype is torch.bfloat16
    return amx or rows is not None or count < _MANY


def _as_bf16(weight: LowBit) -> Tensor:
    """``dequantize_bf16`` into room that this thread keeps: good until the next call."""
    numbers = weight.codes.shape[0] * weight.columns
    if len(getattr(_room, "flat", ())) < numbers:
        vars(_room).pop("flat", None)  # so that the old one is gone before the new one comes
        _room.flat = torch.empty(numbers, dtype=torch.bfloat16)
    return dequantize_bf16(weight, _room.flat[:numbers].view(weight.shape))


def _eight(values_nc: Tensor) -> tuple[Tensor, Tensor]:
    scale_n = (values_nc.abs().amax(1) / 127).half()
    level_nc = (values_nc / _nonzero(scale_n)).round().clamp_(-127, 127)
    return level_nc.to(torch.int8), scale_n


def _four(values_nc: Tensor, counts_nc: Tensor) -> tuple[Tensor, Tensor]:
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=values_nc.device)
    between = (levels[1:] + levels[:-1]) / 2
    farthest_n = values_nc.gather(1, values_nc.abs().argmax(1, keepdim=True))[:, 0]
    best = values_nc.new_full((len(values_nc),), torch.inf)
    best_scale = torch.zeros_like(best, dtype=torch.float16)
    for end in (levels[0], levels[-1]):
        for stretch in _STRETCHES:
            rough_nc = levels[
                torch.bucketize(values_nc / _nonzero(farthest_n / end * stretch), between)
            ]
            # With the levels chosen, the best scale is a division (least squares).
            products_n = (counts_nc * values_nc * rough_nc).sum(1)
            fitted_n = products_n / (counts_nc * rough_nc.square()).sum(1)
            scale_n = fitted_n.half()
            level_nc = levels[torch.bucketize(values_nc / _nonzero(scale_n), between)]
            off_nc = values_nc - level_nc * scale_n.float()[:, None]
            error_n = (counts_nc * off_nc.square()).sum(1)
            better = error_n < best
            best = torch.where(better, error_n, best)
            best_scale = torch.where(better, scale_n, best_scale)
    code_nc = torch.bucketize(values_nc / _nonzero(best_scale), between)
    low, high = code_nc.to(torch.uint8).chunk(2, dim=1)
    return low | (high << 4), best_scale


def _nonzero(scale_n: Tensor) -> Tensor:
    """As a divisor [n, 1]; a block of zeros keeps its scale of zero."""
    return torch.where(scale_n == 0, 1.0, scale_n.float())[:, None]
