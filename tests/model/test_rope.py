"""Rotary angles of the published models, and what turning must keep."""

import math

import pytest
import torch

from qiusuo.kernels.rotation import rotate_pairs
from qiusuo.model.families import config_from_hf
from qiusuo.model.rope import frequencies, rotations
from qiusuo.model.rope_scaling import YarnScaling
from tests.model import oracle
from tests.model.shapes import VARIANTS, tiny_config
from tests.model.test_published import V2_LITE, V3


def test_yarn_of_v3_ramps_from_pair_10_to_pair_23():
    pairs = frequencies(config_from_hf(V3)).double().tolist()
    plain = [10000 ** (-2 * pair / 64) for pair in range(32)]
    slowed = [p / f for p, f in zip(plain, pairs, strict=True)]
    assert slowed[:11] == pytest.approx([1.0] * 11, rel=1e-6)
    assert slowed[23:] == pytest.approx([40.0] * 9, rel=1e-6)
    assert slowed[10:24] == sorted(slowed[10:24])
    assert 1.0 < slowed[11] < slowed[22] < 40.0


@pytest.mark.parametrize("raw", [V3, V2_LITE], ids=["V3", "V2-Lite"])
def test_published_frequencies(raw):
    config = config_from_hf(raw)
    expected = [
        oracle.yarn_frequency(10000 ** (-2 * pair / 64), pair, 64, 10000.0, raw["rope_scaling"])
        for pair in range(32)
    ]
    assert frequencies(config).tolist() == pytest.approx(expected, rel=1e-5)
    assert rotations(config, torch.arange(3)).abs().max() == pytest.approx(1.0, abs=1e-6)


def test_ends_that_fall_together_are_a_step():
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=1)
    found = frequencies(tiny_config(rope_scaling=yarn)).tolist()
    plain = [10000 ** (-2 * pair / 8) for pair in range(4)]
    assert found == pytest.approx([plain[0], *(p / 4 for p in plain[1:])], rel=1e-6)


def test_far_positions_are_exact_enough():
    """The last positions of V3's context: float32 angles keep three decimals there."""
    config = config_from_hf(V3)
    turns = rotations(config, torch.tensor([163_839]))[0]
    for pair, frequency in enumerate(frequencies(config).double().tolist()):
        angle = 163_839 * frequency
        assert abs(complex(turns[pair]) - complex(math.cos(angle), math.sin(angle))) < 0.02


@pytest.mark.parametrize("name", ["v3", "v3-yarn"])
def test_turning_adjacent_pairs(name):
    config = tiny_config(**VARIANTS[name])
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 3, 0, 60]])
    turned = rotate_pairs(x, rotations(config, positions))
    raw = config.to_hf()
    for b in range(2):
        for t in range(5):
            for h in range(3):
                expected = oracle.rotate(raw, x[b, t, h].double().numpy(), int(positions[b, t]))
                assert turned[b, t, h].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert torch.equal(turned[0, 0], x[0, 0])  # nothing turns at position 0


def test_bfloat16_is_turned_in_float32():
    config = tiny_config()
    x = torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    turns = rotations(config, torch.arange(40)[None])
    assert rotate_pairs(x, turns).dtype == torch.bfloat16
    assert torch.equal(rotate_pairs(x, turns), rotate_pairs(x.float(), turns).bfloat16())
