"""Norm, rotation and the router's choice in one native call each, against their equations: values,
gradients, parts of wider rows, and any number of threads."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.kernels.native import native
from qiusuo.kernels.norm import rms_norm, rms_norm_reference
from qiusuo.kernels.rotation import (
    rotate_halves,
    rotate_halves_reference,
    rotate_pairs,
    rotate_pairs_reference,
)
from qiusuo.kernels.routing import (
    Choice,
    balance_loss,
    balance_loss_reference,
    choose_experts,
    choose_experts_reference,
)
from tests.kernels.gradients import assert_all_close, normal, value_and_grads

Rotation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ROTATIONS = [(rotate_pairs, rotate_pairs_reference), (rotate_halves, rotate_halves_reference)]

pytestmark = pytest.mark.skipif(native() is None, reason="the native library is not in use")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 5, 2048), (2, 100)])
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype) * 30, torch.randn(shape[-1]).to(dtype)
    tolerance = 1e-6 if dtype is torch.float32 else 0.01
    expected = rms_norm_reference(x.double(), weight.double(), 1e-6).float()
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-6).float(), expected, rtol=tolerance, atol=tolerance
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 2), (5, 3, 64), (7, 16, 10)])
@pytest.mark.parametrize("kernels", ROTATIONS)
def test_rotation_of_a_part_of_each_head(
    kernels: tuple[Rotation, Rotation], dtype: torch.dtype, tokens: int, heads: int, width: int
) -> None:
    torch.manual_seed(0)
    whole = torch.randn(1, tokens, heads, width + 6).to(dtype)
    turns = torch.polar(torch.ones(1, tokens, width // 2), torch.randn(1, tokens, width // 2) * 9)
    x = whole[..., 6:]
    got, expected = (kernel(x, turns) for kernel in kernels)
    assert got.dtype is dtype
    torch.testing.assert_close(
        got, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6
    )


@torch.no_grad()
@settings(max_examples=80, deadline=None)
@given(
    groups=st.integers(1, 5),
    size=st.integers(2, 9),
    sigmoid=st.booleans(),
    biased=st.booleans(),
    normalized=st.booleans(),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_choice(
    groups: int,
    size: int,
    sigmoid: bool,
    biased: bool,
    normalized: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    kept = data.draw(st.integers(1, groups))
    per_token = data.draw(st.integers(1, kept * size))
    choice = Choice(groups, kept, per_token, sigmoid, normalized, 2.5)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, groups * size, generator=generator) * 3
    bias = torch.randn(groups * size, generator=generator) if biased else None
    got = choose_experts(logits, bias, choice)
    expected = choose_experts_reference(logits, bias, choice)
    assert torch.equal(got.indices_MK, expected.indices_MK)
    torch.testing.assert_close(got.scores_ME, expected.scores_ME)
    torch.testing.assert_close(got.weights_MK, expected.weights_MK)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "per_token"), [(1, 1, 1), (3, 7, 2), (200, 16, 4)])
def test_gradients_of_choice(
    sigmoid: bool, normalized: bool, tokens: int, experts: int, per_token: int
) -> None:
    choice = Choice(1, 1, per_token, sigmoid, normalized, 2.5)
    toward_ME, toward_MK = normal(tokens, experts, seed=2), normal(tokens, per_token, seed=3)

    def through(kernel, logits):
        chosen = kernel(logits, None, choice)
        return (chosen.scores_ME * toward_ME).sum() + (chosen.weights_MK * toward_MK).sum()

    logits_ME = 2 * normal(tokens, experts, seed=4)
    got = value_and_grads(lambda x: through(choose_experts, x), logits_ME)
    expected = value_and_grads(lambda x: through(choose_experts_reference, x), logits_ME)
    assert_all_close(got, expected, 1e-5)


def test_gradient_of_weights_alone() -> None:
    logits, choice = normal(5, 4), Choice(1, 1, 2, True, True, 1.0)
    toward = normal(5, 2, seed=1)
    got, expected = (
        value_and_grads(lambda x, k=kernel: k(x, None, choice).weights_MK * toward, logits)
        for kernel in (choose_experts, choose_experts_reference)
    )
    assert_all_close(got, expected, 1e-5)


@pytest.mark.parametrize(
    ("sequences", "tokens", "experts", "choices"), [(1, 1, 1, 1), (3, 5, 7, 2), (16, 33, 16, 4)]
)
def test_balance_loss(sequences: int, tokens: int, experts: int, choices: int) -> None:
    scores_ME = normal(sequences * tokens, experts).sigmoid()
    got, expected = (
        value_and_grads(lambda x, k=kernel: k(x, choices, sequences), scores_ME)
        for kernel in (balance_loss, balance_loss_reference)
    )
    assert_all_close(got, expected, 1e-5)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("kernels", ROTATIONS)
def test_rotation_there_and_back(
    kernels: tuple[Rotation, Rotation], dtype: torch.dtype, all_rows: bool
) -> None:
    """Gradients of a part of each head, with turns for every row or one for all."""
    rows = 3 if all_rows else 1
    turns = torch.polar(torch.ones(rows, 5, 4), 9 * normal(rows, 5, 4))
    whole = normal(3, 5, 2, 14, dtype=dtype)
    got, expected = (
        value_and_grads(lambda x, k=kernel: k(x[..., 6:], turns), whole) for kernel in kernels
    )
    assert_all_close(got, expected, 1e-2 if dtype is torch.bfloat16 else 1e-6)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (130, 33)])
def test_norm_of_parts_of_rows(autocast: bool, dtype: torch.dtype, rows: int, width: int) -> None:
    """As the latents of a layer stand beside its rope keys. (With a small eps the gradient of a row
    of one number is a difference of equal ones.)"""
    whole, weight = normal(rows, width + 7, dtype=dtype), 1 + normal(width, seed=1)
    if not autocast:
        weight = weight.to(dtype)

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, autocast):
            return rms_norm(x[:, :width], w, 0.1)

    got = value_and_grads(norm, whole, weight)
    assert got[0].dtype is (torch.bfloat16 if autocast else dtype)
    expected = value_and_grads(
        lambda x, w: rms_norm_reference(x[:, :width], w, 0.1), whole.double(), weight.double()
    )
    exact = dtype is torch.float32 and not autocast
    assert_all_close([x.double() for x in got], expected, 1e-5 if exact else 0.03)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    """Of sums over rows: the norm's weight, and a token's choices."""
    x, weight = normal(5000, 48), 1 + normal(48, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = value_and_grads(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
        torch.set_num_threads(threads)
        together = value_and_grads(lambda x, w: rms_norm(x, w, 1e-6), x, weight)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, alone, together))
