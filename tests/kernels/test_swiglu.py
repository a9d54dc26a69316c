"""SwiGLU and its gradients against the equation in float64."""

import pytest
import torch
from torch import Tensor

from qiusuo.kernels.swiglu import WeightedRows, swiglu, swiglu_reference
from tests.kernels.gradients import assert_all_close, normal, value_and_grads

pytestmark = pytest.mark.usefixtures("instructions")

# R rows, F width, P pairs.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.012}
SHAPES = [(1, 1), (1, 17), (3, 33), (2, 5, 16), (7, 300)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = 3 * normal(*shape, seed=1, dtype=dtype), normal(*shape, seed=2, dtype=dtype)
    expected = value_and_grads(swiglu_reference, gate.double(), up.double())
    got = value_and_grads(swiglu, gate, up)
    assert_all_close(got, [x.to(dtype) for x in expected], TOLERANCE[dtype])
    with torch.no_grad():
        assert torch.equal(swiglu(gate, up), got[0])


def test_far_from_zero() -> None:
    """silu's ends: nothing overflows, and what is not a number stays so."""
    gate = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 100.0, 1e4])
    got = value_and_grads(swiglu, gate, torch.ones(9))
    expected = value_and_grads(swiglu_reference, gate.double(), torch.ones(9).double())
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-6)
    assert swiglu(torch.tensor([float("nan")]), torch.ones(1)).isnan().all()


def test_parts_of_wider_rows() -> None:
    both = normal(4, 34)
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate, up), swiglu_reference(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 17), (40, 33), (9, 256)])
def test_weighted_rows(dtype: torch.dtype, rows: int, width: int) -> None:
    """Weights found by pair; a row of padding has no weight and no gradient."""
    h_RG, weights_P = normal(rows, 2 * width, seed=3, dtype=dtype), normal(rows + 2, seed=4)
    pair_R = torch.randperm(rows + 2, generator=torch.Generator().manual_seed(5))[:rows]
    pair_R[-1] = pair_R[-1] if rows == 1 else -1

    def equation(h: Tensor, weights: Tensor) -> Tensor:
        weight_R = torch.where(pair_R < 0, 0.0, weights[pair_R.clamp_min(0)])
        return swiglu_reference(*h.chunk(2, dim=-1)) * weight_R[:, None]

    expected = value_and_grads(equation, h_RG.double(), weights_P.double())
    toward_RF = torch.randn(rows, width, generator=torch.Generator().manual_seed(7)).to(dtype)
    grad_weights_P = torch.zeros_like(weights_P)
    with torch.no_grad():
        rows_RG = WeightedRows(h_RG, weights_P, pair_R)
        out_RF = rows_RG.weighted()
        grad_h_RG, again_RF = rows_RG.backward(toward_RF, grad_weights_P)
    tolerance = 2 * TOLERANCE[dtype]
    got = [out_RF, grad_h_RG, grad_weights_P]
    assert_all_close([x.double() for x in got], expected, tolerance)
    assert_all_close([again_RF], [out_RF], tolerance)
