"""The pool of pages under random use: nothing leaks, nothing is handed out twice."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qiusuo.engine.pages import OutOfPagesError, PagePool, first_key, next_key

COUNT = 7


class Pool(RuleBasedStateMachine):
    """Against a plain model: who holds what, and what was published under which key."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(COUNT)
        self.holders: list[list[int]] = []
        self.published: dict[bytes, int] = {}
        self.serial = 0

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        if count > self.pool.available:
            before = self.pool.available
            with pytest.raises(OutOfPagesError):
                self.pool.take(count)
            assert self.pool.available == before
            return
        pages = self.pool.take(count)
        held = {page for holder in self.holders for page in holder}
        assert len(set(pages)) == count
        assert not held & set(pages)
        self.published = {k: p for k, p in self.published.items() if p not in pages}
        self.holders.append(pages)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(data.draw(st.sampled_from(self.holders))))
        self.serial += 1
        key = next_key(first_key("n"), [self.serial])
        known = page in self.published.values()
        self.pool.publish(page, key)
        if not known:
            self.published[key] = page

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.published)))
        assert self.pool.find(key) == self.published[key]
        self.holders.append([self.published[key]])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.pool.hold(holder)
        self.holders.append(list(holder))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(place))

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.published.clear()

    @invariant()
    def sound(self) -> None:
        self.pool.check()
        counts = [0] * COUNT
        for holder in self.holders:
            for page in holder:
                counts[page] += 1
        assert counts == self.pool.references
        assert self.published == self.pool.page_of


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def test_the_page_unused_for_longest_goes_first():
    pool = PagePool(3)
    keys = [next_key(first_key(""), [i]) for i in range(3)]
    for key in keys:
        (page,) = pool.take(1)
        pool.publish(page, key)
        pool.release([page])
    pool.release([pool.find(keys[0])])  # used again: now the youngest
    pool.take(1)
    assert pool.find(keys[1]) is None
    assert pool.find(keys[2]) is not None
    assert pool.find(keys[0]) is not None


def test_keys_stand_for_everything_before():
    one, other = first_key("a"), first_key("b")
    assert next_key(one, [1, 2]) != next_key(other, [1, 2])
    assert next_key(next_key(one, [1]), [2]) != next_key(next_key(one, [2]), [1])
    assert next_key(one, [1, 2]) == next_key(first_key("a"), (1, 2))
    assert next_key(one, [258]) != next_key(one, [2, 1])
