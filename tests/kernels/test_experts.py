"""The grouped experts against the walk over experts."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qiusuo.kernels.experts import experts_grouped, experts_reference
from tests.kernels.gradients import assert_all_close, normal, value_and_grads

# M tokens, K experts per token, E experts, D hidden, F expert width.


def inputs(
    tokens: int, choices: int, experts: int, hidden: int, width: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_MD = normal(tokens, hidden, seed=seed, dtype=dtype)
    weights_MK = normal(tokens, choices, seed=seed + 1, dtype=dtype).sigmoid()
    gate_up_EGD = normal(experts, 2 * width, hidden, seed=seed + 2, dtype=dtype) / hidden**0.5
    down_EDF = normal(experts, hidden, width, seed=seed + 3, dtype=dtype) / width**0.5
    return x_MD, weights_MK, gate_up_EGD, down_EDF


def some_indices(tokens: int, choices: int, experts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)]
    return torch.stack(rows)


def compare(indices_MK: Tensor, tensors: tuple[Tensor, ...], tolerance: float) -> None:
    def through(kernel: object, x: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return kernel(x, w, indices_MK, gate_up, down)  # type: ignore[operator]

    fast = value_and_grads(partial(through, experts_grouped), *tensors)
    plain = value_and_grads(partial(through, experts_reference), *tensors)
    assert_all_close(fast, plain, tolerance)


def by_hand(
    x_MD: Tensor, weights_MK: Tensor, indices_MK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Token by token, choice by choice, in float64: neither the reference nor the fast path."""
    width = down_EDF.shape[2]
    out_MD = torch.zeros(x_MD.shape, dtype=torch.float64)
    for token in range(x_MD.shape[0]):
        x_D = x_MD[token].double()
        for choice in range(indices_MK.shape[1]):
            expert = int(indices_MK[token, choice])
            gate_FD, up_FD = gate_up_EGD[expert, :width], gate_up_EGD[expert, width:]
            gate_F, up_F = gate_FD.double() @ x_D, up_FD.double() @ x_D
            act_F = gate_F / (1 + torch.exp(-gate_F)) * up_F
            out_MD[token] += weights_MK[token, choice] * (down_EDF[expert].double() @ act_F)
    return out_MD


@given(
    st.integers(1, 9),
    st.integers(1, 7),
    st.data(),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 99),
)
@settings(max_examples=40)
def test_any_shape(tokens, experts, data, hidden, width, seed):
    choices = data.draw(st.integers(1, experts))
    tensors = inputs(tokens, choices, experts, hidden, width, torch.float64, seed)
    # float64 throughout, but for the pair weights' gradient, which is summed in float32
    compare(some_indices(tokens, choices, experts, seed), tensors, 1e-6)


@pytest.mark.parametrize(
    ("tokens", "choices", "experts"),
    [(1, 1, 1), (1, 3, 8), (37, 1, 5), (19, 6, 6), (67, 4, 16), (3, 2, 64)],
    ids=["one-of-all", "one-token", "K=1", "K=E", "uneven", "mostly-idle"],
)
def test_float32_values_and_gradients(tokens, choices, experts):
    tensors = inputs(tokens, choices, experts, 33, 17, torch.float32, seed=tokens)
    compare(some_indices(tokens, choices, experts, seed=3), tensors, 1e-5)


def test_every_token_on_one_expert_leaves_the_others_gradients_zero():
    x, w, gate_up, down = inputs(13, 1, 4, 10, 6, torch.float32, seed=5)
    indices = torch.full((13, 1), 2)
    compare(indices, (x, w, gate_up, down), 1e-5)
    grads = value_and_grads(lambda g, d: experts_grouped(x, w, indices, g, d), gate_up, down)[1:]
    for grad in grads:
        assert grad[2].abs().min() > 0
        assert not grad[[0, 1, 3]].any()


def test_both_forms_are_the_equation():
    x, w, gate_up, down = inputs(11, 3, 5, 8, 7, torch.float32, seed=9)
    indices = some_indices(11, 3, 5, seed=2)
    expected = by_hand(x, w, indices, gate_up, down)
    for kernel in (experts_grouped, experts_reference):
        torch.testing.assert_close(
            kernel(x, w, indices, gate_up, down).double(), expected, rtol=1e-5, atol=1e-5
        )


def test_gradcheck_in_float64():
    x, w, gate_up, down = (t.requires_grad_() for t in inputs(5, 2, 4, 3, 2, torch.float64, seed=1))
    indices = torch.tensor([[0, 1], [1, 0], [3, 1], [3, 0], [1, 3]])  # nobody asks expert 2
    assert torch.autograd.gradcheck(
        lambda *t: experts_grouped(t[0], t[1], indices, t[2], t[3]), (x, w, gate_up, down)
    )


def test_choices_of_a_token_may_come_in_any_order():
    x, w, gate_up, down = inputs(6, 3, 5, 8, 4, torch.float64, seed=4)
    indices = some_indices(6, 3, 5, seed=4)
    there = experts_grouped(x, w, indices, gate_up, down)
    back = experts_grouped(x, w.flip(1), indices.flip(1), gate_up, down)
    torch.testing.assert_close(there, back, rtol=0, atol=1e-12)


def test_bfloat16_autocast_is_close_and_grads_keep_the_parameters_type():
    tensors = inputs(40, 3, 6, 32, 16, torch.float32, seed=8)
    indices = some_indices(40, 3, 6, seed=8)

    def in_bfloat16(x: Tensor, w: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = experts_grouped(x, w, indices, gate_up, down)
        assert out.dtype == torch.bfloat16
        return out.float()

    half = value_and_grads(in_bfloat16, *tensors)
    full = value_and_grads(lambda x, w, g, d: experts_reference(x, w, indices, g, d), *tensors)
    assert_all_close(half, full, 0.03)
    assert not torch.equal(half[0], full[0])  # it did run in bfloat16


def test_same_bits_every_time():
    tensors = inputs(64, 4, 16, 48, 24, torch.float32, seed=6)
    indices = some_indices(64, 4, 16, seed=6)
    runs = [
        value_and_grads(lambda x, w, g, d: experts_grouped(x, w, indices, g, d), *tensors)
        for _ in range(3)
    ]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
