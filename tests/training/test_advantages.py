"""Advantages of groups, against numpy."""

import numpy as np
import pytest
import torch

from qiusuo.training.rl.advantages import EPS, group_advantages, soft_overlong_penalty

REWARDS = [[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0.3, -0.2, 1, 0, 0.5], [0.1] * 5]


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_as_the_equations_say(scale):
    rewards = np.array(REWARDS)
    expected = rewards - rewards.mean(1, keepdims=True)
    if scale == "group":
        expected /= rewards.std(1, ddof=1, keepdims=True) + EPS
    elif scale == "batch":
        expected /= expected.std(ddof=1) + EPS
    values, same = group_advantages(torch.tensor(REWARDS), scale)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert values.dtype == torch.float32
    assert same.tolist() == [False, True, False, True]
    assert not values[same].any()  # exactly: no rounding of a mean is blown up by a deviation


def test_a_group_that_is_scaled_has_deviation_one():
    values = group_advantages(torch.tensor(REWARDS)[[0, 2]], "group").values_PG
    torch.testing.assert_close(values.std(1), torch.ones(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rewards", [[1.0, 0.0], [[1.0], [0.0]], [[1.0, float("nan")]]])
def test_what_is_no_group_is_refused(rewards):
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(torch.tensor(rewards))


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="none, group or batch"):
        group_advantages(torch.zeros(2, 2), "std")


def test_soft_overlong_penalty_has_three_parts():
    lengths = torch.tensor([1, 80, 85, 90, 100, 130])
    penalty = soft_overlong_penalty(lengths, longest=100, buffer=20)
    assert penalty.tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    with pytest.raises(ValueError, match="buffer 0"):
        soft_overlong_penalty(lengths, 100, 0)
