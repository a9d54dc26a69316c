"""Who drives an engine: one at a time, and from a request's first token on somebody listens."""

import gc
import threading
import weakref

import pytest

import qiusuo
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.asking import Asked
from qiusuo.engine.driving import Driver
from qiusuo.engine.request import EngineError
from tests.engine.test_sync_requests import TEXT, TURNS, language_model

LONG = dict(max_tokens=9, ignore_eos=True)


@pytest.fixture
def lm() -> qiusuo.LanguageModel:
    return language_model(Tokenizer.train_characters([TEXT]))


def test_nobody_draws_before_a_stream_listens(lm, monkeypatch):
    """Another thread may ask between any two lines: here, right before the stream listens."""
    plain = lm.chat(TURNS, **LONG)
    follow = Asked.follow

    def late(asked, *rest):
        monkeypatch.setattr(Asked, "follow", follow)
        with pytest.raises(EngineError, match="drives this model's engine"):
            lm.generate(["求"], max_tokens=3)
        return follow(asked, *rest)

    monkeypatch.setattr(Asked, "follow", late)
    assert "".join(event.text for event in lm.stream(TURNS, **LONG)) == plain.content


@pytest.mark.parametrize("ask", ["chat", "stream"])
def test_what_nobody_can_follow_is_not_under_way(lm, monkeypatch, ask):
    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(Asked, "follow", broken)
    with pytest.raises(MemoryError, match="no room"):
        list(getattr(lm, ask)(TURNS, **LONG))
    assert lm.engine.idle


def test_two_threads_that_ask_first_get_one_engine(lm):
    engines, threads = [], []

    def make():
        if not threads:
            threads.append(threading.Thread(target=lambda: engines.append(driver.engine)))
            threads[0].start()
            threads[0].join(0.2)  # it waits for this one; no longer than that for a broken one
        return object()

    driver = Driver(make)
    engines.append(driver.engine)
    threads[0].join(60)
    assert len(engines) == 2
    assert engines[0] is engines[1]


def test_a_model_that_nobody_holds_is_gone_at_once(lm):
    """Its memory is not to wait for the collector of cycles."""
    lm.chat(TURNS, **LONG)
    model = weakref.ref(lm.model)
    gc.disable()
    try:
        one = language_model(lm.tokenizer)
        one.chat(TURNS, **LONG)
        model = weakref.ref(one.model)
        del one
        assert model() is None
    finally:
        gc.enable()
