"""A request that waits for pages: what is asked of its beginning, and when it begins."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.engine.core import Engine
from qiusuo.engine.limits import Limits
from qiusuo.engine.paged_cache import PagedCache
from qiusuo.engine.request import Request
from qiusuo.engine.sampling import Sampling
from tests.engine.oracle import HashModel, alone, assert_as_expected, check_pages, run

MODEL = HashModel(context=400)
SIZE = 4  # tokens of a page


def engine_of(pages: int, **limits) -> Engine:
    size = PagedCache.page_bytes(MODEL.config, torch.float64, SIZE)
    return Engine(MODEL, Limits(cache_bytes=pages * size, page_tokens=SIZE, **limits))


def tokens(count: int, start: int = 0) -> tuple[int, ...]:
    return tuple((start + 5 * i) % 12 for i in range(count))


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each look-up of a page is made from now on."""
    counts: Counter[str] = Counter()

    def count(name: str) -> None:
        plain = getattr(engine.pool, name)

        def counting(key: bytes) -> object:
            counts[name] += 1
            return plain(key)

        monkeypatch.setattr(engine.pool, name, counting)

    count("find")
    count("holds")
    return counts


def test_its_beginning_is_not_gone_through_again_while_nothing_changes(monkeypatch):
    engine = engine_of(pages=40)
    [first] = engine.submit(Request(tokens(60), Sampling(max_tokens=40)))
    run(engine)  # fifteen pages of the beginning are kept, and held by no one
    [busy] = engine.submit(Request(tokens(70, start=1), Sampling(max_tokens=60)))
    engine.step()
    [waiting] = engine.submit(Request(tokens(100), Sampling(max_tokens=2)))
    engine.step()
    assert waiting in engine.scheduler.waiting
    looked = watch(engine, monkeypatch)
    passes = 0
    while busy.finish_reason is None:
        assert waiting in engine.scheduler.waiting
        engine.step()
        check_pages(engine)
        passes += 1
    assert passes > 40
    assert looked["find"] == 0
    assert looked["holds"] <= passes  # one page, the first that was missed
    run(engine)
    assert waiting.cached_tokens > 0
    for one in (first, busy, waiting):
        assert_as_expected(one, alone(MODEL, one.request))


def test_it_begins_as_soon_as_another_has_filled_the_pages_that_it_shares():
    engine = engine_of(pages=30, step_tokens=20)
    [first] = engine.submit(Request(tokens(80), Sampling(max_tokens=12)))
    engine.step()
    [second] = engine.submit(Request((*tokens(80), 3), Sampling(max_tokens=2)))
    engine.step()
    assert second in engine.scheduler.waiting
    while second in engine.scheduler.waiting:
        engine.step()
    assert first.finish_reason is None
    assert second.cached_tokens > 40
    run(engine)
    for one in (first, second):
        assert_as_expected(one, alone(MODEL, one.request))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 2), st.integers(1, 12), st.integers(0, 4)),
        min_size=1,
        max_size=9,
    ),
    st.integers(11, 16),
)
def test_everyone_is_answered_and_rightly(asked, pages):
    """Common beginnings, arrivals at any time, a cache that holds hardly one."""
    engine = engine_of(pages, step_tokens=9)
    answers = []
    for length, start, most, passes in asked:
        answers += engine.submit(Request(tokens(length, start), Sampling(max_tokens=most)))
        for _ in range(passes):
            engine.step()
            check_pages(engine)
    run(engine)
    for one in answers:
        assert_as_expected(one, alone(MODEL, one.request))


def test_new_namespaces_do_not_hold_a_request_back_for_ever():
    engine = engine_of(pages=40, max_running=1)
    engine.submit(Request(tokens(5), Sampling(max_tokens=60), namespace="old"))
    engine.step()
    [held] = engine.submit(Request(tokens(5), Sampling(max_tokens=1), namespace="old"))
    passed = 0
    while held.finish_reason is None:
        passed += 1
        engine.submit(Request(tokens(5), Sampling(max_tokens=1), namespace=f"new {passed}"))
        engine.step()
        assert passed < 400
