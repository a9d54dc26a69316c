"""Every head with its own weight: one call, against head by head in float64."""

import pytest
import torch

from qiusuo.kernels.low_bit import LowBit, dequantize, quantize
from qiusuo.kernels.native import native
from qiusuo.kernels.per_head import per_head, per_head_reference


def laid_out(weight: torch.Tensor, bits: int | None) -> torch.Tensor | LowBit:
    return weight.contiguous() if bits is None else quantize(weight, bits)


@torch.no_grad()
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "wide", "out"),
    [(1, 1, 4, 128, 512), (2, 3, 5, 40, 7), (1, 33, 3, 64, 48)],
)
def test_as_head_by_head(
    bits: int | None, dtype: torch.dtype, batch: int, tokens: int, heads: int, wide: int, out: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, heads, wide).to(dtype)
    weight = laid_out(torch.randn(heads, wide, out).to(dtype).transpose(1, 2), bits)
    meant = weight.double() if isinstance(weight, torch.Tensor) else dequantize(weight).double()
    expected = torch.einsum("bthi,hoi->btho", x.double(), meant)
    size = expected.abs().max()
    for got in (per_head(x, weight), per_head_reference(x, weight)):
        assert (got.shape, got.dtype) == (expected.shape, dtype)
        assert (got.double() - expected).abs().max() < 0.02 * size


@torch.no_grad()
@pytest.mark.skipif(native() is None, reason="the native library is not in use")
def test_a_row_alone_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 7, 4, 96).bfloat16()
    for bits in (None, 8):
        weight = laid_out(torch.randn(4, 50, 96).bfloat16(), bits)
        together = per_head(x, weight)
        for t in range(7):
            assert torch.equal(per_head(x[:, t : t + 1], weight)[:, 0], together[:, t])
