"""Log p of tokens from hidden states, a chunk at a time, against all at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qiusuo.kernels import token_logprobs as module
from qiusuo.kernels.cross_entropy import IGNORE, cross_entropy_reference
from qiusuo.kernels.token_logprobs import token_logprobs, token_logprobs_reference
from tests.kernels.gradients import assert_all_close, normal, value_and_grads
from tests.kernels.sizes import Sizes

# M tokens, D hidden, W vocabulary.


def problem(
    tokens: int, hidden: int, words: int, ignored: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels_M = torch.randint(words, (tokens,), generator=generator)
    labels_M[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    return normal(tokens, hidden, seed=seed), normal(words, hidden, seed=seed + 1), labels_M


@given(st.integers(1, 24), st.integers(1, 9), st.sampled_from([0.0, 0.4, 1.0]), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_at_every_chunk_boundary(tokens, rows, ignored, seed):
    x, head, labels = problem(tokens, 6, 23, ignored, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", rows * 23 + 5)
        chunked = value_and_grads(lambda x, h: token_logprobs(x, h, labels)[0], x, head)
        entropy = token_logprobs(x, head, labels)[1]
    whole = value_and_grads(lambda x, h: token_logprobs_reference(x, h, labels)[0], x, head)
    assert_all_close(chunked, whole, 1e-5)
    assert_all_close([entropy], [token_logprobs_reference(x, head, labels)[1]], 1e-5)


def test_values_are_the_equation():
    x, head, labels = problem(5, 4, 7, ignored=0.0, seed=3)
    labels[1] = IGNORE
    for kernel in (token_logprobs, token_logprobs_reference):
        logprobs, entropy = kernel(x, head, labels)
        assert float(logprobs[1]) == float(entropy[1]) == 0.0
        for row in (0, 2, 3, 4):
            logits = [float(head[word].double() @ x[row].double()) for word in range(7)]
            total = math.log(sum(map(math.exp, logits)))
            expected = sum(math.exp(one - total) * (total - one) for one in logits)
            assert float(logprobs[row]) == pytest.approx(logits[labels[row]] - total, rel=1e-5)
            assert float(entropy[row]) == pytest.approx(expected, rel=1e-5)


def test_gradients_are_differences_of_values():
    x, head, labels = problem(7, 3, 5)
    x, head = x.double().requires_grad_(), head.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, h: token_logprobs(x, h, labels)[0], (x, head))


def test_sums_up_to_the_cross_entropy():
    x, head, labels = problem(50, 8, 31)
    logprobs, entropy = token_logprobs(x.requires_grad_(), head, labels)
    torch.testing.assert_close(-logprobs.sum(), cross_entropy_reference(x, head, labels))
    assert not entropy.requires_grad


def test_ignored_tokens_have_no_gradient():
    x, head, labels = problem(9, 4, 11)
    _, grad_x, grad_head = value_and_grads(lambda x, h: token_logprobs(x, h, labels)[0], x, head)
    ignored = labels == IGNORE
    assert ignored.any()
    assert not grad_x[ignored].any()
    assert grad_x[~ignored].all()
    alone = value_and_grads(
        lambda x, h: token_logprobs(x, h, labels.new_full((9,), IGNORE))[0], x, head
    )
    assert not any(one.any() for one in alone)
    assert grad_head.any()


def test_a_frozen_head_gets_no_gradient_and_states_theirs():
    x, head, labels = problem(9, 4, 11)
    x.requires_grad_()
    token_logprobs(x, head, labels)[0].sum().backward()
    both = value_and_grads(lambda x, h: token_logprobs(x, h, labels)[0].sum()[None], x, head)
    toward = torch.randn(1, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(x.grad * toward, both[1])
    assert head.grad is None


@pytest.mark.parametrize(("float32_head", "tolerance"), [(False, 0.03), (True, 1e-6)])
def test_under_autocast(float32_head, tolerance):
    x, head, labels = problem(50, 32, 40)
    head = head / 32**0.5

    def through(x: Tensor, head: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return token_logprobs(x, head, labels, float32_head)[0]

    half = value_and_grads(through, x, head)
    full = value_and_grads(lambda x, h: token_logprobs_reference(x, h, labels)[0], x, head)
    assert half[0].dtype == torch.float32
    assert_all_close(half, full, tolerance)


def test_the_logits_of_all_tokens_never_exist(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2000)
    largest = []
    for kernel in (token_logprobs, token_logprobs_reference):
        x, head, labels = problem(300, 8, 100, ignored=0.1)
        x.requires_grad_()
        with Sizes() as seen:
            kernel(x, head.requires_grad_(), labels)[0].sum().backward()
        largest.append(seen.largest)
    assert largest[0] <= max(300 * 8, 2000)
    assert largest[1] == 300 * 100  # the test sees
