"""The routed experts in FP8: ``experts_grouped`` with the products of ``fp8_linear``.

As DeepSeek-V3 trains them (arXiv:2412.19437 §3.3.3), what the backward pass keeps is in e4m3 too:
the inputs, and the inputs of SwiGLU, whose output is made again from them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.expert_rows import gather_rows, sort_by_expert, sum_choices
from qiusuo.kernels.fp8 import (
    PLAIN,
    ROW,
    SQUARE,
    Quantized,
    Scales,
    dequantize,
    product,
    quantize,
    result_type,
    weight_gradient,
)
from qiusuo.kernels.swiglu import activated, activated_backward

# M tokens, K experts per token, P = M*K pairs, R rows (the pairs sorted, some of them padding),
# E experts, D hidden, F expert width, G = 2F.


def experts_fp8(
    x_MD: Tensor,
    weights_MK: Tensor,
    indices_MK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    gate_up_scales: Scales = PLAIN,
    down_scales: Scales = PLAIN,
) -> Tensor:
    """As ``experts_grouped``; gradients of the stacks have the stacks' type."""
    dtype, both = result_type(x_MD), (gate_up_scales, down_scales)
    out_MD: Tensor = _Fp8Experts.apply(
        x_MD.to(dtype), weights_MK, indices_MK, gate_up_EGD, down_EDF, both
    )
    return out_MD


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weights_MK: Tensor,
        indices_MK: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        scales: tuple[Scales, Scales],
    ) -> Tensor:
        layout = sort_by_expert(indices_MK, len(gate_up_EGD))
        segments = layout.segments()
        weight_R = x_MD.new_zeros(len(layout.pair_R), 1)
        weight_R[layout.place_P] = weights_MK.reshape(-1, 1).to(x_MD.dtype)
        # Padding is zeros, and so is never the largest of a tile of tokens.
        x_RD = gather_rows(x_MD, layout.pair_R, indices_MK.shape[1], x_MD.dtype)
        x = quantize(x_RD, ROW, scales[0].inputs)
        gate_up = _quantize_all(gate_up_EGD, segments, scales[0])
        h_RG = _each(x, gate_up, segments, x_MD.dtype)
        down = _quantize_all(down_EDF, segments, scales[1])
        weighted = quantize(activated(h_RG) * weight_R, ROW, scales[1].inputs)
        y_RD = _each(weighted, down, segments, x_MD.dtype)
        h = quantize(h_RG, ROW)
        ctx.save_for_backward(
            *(weight_R, layout.place_P, layout.pair_R, *x[:2], *h[:2]),
            *(part for weight in (*gate_up, *down) for part in weight[:2]),
        )
        ctx.segments, ctx.scales = segments, scales
        ctx.pairs = weights_MK.shape, weights_MK.dtype
        ctx.stacks = [(stack.shape, stack.dtype) for stack in (gate_up_EGD, down_EDF)]
        return sum_choices(y_RD, layout.place_P, indices_MK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MD,) = grads
        weight_R, place_P, pair_R, x_codes, x_scales, h_codes, h_scales, *kept = ctx.saved_tensors
        up_scales, down_scales = ctx.scales
        segments, count = ctx.segments, 2 * len(ctx.segments)
        gate_up = _weights(kept[:count], up_scales)
        down = _weights(kept[count:], down_scales)
        grad_RD = gather_rows(grad_MD, pair_R, ctx.pairs[0][1], grad_MD.dtype)
        h_RG = dequantize(Quantized(h_codes, h_scales, ROW, False), grad_MD.dtype)
        act_RF = activated(h_RG)
        weighted = quantize(act_RF * weight_R, ROW, down_scales.inputs)
        grad = quantize(grad_RD, ROW, down_scales.gradients)
        grad_RF = _each(grad, [one.t() for one in down], segments, grad_MD.dtype)
        grad_weight_R = (grad_RF * act_RF).sum(-1, dtype=torch.float32)
        grad_h_RG = activated_backward(grad_RF * weight_R, h_RG)
        grad = quantize(grad_h_RG, ROW, up_scales.gradients)
        grad_x_RD = _each(grad, [one.t() for one in gate_up], segments, grad_MD.dtype)
        x = Quantized(x_codes, x_scales, ROW, up_scales.inputs)
        stacks: list[Tensor | None] = [None, None]
        for number, (rows, inputs) in enumerate(((grad_h_RG, x), (grad_RD, weighted))):
            if ctx.needs_input_grad[3 + number]:
                shape, dtype = ctx.stacks[number]
                stack = rows.new_zeros(shape, dtype=dtype)
                for expert, start, stop in segments:
                    stack[expert] = weight_gradient(
                        rows[start:stop], inputs.rows(start, stop), ctx.scales[number]
                    )
                stacks[number] = stack
        shape, dtype = ctx.pairs
        grad_weights_MK = grad_weight_R[place_P].view(shape).to(dtype)
        grad_x_MD = sum_choices(grad_x_RD, place_P, shape[1])
        return grad_x_MD, grad_weights_MK, None, *stacks, None


def _quantize_all(
    stack_EOI: Tensor, segments: list[tuple[int, int, int]], scales: Scales
) -> list[Quantized]:
    """The weights of the experts that have tokens, in the segments' order."""
    return [quantize(stack_EOI[expert], SQUARE, scales.weights) for expert, _, _ in segments]


def _weights(parts: list[Tensor], scales: Scales) -> list[Quantized]:
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [Quantized(codes, numbers, SQUARE, scales.weights) for codes, numbers in pairs]


def _each(
    x: Quantized, weights: list[Quantized], segments: list[tuple[int, int, int]], dtype: torch.dtype
) -> Tensor:
    """Each segment's rows times its expert's weight, transposed [R, O]."""
    return torch.cat(
        [
            product(x.rows(start, stop), weight, dtype)
            for (_, start, stop), weight in zip(segments, weights, strict=True)
        ]
    )
