"""One row and many rows through the same matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.kernels.linear import linear, linear_reference
from tests.kernels.gradients import normal


@given(
    st.sampled_from([(), (1,), (1, 1), (3,), (2, 5)]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
)
@settings(max_examples=40)
def test_any_rows_are_the_equation(rows, width, out, biased):
    x, weight = normal(*rows, width, seed=1), normal(out, width, seed=2)
    bias = normal(out, seed=3) if biased else None
    with torch.no_grad():
        got = linear(x, weight, bias)
    assert got.shape == (*rows, out)
    torch.testing.assert_close(got, linear_reference(x, weight, bias), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_pass(rows):
    x, weight = normal(rows, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    linear(x, weight).square().sum().backward()
    grads = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    linear_reference(x, weight).square().sum().backward()
    torch.testing.assert_close(grads, (x.grad, weight.grad))


def test_the_input_is_left_alone():
    x, weight, bias = normal(1, 6), normal(6, 6, seed=1), normal(6, seed=2)
    kept = x.clone(), weight.clone(), bias.clone()
    with torch.no_grad():
        linear(x, weight, bias)
    assert all(map(torch.equal, (x, weight, bias), kept))
