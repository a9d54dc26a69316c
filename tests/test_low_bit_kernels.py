"""The native low-bit kernels against float64 sums of the very codes that they multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qiusuo.kernels import low_bit
from qiusuo.kernels.low_bit import LowBit, quantize
from qiusuo.kernels.native import CHOICES, Native, native

LIBRARY = native()
NUMBERS = [
    number for number in range(1, 6) if LIBRARY and LIBRARY.library.qiusuo_instructions(number)
]
NAMES = [LIBRARY.library.qiusuo_instructions(n).decode() for n in NUMBERS] if LIBRARY else []

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")
every_instruction_set = pytest.mark.parametrize("number", NUMBERS, ids=NAMES)

SHAPES = [  # M rows, wide, columns: around a tile, a slice, a block and a group of blocks
    (1, 3, 5), (1, 17, 32), (2, 70, 64), (3, 9, 130), (4, 64, 512), (5, 130, 1408), (9, 33, 544),
    (16, 48, 1056), (17, 31, 100), (33, 40, 1024), (66, 150, 290), (130, 5, 257),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    yield
    torch.set_num_threads(threads)


def of(number: int) -> Native:
    assert LIBRARY is not None
    return dataclasses.replace(LIBRARY, instruction_set=number)


def as_meant(weight: LowBit) -> Tensor:
    """The numbers in float64, out of nothing but the format's description."""
    if weight.bits == 8:
        level = weight.codes.double()
    else:
        table = torch.tensor(low_bit.LEVELS, dtype=torch.float64)
        bytes_of_blocks = weight.codes.long().unflatten(-1, (-1, 16))
        level = torch.cat((table[bytes_of_blocks % 16], table[bytes_of_blocks // 16]), -1)
        level = level.flatten(-2)
    value = level.unflatten(-1, (-1, 32)) * weight.scales.double()[..., None]
    return value.flatten(-2)[..., : weight.columns]


def coded(x_MI: Tensor) -> Tensor:
    """x as 8-bit codes times scales of blocks of 32 (scale = largest / 127), in float64."""
    block = F.pad(x_MI.float(), (0, -x_MI.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = block.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, 0, torch.tensor(127.0) / largest)
    code = (block * inverse).round().clamp(-127, 127).double()
    return (code * (largest / 127).double()).flatten(1)[:, : x_MI.shape[1]]


def weight_of(*shape: int, bits: int) -> LowBit:
    """With a row of zeros and, where there are two blocks, a block of zeros."""
    weight = torch.randn(shape)
    weight[..., 0, :] = 0
    weight[..., -1, 32:64] = 0
    return quantize(weight, bits)


def error(made: Tensor, wanted: Tensor) -> float:
    return float((made.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


@every_instruction_set
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("M", "wide", "columns"), SHAPES)
def test_linear_is_the_sum_of_its_codes(
    number: int, bits: int, M: int, wide: int, columns: int
) -> None:
    weight, x, bias = (
        weight_of(wide, columns, bits=bits),
        torch.randn(M, columns),
        torch.randn(wide),
    )
    x[0, :32] = 0
    wanted = coded(x) @ as_meant(weight).T + bias
    assert error(of(number).linear(x, weight.codes, weight.scales, bias), wanted) < 2e-6


@every_instruction_set
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("M", "wide", "columns"), SHAPES)
def test_each_row_alone_gives_the_same_bits(
    number: int, bits: int, M: int, wide: int, columns: int
) -> None:
    weight, x = weight_of(wide, columns, bits=bits), torch.randn(M, columns)
    together = of(number).linear(x, weight.codes, weight.scales)
    for m in range(M):
        alone = of(number).linear(x[m : m + 1].clone(), weight.codes, weight.scales)
        assert torch.equal(alone[0], together[m])
    # All instruction sets sum in one order, and bfloat16 is but a rounding of the result.
    assert torch.equal(together, of(NUMBERS[0]).linear(x, weight.codes, weight.scales))
    if number == CHOICES["amx"]:
        return  # takes many rows of bfloat16 another way
    short = of(number).linear(x.bfloat16(), weight.codes, weight.scales)
    long = of(number).linear(x.bfloat16().float(), weight.codes, weight.scales)
    assert torch.equal(short, long.bfloat16())


@every_instruction_set
@pytest.mark.parametrize("bits", [8, 4])
def test_threads_do_not_change_a_bit(number: int, bits: int) -> None:
    weight, x = weight_of(700, 512, bits=bits), torch.randn(5, 512)
    gate_up, down = weight_of(8, 256, 128, bits=bits), weight_of(8, 128, 128, bits=bits)
    y, choice = torch.randn(9, 128), torch.randint(8, (9, 3))
    made = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        made.append(
            (
                of(number).linear(x, weight.codes, weight.scales),
                of(number).experts(y, torch.ones(9, 3), choice, *both(gate_up, down)),
            )
        )
    for linear, experts in made[1:]:
        assert torch.equal(linear, made[0][0])
        assert torch.equal(experts, made[0][1])


def both(gate_up: LowBit, down: LowBit) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (gate_up.codes, gate_up.scales), (down.codes, down.scales)


def experts_as_meant(
    x: Tensor, weights: Tensor, indices: Tensor, gate_up: LowBit, down: LowBit
) -> Tensor:
    wide, back, x_codes = as_meant(gate_up), as_meant(down), coded(x)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for m, choices in enumerate(indices.tolist()):
        for k, expert in enumerate(choices):
            gate, up = (wide[expert] @ x_codes[m]).chunk(2)
            hidden = coded((F.silu(gate) * up).float()[None])[0]
            out[m] += weights[m, k].double() * (back[expert] @ hidden)
    return out


@every_instruction_set
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("M", "K", "E", "D", "F"),
    [(1, 2, 4, 33, 65), (7, 3, 5, 64, 96), (90, 2, 3, 256, 70), (40, 6, 64, 130, 33)],
)
def test_experts_are_the_sum_of_their_codes(
    number: int, bits: int, M: int, K: int, E: int, D: int, F: int
) -> None:
    gate_up, down = weight_of(E, 2 * F, D, bits=bits), weight_of(E, D, F, bits=bits)
    x, weights = torch.randn(M, D), torch.rand(M, K)
    indices = torch.stack([torch.randperm(E)[:K] for _ in range(M)])
    run = of(number).experts
    made = run(x, weights, indices, *both(gate_up, down))
    # A hidden number at the edge of two codes may fall to either side: one step of 1/127.
    assert error(made, experts_as_meant(x, weights, indices, gate_up, down)) < 2e-3
    for m in range(M):
        row = slice(m, m + 1)
        alone = run(
            x[row].clone(), weights[row].clone(), indices[row].clone(), *both(gate_up, down)
        )
        assert torch.equal(alone[0], made[m])
    assert torch.equal(made, of(NUMBERS[0]).experts(x, weights, indices, *both(gate_up, down)))


@every_instruction_set
def test_one_expert_for_all_needs_no_choices(number: int) -> None:
    gate_up, down = weight_of(1, 66, 100, bits=4), weight_of(1, 100, 33, bits=4)
    x, ones, zeros = torch.randn(3, 100), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64)
    alone = of(number).experts(x, None, None, *both(gate_up, down))
    assert torch.equal(alone, of(number).experts(x, ones, zeros, *both(gate_up, down)))


@every_instruction_set
@pytest.mark.parametrize(("M", "wide", "columns"), SHAPES)
def test_bfloat16_weights(number: int, M: int, wide: int, columns: int) -> None:
    weight, x = torch.randn(wide, columns).bfloat16(), torch.randn(M, columns).bfloat16().float()
    made = of(number).linear(x, weight, None)
    assert error(made, x.double() @ weight.double().T) < 2e-6
    for m in range(M):
        assert torch.equal(of(number).linear(x[m : m + 1].clone(), weight, None)[0], made[m])


@every_instruction_set
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [5, 64, 1000])
@pytest.mark.parametrize("weighed", [False, True])
def test_conversions_are_those_of_the_reference(
    number: int, bits: int, columns: int, weighed: bool
) -> None:
    importance = torch.rand(columns).exp() ** 4 if weighed else None
    rows = torch.randn(37, columns) * torch.rand(37, 1)
    rows[3], rows[5], rows[6, 0] = 0, rows[5] * 1e-6, 1e6
    for given in (rows, rows.bfloat16()):
        wanted = low_bit._quantize_reference(given, bits, importance)
        codes, scales = torch.empty_like(wanted.codes), torch.empty_like(wanted.scales)
        of(number).quantize(given, codes, scales, importance)
        # Sums of another order may round a scale to its neighbour in float16.
        assert float((scales != wanted.scales).float().mean()) < 0.002
        same = (scales == wanted.scales).repeat_interleave(4 * bits, 1)
        assert torch.equal(codes[same], wanted.codes[same])
    out = torch.empty(37, columns, dtype=torch.bfloat16)
    of(number).dequantize(wanted.codes, wanted.scales, columns, out)
    assert torch.equal(out, low_bit.dequantize(wanted, torch.bfloat16))


def test_error_is_put_where_it_matters_least() -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(200, 96), torch.rand(96) ** 4 + 1e-3
    plain, weighed = low_bit.quantize(weight, 4), low_bit.quantize(weight, 4, importance)
    lost, lost_weighed = (
        ((low_bit.dequantize(one) - weight).square() * importance).sum() for one in (plain, weighed)
    )
    assert lost_weighed < 0.93 * lost
    assert torch.equal(low_bit.quantize(weight, 4, torch.ones(96)).codes, plain.codes)
    for wrong in (torch.ones(95), torch.zeros(96)):
        with pytest.raises(ValueError, match="96 positive numbers"):
            low_bit.quantize(weight, 4, wrong)


@every_instruction_set
def test_not_a_number_spoils_its_own_row_only(number: int) -> None:
    weight, x = quantize(torch.randn(6, 96), 4), torch.randn(3, 96)
    clean = of(number).linear(x, weight.codes, weight.scales)
    x[1, 40] = torch.nan
    made = of(number).linear(x, weight.codes, weight.scales)
    assert bool(made[1].isnan().all())
    assert torch.equal(made[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 5, 200])
def test_linear_by_either_way_is_near_the_reference(bits: int, dtype: torch.dtype, M: int) -> None:
    weight, x, bias = (
        weight_of(48, 320, bits=bits),
        torch.randn(M, 320, dtype=dtype),
        torch.randn(48),
    )
    wanted = x.double() @ as_meant(weight).T + bias
    with torch.inference_mode():
        assert error(low_bit.low_bit_linear(x[:, None], weight, bias)[:, 0], wanted) < 0.02
        in_eights = low_bit.low_bit_linear(x, weight, bias, rows=8)
        alone = low_bit.low_bit_linear(x[:1], weight, bias, rows=8)
    assert error(in_eights, wanted) < 0.02
    assert torch.equal(alone, in_eights[:1])


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("M", [1, 6, 400])
def test_experts_by_either_way_are_near_the_reference(bits: int, M: int) -> None:
    gate_up, down = weight_of(4, 128, 96, bits=bits), weight_of(4, 96, 64, bits=bits)
    x, weights, indices = torch.randn(M, 96), torch.rand(M, 2), torch.randint(4, (M, 2))
    reference = low_bit.low_bit_experts_reference(x, weights, indices, gate_up, down)
    in_fives = low_bit.low_bit_experts_reference(x, weights, indices, gate_up, down, rows=5)
    assert error(in_fives, reference.double()) < 1e-5
    for given in (x, x.bfloat16()):
        made = low_bit.low_bit_experts(given, weights, indices, gate_up, down)
        assert made.dtype is given.dtype
        assert error(made, reference.double()) < 0.03


@pytest.mark.parametrize("bits", [8, 4])
def test_with_rows_none_depends_on_the_others(bits: int) -> None:
    weight, x = weight_of(64, 256, bits=bits), torch.randn(50, 256).bfloat16()
    gate_up, down = weight_of(2, 128, 256, bits=bits), weight_of(2, 256, 64, bits=bits)
    weights, indices = torch.rand(50, 2), torch.randint(2, (50, 2))
    linear = low_bit.low_bit_linear(x, weight, rows=8)
    experts = low_bit.low_bit_experts(x, weights, indices, gate_up, down, rows=8)
    for m in range(50):
        row = slice(m, m + 1)
        assert torch.equal(low_bit.low_bit_linear(x[row], weight, rows=8), linear[row])
        alone = low_bit.low_bit_experts(x[row], weights[row], indices[row], gate_up, down, rows=8)
        assert torch.equal(alone, experts[row])


def test_gradients_reach_x_through_the_reference() -> None:
    weight, x = quantize(torch.randn(8, 64), 4), torch.randn(2, 64, requires_grad=True)
    low_bit.low_bit_linear(x, weight).sum().backward()
    assert x.grad is not None
    assert error(x.grad, as_meant(weight).sum(0).expand(2, 64)) < 1e-5
