"""Limits of a key, by a clock that the test moves."""

from __future__ import annotations

import sys
import threading
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.server.keys import Key
from qiusuo.server.rates import RateExceeded, Rates


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(
    rpm: int | None = None, tpm: int | None = None, concurrency: int | None = None, id: str = "k"
) -> Key:
    return Key(
        id, "name", "main", "sk-...abcd", None, rpm, tpm, concurrency, None, False,
        datetime(2026, 1, 1, tzinfo=UTC), None,
    )  # fmt: skip


def refused(rates: Rates, key: Key, request: str, tokens: int = 0) -> tuple[str, float | None]:
    with pytest.raises(RateExceeded) as caught:
        rates.enter(key, request, tokens)
    return caught.value.limit, caught.value.retry_after


def test_requests_in_any_minute() -> None:
    rates = Rates(clock := Clock())
    for number in range(3):
        rates.enter(key(rpm=3), f"r{number}", 0)
        rates.leave(f"r{number}", 0)
        clock.now += 10
    assert refused(rates, key(rpm=3), "r3") == ("rpm", 30.0)
    clock.now += 29.5
    assert refused(rates, key(rpm=3), "r3") == ("rpm", 0.5)
    clock.now += 0.5
    rates.enter(key(rpm=3), "r3", 0)
    assert refused(rates, key(rpm=3), "r4") == ("rpm", 10.0)


def test_retry_after_a_lowered_limit_waits_for_enough_to_leave() -> None:
    rates = Rates(clock := Clock())
    for number in range(4):
        rates.enter(key(rpm=4), f"r{number}", 0)
        clock.now += 1
    assert refused(rates, key(rpm=2), "x") == ("rpm", 58.0)  # the third has to leave as well


def test_tokens_count_as_reserved_and_then_as_taken() -> None:
    rates = Rates(clock := Clock())
    rates.enter(key(tpm=100), "a", 60)
    clock.now += 5
    rates.enter(key(tpm=100), "b", 40)
    assert refused(rates, key(tpm=100), "c", 1) == ("tpm", 55.0)
    assert refused(rates, key(tpm=100), "c", 61) == ("tpm", 60.0)
    rates.leave("a", 10)
    rates.enter(key(tpm=100), "c", 50)
    assert refused(rates, key(tpm=100), "d", 1)[0] == "tpm"
    rates.leave("c", 55)  # more than it may: counted
    assert refused(rates, key(tpm=100), "d", 0) == ("tpm", 55.0)


def test_what_can_never_be_says_so() -> None:
    assert refused(Rates(Clock()), key(tpm=100), "a", 101) == ("tpm", None)


def test_requests_at_once() -> None:
    rates = Rates(clock := Clock())
    rates.enter(key(concurrency=2), "a", 0)
    rates.enter(key(concurrency=2), "b", 0)
    clock.now += 1000  # time alone frees nothing
    assert refused(rates, key(concurrency=2), "c")[0] == "concurrency"
    rates.leave("a", 0)
    rates.leave("a", 0)
    rates.leave("never entered", 0)
    rates.enter(key(concurrency=2), "c", 0)
    assert refused(rates, key(concurrency=2), "d")[0] == "concurrency"


def test_keys_do_not_count_for_each_other_and_refusals_for_nobody() -> None:
    rates = Rates(clock := Clock())
    rates.enter(key(rpm=1, concurrency=1), "a", 5)
    rates.enter(key(rpm=1, concurrency=1, id="other"), "b", 5)
    for _ in range(5):
        refused(rates, key(rpm=1, concurrency=1), "c")
    rates.leave("a", 5)
    clock.now += 60
    rates.enter(key(rpm=1, concurrency=1), "c", 5)


def test_a_request_enters_once() -> None:
    rates = Rates(Clock())
    rates.enter(key(), "a", 5)
    with pytest.raises(ValueError, match="under way"):
        rates.enter(key(), "a", 5)


def test_nothing_is_kept_of_a_key_that_rests() -> None:
    rates = Rates(clock := Clock())
    for number in range(50):
        rates.enter(key(id=f"k{number}"), f"r{number}", 5)
    clock.now += 61
    for number in range(50):
        rates.leave(f"r{number}", 5)
    assert rates._keys == {}
    assert rates._requests == {}


Step = tuple[float, int, int]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50), st.integers(0, 60)), max_size=60))
def test_no_minute_holds_more_than_the_limits(steps: list[Step]) -> None:
    """Against a list of all that ever entered; what is refused gets in after ``retry_after``."""
    rates, mine = Rates(clock := Clock()), key(rpm=5, tpm=120)
    entered: list[tuple[float, int]] = []
    for number, (wait, most, taken) in enumerate(steps):
        clock.now += wait
        lately = [tokens for at, tokens in entered if at > clock.now - 60]
        if len(lately) >= 5 or sum(lately) + most > 120:
            limit, retry_after = refused(rates, mine, f"r{number}", most)
            assert retry_after is not None
            assert 0 < retry_after <= 60
            clock.now += retry_after + 1e-6
            lately = [tokens for at, tokens in entered if at > clock.now - 60]
            if limit == "rpm" and sum(lately) + most > 120:
                continue  # the other limit stands in its way still
        rates.enter(mine, f"r{number}", most)
        entered.append((clock.now, taken))
        rates.leave(f"r{number}", taken)


def test_threads_do_not_enter_beyond_a_limit() -> None:
    rates, mine = Rates(Clock()), key(rpm=200, concurrency=1000)
    start, got = threading.Barrier(8), []
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # or each thread would be done before the next begins

    def ask(name: int) -> None:
        start.wait()
        for number in range(100):
            try:
                rates.enter(mine, f"{name}-{number}", 0)
                got.append(number)
            except RateExceeded:
                pass

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(usual)
    assert len(got) == 200
