"""The learning rate's share of its peak, step by step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.training.schedule import learning_rate_share
from qiusuo.training.sections import ScheduleSection


def shares(schedule: ScheduleSection, steps: int) -> list[float]:
    return [learning_rate_share(schedule, step, steps) for step in range(steps)]


def test_wsd_warms_up_stays_and_decays() -> None:
    schedule = ScheduleSection(warmup_steps=4, decay_fraction=0.5, final_fraction=0.0)
    expected = [0.25, 0.5, 0.75, 1.0, *[1.0] * 6, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert shares(schedule, 20) == pytest.approx(expected)


def test_wsd_decays_to_the_final_fraction() -> None:
    schedule = ScheduleSection(warmup_steps=0, decay_fraction=0.1, final_fraction=0.2)
    found = shares(schedule, 1000)
    assert found[:901] == [1.0] * 901
    assert found[950] == pytest.approx(0.6)
    assert found[-1] == pytest.approx(0.2 + 0.8 / 100)  # the step after it would be at 0.2
    assert learning_rate_share(schedule, 1000, 1000) == pytest.approx(0.2)


def test_cosine_goes_from_the_warmup_to_the_final_fraction() -> None:
    schedule = ScheduleSection(kind="cosine", warmup_steps=10, final_fraction=0.1)
    found = shares(schedule, 110)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == 1.0
    assert found[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert found[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate_share(schedule, 110, 110) == pytest.approx(0.1)


def test_no_decay_is_a_plateau() -> None:
    assert set(shares(ScheduleSection(warmup_steps=0, decay_fraction=0.0), 50)) == {1.0}


@given(
    kind=st.sampled_from(["wsd", "cosine"]),
    warmup=st.integers(0, 200),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    steps=st.integers(1, 300),
)
def test_always_a_share_and_never_up_again(
    kind: str, warmup: int, decay: float, final: float, steps: int
) -> None:
    schedule = ScheduleSection(
        kind=kind, warmup_steps=warmup, decay_fraction=decay, final_fraction=final
    )
    found = shares(schedule, steps)
    assert all(0 < share <= 1 for share in found)
    warmed = min(warmup, steps // 2)  # a short run still reaches its peak
    rising, falling = found[:warmed], found[warmed:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(share >= final - 1e-12 for share in falling)
