"""Pairs sorted by expert and brought home, against PyTorch's sort and sums."""

import pytest
import torch

from qiusuo.kernels.expert_rows import (
    gather_rows,
    sort_by_expert,
    sort_by_expert_reference,
    sum_choices,
)
from tests.kernels.gradients import normal

pytestmark = pytest.mark.usefixtures("instructions")

# M tokens, K choices, E experts, D width.


def some_indices(tokens: int, choices: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, experts, generator=generator).topk(choices).indices


@pytest.mark.parametrize(
    ("tokens", "choices", "experts"), [(1, 1, 1), (1, 3, 8), (37, 1, 5), (200, 6, 6), (700, 4, 64)]
)
def test_sorted_as_by_torch(tokens: int, choices: int, experts: int) -> None:
    indices_MK = some_indices(tokens, choices, experts)
    got, expected = (
        kernel(indices_MK, experts) for kernel in (sort_by_expert, sort_by_expert_reference)
    )
    assert got.segments() == expected.segments()
    assert torch.equal(got.place_P, expected.place_P)
    assert torch.equal(got.pair_R, expected.pair_R)


def test_all_to_one_expert() -> None:
    layout = sort_by_expert(torch.full((100, 2), 3), 9)
    assert layout.segments() == [(3, 0, 208)]
    assert layout.pair_R.tolist() == [*range(200), *[-1] * 8]


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_expert_that_is_none(wrong: int, instructions: str) -> None:
    if instructions == "reference":
        pytest.skip("PyTorch has words of its own for it")
    with pytest.raises(IndexError, match="from 0 to 3"):
        sort_by_expert(torch.tensor([[0], [wrong]]), 4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (33, 17), (90, 130)])
def test_there_and_back(dtype: torch.dtype, into: torch.dtype, tokens: int, width: int) -> None:
    indices_MK = some_indices(tokens, 3, 7)
    layout = sort_by_expert(indices_MK, 7)
    x_MD = normal(tokens, width, dtype=dtype)
    x_RD = gather_rows(x_MD, layout.pair_R, 3, into)
    assert x_RD.dtype is into
    assert torch.equal(x_RD[layout.place_P], x_MD.repeat_interleave(3, 0).to(into))
    assert not x_RD[layout.pair_R < 0].any()
    y_RD = normal(len(x_RD), width, seed=1, dtype=into)
    expected_MD = y_RD[layout.place_P].float().unflatten(0, (tokens, 3)).sum(1)
    torch.testing.assert_close(
        sum_choices(y_RD, layout.place_P, 3),
        expected_MD.to(into),
        rtol=0.008 if into is torch.bfloat16 else 1e-6,
        atol=1e-6,
    )
