"""RMSNorm with its hand-written backward pass against autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.kernels.norm import rms_norm, rms_norm_reference
from tests.kernels.gradients import assert_all_close, normal, value_and_grads


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 40),
    st.sampled_from([1e-6, 1e-2, 1.0]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
@settings(max_examples=50)
def test_values_and_gradients(shape, width, eps, size):
    x, weight = size * normal(*shape, width, seed=width), 1 + normal(width, seed=1)
    fast = value_and_grads(lambda x, w: rms_norm(x, w, eps), x, weight)
    plain = value_and_grads(lambda x, w: rms_norm_reference(x, w, eps), x, weight)
    torchs = value_and_grads(lambda x, w: F.rms_norm(x, (width,), w, eps), x, weight)
    # Where eps is small beside x², x's gradient is a difference of nearly equal numbers:
    # hold it to the size of what is subtracted.
    subtracted = float((weight.abs().max() * 4) / (x.square().mean() + eps).sqrt())
    for expected in (plain, torchs):
        assert_all_close(fast[:1], expected[:1], 1e-5)
        torch.testing.assert_close(fast[1], expected[1], rtol=1e-5, atol=1e-5 * subtracted)
        assert_all_close(fast[2:], expected[2:], 1e-5)


def test_value_is_the_equation():
    x, weight = normal(3, 7, seed=2), normal(7, seed=3)
    for row in range(3):
        mean = sum(float(v) ** 2 for v in x[row]) / 7
        expected = (x[row] / (mean + 0.01) ** 0.5 * weight).tolist()
        for norm in (rms_norm, rms_norm_reference):
            assert norm(x, weight, 0.01)[row].tolist() == pytest.approx(expected, rel=1e-5)


def test_row_of_zeros_is_finite():
    value, grad, _ = value_and_grads(
        lambda x, w: rms_norm(x, w, 1e-6), torch.zeros(2, 4), torch.ones(4)
    )
    assert not value.any()
    assert grad.isfinite().all()


@pytest.mark.parametrize("against", ["reference", "torch"])
def test_bfloat16(against):
    x, weight = normal(6, 5, 64, dtype=torch.bfloat16), (1 + normal(64, seed=1)).bfloat16()
    other = {
        "reference": lambda x, w: rms_norm_reference(x, w, 1e-6),
        "torch": lambda x, w: F.rms_norm(x, (64,), w, 1e-6),
    }[against]
    half = value_and_grads(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    assert_all_close(half, value_and_grads(other, x, weight), 0.02)
    full = value_and_grads(lambda x, w: rms_norm_reference(x, w, 1e-6), x.float(), weight.float())
    assert_all_close([t.float() for t in half], full, 0.02)
    assert half[0].dtype == torch.bfloat16


def test_statistics_of_bfloat16_are_float32():
    """Squares of 300 overflow nothing, and a sum of 4096 ones is not stuck at 256."""
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    out = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-6)
    torch.testing.assert_close(out.float(), torch.ones(1, 4096), rtol=0, atol=0.005)


def test_under_autocast_it_is_close_and_gradients_keep_their_types():
    x, weight = normal(6, 5, 64), 1 + normal(64, seed=1)

    def in_bfloat16(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return rms_norm(x, w, 1e-6).float()

    full = value_and_grads(lambda x, w: rms_norm_reference(x, w, 1e-6), x, weight)
    assert_all_close(value_and_grads(in_bfloat16, x, weight), full, 0.02)
