"""Products in FP8 against the plain equation, block by block in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qiusuo.kernels.experts import experts_reference
from qiusuo.kernels.fp8 import (
    COLUMN,
    PLAIN,
    ROW,
    SQUARE,
    Quantized,
    Scales,
    dequantize,
    fp8_linear,
    fp8_linear_reference,
    on_tensor_cores,
    product,
    quantize,
    tensor_core_product,
)
from qiusuo.kernels.fp8_experts import experts_fp8
from tests.kernels.gradients import normal, value_and_grads

# M tokens, K experts per token, E experts, D hidden, F expert width, I in, O out.

POWERS = Scales(True, True, True)
BLOCKS = {"row": ROW, "column": COLUMN, "square": SQUARE}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
SHAPES = [(1, 1, 1), (128, 128, 128), (130, 257, 129), (300, 128, 384), (7, 200, 40)]


def uneven(*shape: int, seed: int) -> Tensor:
    """Numbers of very different sizes, from block to block and within."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-6, 6, shape, generator=generator)
    return torch.ldexp(normal(*shape, seed=seed), sizes)


def rounded(x_NC: Tensor, block: tuple[int, int], powers: bool) -> Tensor:
    """What quantising makes of numbers, by the definition, one block after the other; float64."""
    out_NC = torch.empty(x_NC.shape, dtype=torch.float64)
    for top in range(0, len(x_NC), block[0]):
        for left in range(0, x_NC.shape[1], block[1]):
            part = x_NC[top : top + block[0], left : left + block[1]].float()
            scale = part.abs().max() / 448
            if scale == 0:
                scale = torch.ones(())
            if powers:
                scale = torch.tensor(2.0 ** math.ceil(math.log2(scale)))
            codes = (part / scale).to(torch.float8_e4m3fn).double()
            out_NC[top : top + block[0], left : left + block[1]] = codes * scale.double()
    return out_NC


def by_blocks(a_AK: Tensor, b_BK: Tensor) -> Tensor:
    """a bᵀ, 128 of K at a time, in float64."""
    out_AB = torch.zeros(len(a_AK), len(b_BK), dtype=torch.float64)
    for start in range(0, a_AK.shape[1], 128):
        here = slice(start, start + 128)
        out_AB += a_AK[:, here] @ b_BK[:, here].t()
    return out_AB


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    largest = max(1e-30, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * largest)


# -- quantising ---------------------------------------------------------------------------


@every_block
@pytest.mark.parametrize("powers", [False, True], ids=["float", "powers"])
@given(rows=st.integers(1, 260), columns=st.integers(1, 260), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_quantising_is_the_definition(block, powers, rows, columns, seed):
    x_NC = uneven(rows, columns, seed=seed)
    q = quantize(x_NC, block, powers)
    assert q.codes_NC.dtype is torch.float8_e4m3fn
    assert q.codes_NC.shape == x_NC.shape
    assert q.scales_nc.shape == (-(-rows // block[0]), -(-columns // block[1]))
    expected = rounded(x_NC, block, powers)
    # A dequantised number is rounded to float32; powers of two leave nothing to round.
    torch.testing.assert_close(
        dequantize(q).double(), expected, rtol=0 if powers else 2**-24, atol=0
    )
    assert (expected - x_NC).abs().max() <= x_NC.abs().max() / 16


def test_every_code_is_read_as_the_number_it_is():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = codes.float()
    q = quantize(torch.full((1, 256), 448.0), ROW)._replace(codes_NC=codes[None])
    finite = numbers.isfinite()
    assert finite.sum() == 254
    assert torch.equal(dequantize(q)[0][finite], numbers[finite])


@every_block
def test_powers_of_two_are_the_next_above(block):
    x_NC = uneven(200, 300, seed=3)
    exact, powers = (quantize(x_NC, block, how).scales_nc for how in (False, True))
    mantissa, _ = torch.frexp(powers)
    assert (mantissa == 0.5).all()
    assert (powers >= exact).all()
    assert (powers < 2 * exact).all()
    already = quantize(torch.full((1, 1), 448.0 * 2**-7), block, True).scales_nc
    assert already.item() == 2**-7


def test_powers_of_two_are_exact_in_bfloat16_and_others_are_not():
    x_NC = uneven(64, 256, seed=4)
    for powers in (True, False):
        q = quantize(x_NC, ROW, powers)
        assert torch.equal(dequantize(q, torch.bfloat16).float(), dequantize(q)) == powers


def test_small_gradients_keep_their_digits():
    """A scale is never kept from being small: gradients are."""
    tiny_NC = normal(4, 256, seed=1) * 1e-24
    error = (dequantize(quantize(tiny_NC, ROW)) - tiny_NC).abs().amax()
    assert error < tiny_NC.abs().amax() / 25


@pytest.mark.parametrize("powers", [False, True], ids=["float", "powers"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_block_alone(bad, powers):
    x_NC = normal(2, 256, seed=1)
    x_NC[0, 3] = bad
    found = dequantize(quantize(x_NC, ROW, powers))
    assert not found[0, :128].isfinite().any()
    assert found[0, 128:].isfinite().all()
    assert found[1].isfinite().all()


def test_nothing_but_zeros():
    for powers in (False, True):
        assert not dequantize(quantize(torch.zeros(3, 130), ROW, powers)).any()


# -- the three products of a layer ---------------------------------------------------------


@pytest.mark.parametrize(("tokens", "wide", "out"), SHAPES)
@pytest.mark.parametrize(
    "scales",
    [PLAIN, Scales(inputs=True), Scales(gradients=True), POWERS],
    ids=["plain", "inputs", "gradients", "powers"],
)
def test_all_three_products_are_the_equation(tokens, wide, out, scales):
    x_MI = uneven(tokens, wide, seed=1)
    weight_OI = uneven(out, wide, seed=2)
    leaves = [x_MI.requires_grad_(), weight_OI.requires_grad_()]
    found_MO = fp8_linear(*leaves, None, scales)
    grad_MO = uneven(tokens, out, seed=3) * 1e-5
    found_MO.backward(grad_MO)
    x, weight = (leaf.detach() for leaf in leaves)
    x8_MI = rounded(x, ROW, scales.inputs)
    weight8_OI = rounded(weight, SQUARE, scales.weights)
    assert_near(found_MO.detach(), by_blocks(x8_MI, weight8_OI))
    grad8_MO = rounded(grad_MO, ROW, scales.gradients)
    assert_near(leaves[0].grad, by_blocks(grad8_MO, weight8_OI.t()))
    again_MI = rounded(x8_MI.float(), COLUMN, scales.inputs)
    column8_MO = rounded(grad_MO, COLUMN, scales.gradients)
    assert_near(leaves[1].grad, by_blocks(column8_MO.t(), again_MI.t()))


def test_the_reference_is_the_equation():
    x_MI, weight_OI = uneven(131, 300, seed=1), uneven(140, 300, seed=2)
    expected = by_blocks(rounded(x_MI, ROW, True), rounded(weight_OI, SQUARE, False))
    assert_near(fp8_linear_reference(x_MI, weight_OI, Scales(inputs=True)), expected)


def test_products_of_powers_are_rounded_to_bfloat16_once():
    a = quantize(uneven(70, 256, seed=1), ROW, True)
    b = quantize(uneven(50, 256, seed=2), SQUARE, True)
    exact = by_blocks(dequantize(a).double(), dequantize(b).double())
    found = product(a, b, torch.bfloat16).double()
    # Half a unit in the last of eight places, and where float32's sums fall beside a tie.
    assert ((found - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()
    assert (found == exact.bfloat16().double()).double().mean() > 0.999


def test_in_autocast_results_are_bfloat16_and_gradients_the_weights_type():
    x_BTI = normal(2, 3, 40, seed=1).requires_grad_()
    weight_OI = normal(20, 40, seed=2).requires_grad_()
    bias_O = normal(20, seed=3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out_BTO = fp8_linear(x_BTI, weight_OI, bias_O)
    assert out_BTO.dtype is torch.bfloat16
    assert out_BTO.shape == (2, 3, 20)
    out_BTO.float().square().sum().backward()
    for leaf in (x_BTI, weight_OI, bias_O):
        assert leaf.grad.dtype is torch.float32
    assert weight_OI.grad.ne(weight_OI.grad.bfloat16()).any()  # not rounded on the way


def test_a_frozen_weight_needs_no_gradient():
    x_MI = normal(5, 40, seed=1).requires_grad_()
    fp8_linear(x_MI, normal(20, 40, seed=2)).sum().backward()
    assert x_MI.grad.any()


def test_tiles_of_tokens_keep_what_one_large_token_would_drown():
    """Why gradients are not quantised in 128×128 blocks (V3, appendix B.2)."""
    grad_MO = normal(128, 128, seed=1) * 1e-4
    grad_MO[0] *= 1e6
    errors = [
        (dequantize(quantize(grad_MO, block)) - grad_MO)[1:].norm() / grad_MO[1:].norm()
        for block in (ROW, SQUARE)
    ]
    assert errors[0] < 0.04
    assert errors[1] > 0.9


# -- experts -------------------------------------------------------------------------------


def expert_inputs(tokens: int, choices: int, experts: int, hidden: int, width: int):
    weights_MK = normal(tokens, choices, seed=2).sigmoid()
    generator = torch.Generator().manual_seed(5)
    indices_MK = torch.stack(
        [torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)]
    )
    gate_up_EGD = normal(experts, 2 * width, hidden, seed=3) / hidden**0.5
    down_EDF = normal(experts, hidden, width, seed=4) / width**0.5
    return normal(tokens, hidden, seed=1), weights_MK, indices_MK, gate_up_EGD, down_EDF


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def by_hand(x_MD, weights_MK, indices_MK, gate_up_EGD, down_EDF, grad_MD, scales):
    """Value and gradients, expert by expert, as the paper's workflow has it; float64 sums."""
    up_scales, down_scales = scales
    names = ("out", "x", "weights", "gate_up", "down")
    likes = (x_MD, x_MD, weights_MK, gate_up_EGD, down_EDF)
    sums = {name: torch.zeros(like.shape).double() for name, like in zip(names, likes, strict=True)}
    for expert in range(len(gate_up_EGD)):
        token, choice = torch.where(indices_MK == expert)
        if not len(token):
            continue
        weight = weights_MK[token, choice, None]
        x8 = rounded(x_MD[token], ROW, up_scales.inputs)
        up8 = rounded(gate_up_EGD[expert], SQUARE, up_scales.weights)
        h = by_blocks(x8, up8).float()
        act = F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
        down8 = rounded(down_EDF[expert], SQUARE, down_scales.weights)
        sums["out"].index_add_(
            0, token, by_blocks(rounded(act * weight, ROW, down_scales.inputs), down8)
        )
        kept = rounded(h, ROW, False).float().requires_grad_()  # what the backward pass begins with
        act = F.silu(kept.chunk(2, -1)[0]) * kept.chunk(2, -1)[1]
        again = rounded(act.detach() * weight, ROW, down_scales.inputs).float()
        grad = grad_MD[token]
        sums["down"][expert] = by_blocks(
            rounded(grad, COLUMN, down_scales.gradients).t(),
            rounded(again, COLUMN, down_scales.inputs).t(),
        )
        grad_act = by_blocks(rounded(grad, ROW, down_scales.gradients), down8.t()).float()
        sums["weights"][token, choice] = (grad_act * act.detach()).sum(-1).double()
        (grad_h,) = torch.autograd.grad(act, kept, grad_act * weight)
        sums["gate_up"][expert] = by_blocks(
            rounded(grad_h, COLUMN, up_scales.gradients).t(),
            rounded(x8.float(), COLUMN, up_scales.inputs).t(),
        )
        sums["x"].index_add_(
            0, token, by_blocks(rounded(grad_h, ROW, up_scales.gradients), up8.t())
        )
    return list(sums.values())


@pytest.mark.parametrize("sizes", [(70, 3, 6, 160, 72), (9, 1, 4, 128, 128), (400, 2, 3, 40, 24)])
@pytest.mark.parametrize(
    "scales",
    [(Scales(inputs=True), Scales(gradients=True)), (POWERS, POWERS)],
    ids=["paper", "powers"],
)
def test_experts_are_the_paper_s_workflow(sizes, scales):
    x, weights, indices, gate_up, down = expert_inputs(*sizes)
    grad_MD = uneven(len(x), x.shape[1], seed=7)
    leaves = [leaf.requires_grad_() for leaf in (x, weights, gate_up, down)]
    out = experts_fp8(x, weights, indices, gate_up, down, *scales)
    out.backward(grad_MD)
    with torch.no_grad():
        plain = [leaf.detach() for leaf in (x, weights, gate_up, down)]
    expected = by_hand(*plain[:2], indices, *plain[2:], grad_MD, scales)
    # Numbers between two products may fall on the other side of a rounding: a few of thousands.
    for found, wanted in zip((out.detach(), *(x.grad for x in leaves)), expected, strict=True):
        assert far(found, wanted) < 3e-3


def test_experts_are_near_those_in_float32():
    x, weights, indices, gate_up, down = expert_inputs(200, 2, 4, 128, 128)
    fp8 = value_and_grads(
        lambda x, w, g, d: experts_fp8(x, w, indices, g, d), x, weights, gate_up, down
    )
    full = value_and_grads(
        lambda x, w, g, d: experts_reference(x, w, indices, g, d), x, weights, gate_up, down
    )
    for found, expected in zip(fp8, full, strict=True):
        assert 0.005 < far(found, expected) < 0.08


def test_an_expert_that_nobody_asks_has_no_gradient():
    x, weights, _, gate_up, down = expert_inputs(20, 1, 4, 40, 24)
    indices = torch.full((20, 1), 2)
    grads = value_and_grads(lambda g, d: experts_fp8(x, weights, indices, g, d), gate_up, down)[1:]
    for grad in grads:
        assert grad[2].any()
        assert not grad[[0, 1, 3]].any()


def test_padding_between_experts_adds_to_no_tile():
    """17 tokens of an expert are computed in 18 rows; token 0 is very large, and not among them."""
    x, weights, _, gate_up, down = expert_inputs(18, 1, 2, 40, 24)
    x[0] *= 1e6
    indices = torch.ones(18, 1, dtype=torch.long)
    indices[0] = 0
    both = value_and_grads(lambda g, d: experts_fp8(x, weights, indices, g, d)[1:], gate_up, down)
    alone = value_and_grads(
        lambda g, d: experts_fp8(x[1:], weights[1:], indices[1:], g, d), gate_up, down
    )
    for found, expected in zip(both, alone, strict=True):
        assert far(found, expected) < 3e-3


# -- tensor cores: only what can be known without them -----------------------------------------


def test_no_tensor_cores_on_a_cpu():
    a = quantize(normal(128, 128, seed=1), ROW)
    assert not on_tensor_cores(torch.device("cpu"), a, a)


@pytest.mark.parametrize(
    ("tokens", "wide", "out"), [(96, 256, 384), (128, 128, 128), (300, 640, 128)]
)
def test_pytorch_takes_the_layout_of_our_scales(tokens, wide, out):
    """Its own shape checks for the three products, without a device that could compute them."""
    x, weight, grad = nowhere(tokens, wide), nowhere(out, wide, SQUARE), nowhere(tokens, out)
    columns = nowhere(tokens, out, COLUMN).t(), nowhere(tokens, wide, COLUMN).t()
    for a, b, dtype in (
        (x, weight, torch.bfloat16),
        (grad, weight.t(), torch.bfloat16),
        (*columns, torch.float32),
    ):
        found = tensor_core_product(a, b, dtype)
        assert found.shape == (len(a.codes_NC), len(b.codes_NC))
        assert found.dtype is dtype


def nowhere(rows: int, columns: int, block: tuple[int, int] = ROW) -> Quantized:
    scales = -(-rows // block[0]), -(-columns // block[1])
    return Quantized(
        torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(scales, device="meta"),
        block,
        False,
    )
