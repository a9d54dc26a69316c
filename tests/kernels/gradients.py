"""Run a function and its backward pass; hand back the value and every gradient."""

from collections.abc import Callable

import torch
from torch import Tensor


def value_and_grads(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value of ``function(*inputs)``, then the gradients of a fixed weighted sum of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    toward = torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).to(value.dtype)
    value.backward(toward)
    grads = []
    for leaf in leaves:
        assert leaf.grad is not None
        grads.append(leaf.grad)
    return [value.detach(), *grads]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within ``tolerance`` of the largest entry of each tensor; same types, same shapes."""
    assert len(actual) == len(expected)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, number
        assert a.dtype == e.dtype, number
        largest = max(1e-6, float(e.abs().max())) if e.numel() else 1.0
        torch.testing.assert_close(
            a, e, rtol=0, atol=tolerance * largest, msg=lambda m, number=number: f"{number}: {m}"
        )


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
