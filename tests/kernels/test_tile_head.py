"""The head's cross-entropy on AMX, against the equation in float64; skipped where the processor has
none. The equation gets the numbers that the kernel sees: rounded to bfloat16."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qiusuo.kernels import cross_entropy as cross_entropy_room
from qiusuo.kernels.cross_entropy import IGNORE, chunked_cross_entropy, cross_entropy_reference
from qiusuo.kernels.native import native
from qiusuo.kernels.tile_head import tile_cross_entropy
from tests.kernels.gradients import value_and_grads
from tests.kernels.test_cross_entropy import largest_tensor, problem

# M tokens, D hidden, W vocabulary.

pytestmark = pytest.mark.skipif(
    (library := native()) is None or not library.has_tiles,
    reason="no AMX, or QIUSUO_KERNELS leaves it out",
)

ROUNDED = 0.006  # of a tensor's norm


def both(x: Tensor, head: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    found = value_and_grads(lambda x, head: tile_cross_entropy(x, head, labels), x, head)
    x, head = (t.bfloat16().double() for t in (x, head))
    return found, value_and_grads(lambda x, h: cross_entropy_reference(x, h, labels), x, head)


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=2e-5, atol=1e-4)
    for f, e in zip(found[1:], expected[1:], strict=True):
        assert torch.isfinite(f).all()
        assert (f.double() - e).norm() <= ROUNDED * e.norm() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"),
    [
        (1, 8, 3), (33, 17, 31), (64, 32, 256), (70, 40, 257), (257, 96, 1000), (300, 264, 513),
        (513, 33, 529),
    ],
)  # fmt: skip
def test_value_and_gradients(tokens, hidden, vocabulary, dtype):
    x, head, labels = problem(tokens, hidden, vocabulary, ignored=0.2)
    found, expected = both(x.to(dtype), head.to(dtype), labels)
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype]
    assert_near(found, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 140), st.integers(1, 70), st.integers(1, 600), st.integers(0, 99))
def test_any_shape(tokens, hidden, vocabulary, seed):
    assert_near(*both(*problem(tokens, hidden, vocabulary, 0.3, seed)))


def test_large_and_growing_logits():
    """Later columns are larger, so what was summed shrinks again and again; and a certain token,
    whose gradients are next to nothing, has no error of the size of its weights."""
    x, head, labels = problem(64, 32, 1500, ignored=0.0)
    head = head * torch.linspace(0, 60, 1500)[:, None]
    assert_near(*both(x, head, labels))
    labels = (x.bfloat16().float() @ head.bfloat16().float().T).argmax(1)
    found, expected = both(4 * x, head, labels)
    assert float(expected[0]) < 1
    for f, e in zip(found[1:], expected[1:], strict=True):
        assert (f.double() - e).abs().max() < 0.01 * e.abs().max() + 1e-6


def test_all_ignored_is_zero_with_zero_gradients():
    x, head, _ = problem(40, 16, 50, ignored=0.0)
    labels = torch.full((40,), IGNORE)
    value, *grads = value_and_grads(lambda x, h: tile_cross_entropy(x, h, labels), x, head)
    assert float(value) == 0
    assert not any(grad.any() for grad in grads)


def test_the_same_bits_for_any_number_of_threads():
    x, head, labels = problem(700, 64, 900, ignored=0.1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(value_and_grads(lambda x, h: tile_cross_entropy(x, h, labels), x, head))
    finally:
        torch.set_num_threads(threads)
    for one, other in pairwise(found):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_frozen_head_or_frozen_states_cost_nothing():
    x, head, labels = problem(64, 32, 100, ignored=0.1)
    learns = [t.clone().requires_grad_() for t in (x, head)]
    tile_cross_entropy(*learns, labels).backward()
    for number, pair in enumerate(((learns[0].detach(), head), (x, learns[1].detach()))):
        pair[number].requires_grad_()
        tile_cross_entropy(*pair, labels).backward()
        assert torch.equal(pair[number].grad, learns[number].grad)
        assert pair[1 - number].grad is None


def test_no_logits_are_kept():
    x, head, labels = problem(300, 8, 1000, ignored=0.1)
    assert largest_tensor(tile_cross_entropy, x, head, labels) <= 1000 * 8


def test_numbers_that_overflow_stay_visible():
    x, head, labels = problem(40, 16, 300, ignored=0.0)
    x[3, 5] = torch.nan
    assert tile_cross_entropy(x, head, labels).isnan()


def test_what_does_not_fit_is_refused():
    x, head, labels = problem(40, 16, 50, ignored=0.0)
    with pytest.raises(ValueError, match="do not fit"):
        tile_cross_entropy(x[:, :15], head, labels)
    with pytest.raises(ValueError, match="do not fit"):
        tile_cross_entropy(x, head, labels[:39])
    with pytest.raises(IndexError, match="label 50 of a vocabulary of 50"):
        tile_cross_entropy(x, head, labels.clamp_min(0) + 50 - labels.clamp_min(0))


def test_when_it_is_taken(monkeypatch):
    calls = []
    monkeypatch.setattr(
        cross_entropy_room,
        "tile_cross_entropy",
        lambda *given: (calls.append(1), tile_cross_entropy(*given))[1],
    )
    x, head, labels = problem(64, 16, 50, ignored=0.1)
    head.requires_grad_()
    chunked_cross_entropy(x, head, labels)  # float32
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        value = chunked_cross_entropy(x, head, labels)
        with torch.no_grad():
            assert torch.equal(chunked_cross_entropy(x, head, labels), value)
        assert len(calls) == 2
        chunked_cross_entropy(x[:3], head, labels[:3])  # a few rows
        chunked_cross_entropy(x, head.detach().T.contiguous().T, labels)
    assert len(calls) == 2
