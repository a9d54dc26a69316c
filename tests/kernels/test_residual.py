"""The residual sum and its norm in one operation: the bits of a sum, then a norm; gradients of both
results against autograd in float64, whichever of them are wanted."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import Tensor

from qiusuo.kernels.norm import rms_norm, rms_norm_reference
from qiusuo.kernels.residual import add_and_norm, add_and_norm_reference
from tests.kernels.gradients import assert_all_close, normal

TYPES = (torch.float32, torch.bfloat16)
MIXTURES = list(itertools.product(TYPES, TYPES, TYPES, (False, True)))  # and autocast
EPS = 0.1  # with a small one the gradient of a row of one number is a difference of equal ones
SHAPES = [(1, 1), (3, 17), (2, 65, 33), (130, 64)]

pytestmark = pytest.mark.usefixtures("instructions")


def inputs(shape, x_type=torch.float32, added_type=torch.bfloat16, weight_type=torch.float32):
    width = shape[-1]
    x, added = normal(*shape, dtype=x_type), normal(*shape, seed=1, dtype=added_type)
    return x, added, 1 + normal(width, seed=2, dtype=weight_type)


def gradients(join, inputs, wanted=(True, True), autocast=False) -> list[Tensor | None]:
    """Of a fixed weighted sum of those results that are wanted."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, autocast):
        results = join(*leaves, EPS)
    for seed, (result, is_wanted) in enumerate(zip(results, wanted, strict=True), 5):
        if is_wanted:
            toward = normal(*result.shape, seed=seed).bfloat16().to(result.dtype)
            result.backward(toward, retain_graph=True)
    return [leaf.grad for leaf in leaves]


def exact(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x + added, rms_norm_reference(x + added, weight, eps)


def together(join, inputs, autocast=False) -> list[Tensor]:
    """As ``gradients``, both results in one backward pass."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, autocast):
        results = join(*leaves, EPS)
    toward = [normal(*r.shape, seed=s).bfloat16().to(r.dtype) for s, r in enumerate(results, 5)]
    return list(torch.autograd.grad(results, leaves, toward))


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_a_sum_then_a_norm(shape) -> None:
    """With gradients wanted and without: what the engine computes is what is learnt from."""
    for (*types, autocast), wanted in itertools.product(MIXTURES, (False, True)):
        x, added, weight = inputs(shape, *types)
        with torch.set_grad_enabled(wanted), torch.autocast("cpu", torch.bfloat16, autocast):
            got = add_and_norm(x, added, weight, EPS)
            expected = x + added, rms_norm(x + added, weight, EPS)
        for a, e in zip(got, expected, strict=True):
            assert a.dtype is e.dtype
            assert torch.equal(a, e)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape) -> None:
    for *types, autocast in MIXTURES:
        given = inputs(shape, *types)
        got = together(add_and_norm, given, autocast)
        expected = together(exact, [x.double() for x in given])
        rounded = autocast or torch.bfloat16 in types
        assert [g.dtype for g in got] == types
        assert_all_close([g.double() for g in got], expected, 0.03 if rounded else 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("added_type", TYPES)
def test_gradients_of_a_float32_stream_have_the_bits_of_two_operations(
    added_type, autocast
) -> None:
    given = inputs((130, 33), torch.float32, added_type)
    got = together(add_and_norm, given, autocast)
    assert all(map(torch.equal, got, together(add_and_norm_reference, given, autocast)))


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_gradients_of_one_result_alone(wanted, x_type) -> None:
    given = inputs((7, 33), x_type)
    got = gradients(add_and_norm, given, wanted)
    expected = gradients(exact, [x.double() for x in given], wanted)
    for grad, other, own in zip(got, expected, given, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None and other is not None:
            assert grad.dtype is own.dtype
            assert_all_close([grad.double()], [other], 0.02)


@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_to_add(dtype) -> None:
    """The stream goes on as it is; its gradients still meet."""
    x, _, weight = inputs((9, 33), dtype)
    assert add_and_norm(x, None, weight, EPS)[0].data_ptr() == x.data_ptr()
    with torch.no_grad():
        assert add_and_norm(x, None, weight, EPS)[0] is x

    def fused(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_and_norm(x, None, weight, eps)

    def plain(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x * 1, rms_norm_reference(x, weight, eps)

    expected = together(plain, [x.double(), weight.double()])
    got = [g.double() for g in together(fused, [x, weight])]
    assert_all_close(got, expected, 1e-5 if dtype is torch.float32 else 0.03)


@pytest.mark.parametrize("x_wanted", [False, True])
def test_gradients_that_are_not_wanted(x_wanted) -> None:
    """A first block behind a frozen embedding; a part that is frozen."""
    x, added, weight = inputs((9, 33))
    leaves = [x.requires_grad_(x_wanted), added.requires_grad_(not x_wanted)]
    total, normed = add_and_norm(*leaves, weight, EPS)
    (total.sum() + normed.sum()).backward()
    assert [leaf.grad is not None for leaf in leaves] == [x_wanted, not x_wanted]
    assert weight.grad is None


def test_parts_of_wider_rows() -> None:
    """Rows apart from each other, and columns: of both, and of the gradients that come in."""
    whole, more, weight = inputs((5, 3, 64))
    for x, added in [
        (whole[..., 4:37], more[..., 9:42]),
        (whole.transpose(0, 2), more.transpose(0, 2)),
        (whole[:, :1].expand(-1, 3, -1), more[..., :1].expand(-1, -1, 64)),
    ]:
        parts = x, added, weight[: x.shape[-1]]
        expected = together(exact, [x.double() for x in parts])
        assert_all_close([g.double() for g in together(add_and_norm, parts)], expected, 0.02)
        leaves = [x.detach().requires_grad_() for x in parts]
        results = add_and_norm(*leaves, EPS)
        toward = [
            normal(*reversed(r.shape), seed=s).permute(*reversed(range(r.ndim)))
            for s, r in enumerate(results)
        ]
        got = torch.autograd.grad(results, leaves, toward)
        doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = torch.autograd.grad(exact(*doubles, EPS), doubles, [t.double() for t in toward])
        assert_all_close([g.double() for g in got], list(expected), 0.02)


def test_what_would_be_broadcast_is_refused() -> None:
    x, added, weight = inputs((3, 8))
    with pytest.raises(ValueError, match=r"\(1, 8\) is added to \(3, 8\)"):
        add_and_norm(x, added[:1], weight, EPS)


def test_no_rows() -> None:
    x, added, weight = inputs((0, 8))
    assert [tuple(g.shape) for g in together(add_and_norm, (x, added, weight))] == [
        (0, 8),
        (0, 8),
        (8,),
    ]


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(instructions, threads) -> None:
    if instructions == "reference":
        pytest.skip("PyTorch's own sums over rows are parted by threads")
    given = inputs((3000, 48))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [*add_and_norm(*given, EPS), *together(add_and_norm, given)]
        torch.set_num_threads(threads)
        several = [*add_and_norm(*given, EPS), *together(add_and_norm, given)]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, alone, several))


def test_nothing_is_kept_after_the_results(instructions) -> None:
    """What is saved for the backward pass is itself a result: it must not keep itself alive."""
    if instructions == "reference":
        pytest.skip("PyTorch's own operations")
    x, added, weight = inputs((3, 8))
    for more in (added, None):
        gc.disable()
        try:
            total, normed = add_and_norm(x.clone().requires_grad_(), more, weight, EPS)
            alive = weakref.ref(total.grad_fn)
            del total, normed
            assert alive() is None
        finally:
            gc.enable()
