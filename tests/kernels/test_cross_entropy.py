"""The chunked loss against the whole one."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qiusuo.kernels import cross_entropy
from qiusuo.kernels.cross_entropy import IGNORE, chunked_cross_entropy, cross_entropy_reference
from tests.kernels.gradients import assert_all_close, normal, value_and_grads

# M tokens, D hidden, W vocabulary.


def problem(
    tokens: int, hidden: int, vocabulary: int, ignored: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels_M = torch.randint(vocabulary, (tokens,), generator=generator)
    labels_M[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    x_MD = normal(tokens, hidden, seed=seed)
    head_WD = normal(vocabulary, hidden, seed=seed + 1) / hidden**0.5
    return x_MD, head_WD, labels_M


def both(x: Tensor, head: Tensor, labels: Tensor, scale: float = 1.0) -> list[list[Tensor]]:
    def through(kernel: object, x: Tensor, head: Tensor) -> Tensor:
        return kernel(x, head, labels) * scale  # type: ignore[operator]

    kernels = (chunked_cross_entropy, cross_entropy_reference)
    return [value_and_grads(partial(through, kernel), x, head) for kernel in kernels]


@given(st.integers(1, 24), st.integers(1, 9), st.sampled_from([0.0, 0.4, 1.0]), st.integers(0, 50))
@settings(max_examples=40)
def test_values_and_gradients_at_every_chunk_boundary(tokens, rows, ignored, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * 23 + 5)  # ``rows`` rows of logits
        chunked, whole = both(*problem(tokens, 6, 23, ignored, seed))
    assert_all_close(chunked, whole, 1e-5)


def test_value_is_the_equation():
    x, head, labels = problem(5, 4, 7, ignored=0.0, seed=3)
    labels[1] = IGNORE
    expected = 0.0
    for row in (0, 2, 3, 4):
        logits = [float(head[word].double() @ x[row].double()) for word in range(7)]
        expected += math.log(sum(map(math.exp, logits))) - logits[int(labels[row])]
    for kernel in (chunked_cross_entropy, cross_entropy_reference):
        assert float(kernel(x, head, labels)) == pytest.approx(expected, rel=1e-5)


def test_all_ignored_is_zero_with_zero_gradients():
    x, head, _ = problem(9, 4, 11, ignored=0.0)
    value, *grads = value_and_grads(
        lambda x, h: chunked_cross_entropy(x, h, torch.full((9,), IGNORE)), x, head
    )
    assert float(value) == 0.0
    assert not any(grad.any() for grad in grads)


def test_gradient_is_scaled_by_what_stands_behind_the_loss():
    x, head, labels = problem(17, 5, 13, ignored=0.2)
    chunked, whole = both(x, head, labels, scale=0.3)
    assert_all_close(chunked, whole, 1e-5)
    plain = both(x, head, labels)[0]
    assert_all_close(chunked[1:], [0.3 * grad for grad in plain[1:]], 1e-6)


def test_without_grad_the_value_is_the_same_and_nothing_is_kept():
    x, head, labels = problem(17, 5, 13, ignored=0.2)
    with torch.no_grad():
        value = chunked_cross_entropy(x.requires_grad_(), head.requires_grad_(), labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, cross_entropy_reference(x, head, labels).detach())


def test_bfloat16_autocast_is_close():
    x, head, labels = problem(50, 32, 40, ignored=0.2)

    def through(kernel: object, x: Tensor, head: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return kernel(x, head, labels)  # type: ignore[operator]

    half = value_and_grads(partial(through, chunked_cross_entropy), x, head)
    full = both(x, head, labels)[1]
    assert half[0].dtype == torch.float32
    assert_all_close(half, full, 0.02)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def largest_tensor(kernel: object, x: Tensor, head: Tensor, labels: Tensor) -> int:
    x, head = x.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
    with _Largest() as seen:
        kernel(x, head, labels).backward()  # type: ignore[operator]
    return seen.elements


def test_the_logits_of_all_tokens_never_exist(monkeypatch):
    x, head, labels = problem(300, 8, 100, ignored=0.1)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2000)
    assert largest_tensor(cross_entropy_reference, x, head, labels) == 300 * 100  # the test sees
    assert largest_tensor(chunked_cross_entropy, x, head, labels) <= max(300 * 8, 2000)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (5, 17), (33, 300)])
def test_every_instruction_set(dtype, tokens, vocabulary):
    x, head, labels = problem(tokens, 8, vocabulary, ignored=0.3)
    chunked, _ = both(x.to(dtype), head.to(dtype), labels)
    _, whole = both(x.to(dtype).float(), head.to(dtype).float(), labels)
    close = 1e-5 if dtype is torch.float32 else 0.03
    assert_all_close([t.float() for t in chunked], whole, close)


def test_a_label_beyond_the_vocabulary():
    x, head, _ = problem(2, 4, 7, ignored=0.0)
    with pytest.raises(IndexError):
        chunked_cross_entropy(x.requires_grad_(), head, torch.tensor([0, 7]))
