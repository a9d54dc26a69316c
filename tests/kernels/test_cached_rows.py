"""Rows of the cache in int8: how far off, by whom, and that native and PyTorch say the same."""

import pytest
import torch
from torch import Tensor

from qiusuo.kernels.cached_rows import BLOCK, Int8Rows, PlainRows, row_bytes
from qiusuo.kernels.native import native

SHAPES = [(512, 64), (64, 32), (16, 8), (50, 6), (96, 0), (5, 3)]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(rows: Int8Rows, count: int = 70) -> Tensor:
    """Rows of sizes far apart, and one of zeros."""
    generator = torch.Generator().manual_seed(rows.rounded)
    numbers = torch.randn(count, rows.rounded + rows.exact, generator=generator)
    sizes = torch.logspace(-3, 3, count)[:, None]
    numbers_NZ = (numbers * sizes).to(rows.dtype)
    numbers_NZ[7] = 0
    return numbers_NZ


def kept(rows: Int8Rows, numbers_NZ: Tensor, slots_N: Tensor, cache: int = 200) -> Tensor:
    entries_SW = torch.zeros(cache, rows.width, dtype=torch.uint8)
    rows.keep(numbers_NZ, entries_SW, slots_N)
    return entries_SW


def test_bytes_of_a_row() -> None:
    v3 = Int8Rows(512, 64, torch.bfloat16)
    assert (row_bytes(v3), row_bytes(PlainRows(576, torch.bfloat16))) == (672, 1152)
    assert row_bytes(Int8Rows(1024, 0, torch.bfloat16)) == 1024 + 64
    assert all(Int8Rows(*shape, dtype).width % 32 == 0 for shape in SHAPES for dtype in TYPES)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rounded", "exact"), SHAPES)
def test_no_number_is_off_by_more_than_half_a_step(
    rounded: int, exact: int, dtype: torch.dtype
) -> None:
    rows = Int8Rows(rounded, exact, dtype)
    numbers_NZ, slots_N = drawn(rows), torch.randperm(200)[:70]
    read_NZ = rows.read(kept(rows, numbers_NZ, slots_N))[slots_N]
    assert read_NZ.dtype == dtype
    assert torch.equal(read_NZ[:, rounded:], numbers_NZ[:, rounded:])
    for first in range(0, rounded, BLOCK):
        block = slice(first, min(first + BLOCK, rounded))
        one = numbers_NZ[:, block].double()
        most_N = one.abs().amax(1)
        off_N = (read_NZ[:, block].double() - one).abs().amax(1)
        # Half a step, the scale's rounding of it, and that of what is read.
        assert (off_N <= most_N * (0.5 / 127 * 1.004 + torch.finfo(dtype).eps / 2)).all()
        assert (off_N[most_N > 0] > 0).any()


@pytest.mark.skipif(native() is None, reason="no native library here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rounded", "exact"), SHAPES)
def test_native_and_reference_give_the_same_bits(
    rounded: int, exact: int, dtype: torch.dtype
) -> None:
    rows = Int8Rows(rounded, exact, dtype)
    numbers_NZ, slots_N = drawn(rows), torch.randperm(200)[:70]
    numbers_NZ[1, 2], numbers_NZ[2, 1], numbers_NZ[3, 0] = torch.nan, torch.inf, -torch.inf
    numbers_NZ[4:6] = numbers_NZ[4:6] / numbers_NZ[4:6].abs().max() * 1e-38
    entries_SW = kept(rows, numbers_NZ, slots_N)
    assert torch.equal(entries_SW[slots_N], rows.rows_reference(numbers_NZ))
    native_SZ, reference_SZ = rows.read(entries_SW), rows.numbers_reference(entries_SW)
    assert torch.equal(native_SZ.isnan(), reference_SZ.isnan())
    assert torch.equal(native_SZ.nan_to_num(), reference_SZ.nan_to_num())


def test_what_is_not_finite_is_not_hidden() -> None:
    rows = Int8Rows(96, 8, torch.bfloat16)
    numbers_NZ = torch.ones(4, 104).bfloat16()
    numbers_NZ[0, 40], numbers_NZ[1, 95], numbers_NZ[2, 100] = torch.nan, torch.inf, torch.nan
    nan_NZ = rows.read(kept(rows, numbers_NZ, torch.arange(4)))[:4].isnan()
    expected_NZ = torch.zeros(4, 104, dtype=torch.bool)
    expected_NZ[0, 32:64], expected_NZ[1, 64:96], expected_NZ[2, 100] = True, True, True
    assert torch.equal(nan_NZ, expected_NZ)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_depends_on_itself_alone(dtype: torch.dtype) -> None:
    rows = Int8Rows(64, 32, dtype)
    numbers_NZ = drawn(rows)
    together = kept(rows, numbers_NZ, torch.arange(70))
    for n in (0, 7, 69):
        one = slice(n, n + 1)
        assert torch.equal(kept(rows, numbers_NZ[one], torch.arange(1))[0], together[n])
    assert not together[70:].any()  # no other row was touched
