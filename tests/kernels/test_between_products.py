"""Norm, rotation and the router's choice in one native call each, against their equations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.kernels.native import native
from qiusuo.kernels.norm import rms_norm, rms_norm_reference
from qiusuo.kernels.rotation import rotate_pairs, rotate_pairs_reference
from qiusuo.kernels.routing import Choice, choose_experts, choose_experts_reference

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
def test_rotation_of_a_part_of_each_head(
    dtype: torch.dtype, tokens: int, heads: int, width: int
) -> None:
    torch.manual_seed(0)
    whole = torch.randn(1, tokens, heads, width + 6).to(dtype)
    turns = torch.polar(torch.ones(1, tokens, width // 2), torch.randn(1, tokens, width // 2) * 9)
    x = whole[..., 6:]
    got, expected = rotate_pairs(x, turns), rotate_pairs_reference(x, turns)
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
