"""Calls that wait ask for the same as those that do not: rank, deadline, namespace, experts, and
draws of their own where no seed is given."""

import threading
import time

import pytest
import torch

import qiusuo
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.constraint import Constraint
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import Request, RequestError
from qiusuo.engine.sampling import Sampling
from tests.engine.oracle import Steady
from tests.model.shapes import tiny_model

TEXT = "路漫漫其修远兮，吾将上下而求索。"
TURNS = [{"role": "user", "content": "上下而求索"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_characters([TEXT])


def language_model(tokenizer: Tokenizer, draft: str = "none", **limits) -> qiusuo.LanguageModel:
    model = tiny_model(
        eos_token_id=None, vocab_size=tokenizer.vocab_size, max_position_embeddings=256
    )
    settings = {"page_tokens": 4, "cache_bytes": 1 << 20} | limits
    return qiusuo.LanguageModel(model, tokenizer, Limits(**settings), draft)


@pytest.fixture
def lm(tokenizer: Tokenizer) -> qiusuo.LanguageModel:
    return language_model(tokenizer)


# -- seeds ----------------------------------------------------------------------------------------


def test_without_a_seed_every_request_draws_for_itself(lm):
    warm = dict(max_tokens=20, temperature=3.0)
    one, two = (lm.generate(["求索"], **warm)[0].token_ids for _ in range(2))
    assert one != two
    told = lm.generate(["求索", "求索"], n=2, **warm)
    assert len({tuple(one.token_ids) for one in told}) == 4
    messages = {tuple(lm.chat(TURNS, **warm).token_ids) for _ in range(3)}
    assert len(messages) == 3


def test_with_a_seed_or_without_warmth_answers_are_repeated(lm):
    for asked in (dict(temperature=3.0, seed=0), dict(temperature=0.0)):
        one, two = (lm.generate(["求索"], n=2, max_tokens=9, **asked) for _ in range(2))
        assert [answer.token_ids for answer in one] == [answer.token_ids for answer in two]


def test_a_request_has_the_seed_that_it_was_given_or_one_of_its_own():
    seeds = {Request((1,), Sampling(temperature=1.0)).sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert Request((1,), Sampling(temperature=1.0, seed=0)).sampling.seed == 0
    assert Request((1,)).sampling == Sampling()


# -- rank, deadline, namespace, experts -----------------------------------------------------------


def test_a_deadline_ends_what_waits_for_it(lm):
    late = dict(deadline=time.monotonic() - 1, max_tokens=9)
    (answer,) = lm.generate(["求索"], **late)
    assert (answer.finish_reason, answer.token_ids) == ("deadline", [])
    assert lm.chat(TURNS, **late).finish_reason == "deadline"
    assert list(lm.stream(TURNS, **late)) == []
    with pytest.raises(RequestError, match="deadline must be a time"):
        lm.stream(TURNS, deadline=float("nan"))
    with pytest.raises(RequestError, match="priority must be a whole number"):
        lm.generate(["求"], priority=0.5)
    assert lm.engine.idle


def test_namespaces_share_nothing(lm):
    assert lm.chat(TURNS, max_tokens=2, namespace="a").usage.cached_tokens == 0
    assert lm.chat(TURNS, max_tokens=2, namespace="a").usage.cached_tokens > 0
    assert lm.chat(TURNS, max_tokens=2, namespace="b").usage.cached_tokens == 0
    assert lm.chat(TURNS, max_tokens=2).usage.cached_tokens == 0
    told = [lm.generate([TEXT], max_tokens=2, namespace=name)[0] for name in "aab"]
    assert [one.usage.cached_tokens > 0 for one in told] == [False, True, False]


def test_a_stream_of_higher_priority_takes_the_place_of_another(tokenizer):
    lm = language_model(tokenizer, max_running=1)
    plain = lm.chat(TURNS, max_tokens=12, ignore_eos=True)
    slow = lm.stream(TURNS, max_tokens=12, ignore_eos=True)
    next(slow)
    quick = lm.stream(TURNS, max_tokens=12, ignore_eos=True, priority=1)
    told = "".join(event.text for event in quick)
    assert told == plain.content
    assert lm.engine.statistics.preempted == 1
    assert not lm.engine.idle  # the first has waited
    list(slow)
    assert lm.engine.idle


def test_messages_tell_the_experts_of_every_token(lm):
    message = lm.chat(TURNS, max_tokens=9, keep_experts=True)
    again = lm.chat(TURNS, max_tokens=9, keep_experts=True)
    prompt = lm.tokenizer.apply_chat_template(TURNS)
    tokens = [*prompt, *message.token_ids]
    with torch.no_grad():
        routings = lm.model(torch.tensor([tokens[:-1]])).routings
    whole = torch.stack([routings[layer].indices_MK for layer in sorted(routings)], 1)
    assert again.usage.cached_tokens > 0
    for one in (message, again):
        assert torch.equal(one.experts.long().sort(-1).values, whole.sort(-1).values)
    assert lm.chat(TURNS, max_tokens=3).experts is None


# -- streams that are closed while someone else drives -------------------------------------------


def test_a_stream_closed_by_a_listener_of_another_call(lm):
    stream = lm.stream(TURNS, max_tokens=100, ignore_eos=True)
    next(stream)
    heard = []

    def listen(event):
        heard.append(event)
        stream.close()

    message = lm.chat(TURNS, max_tokens=20, ignore_eos=True, on_event=listen)
    assert heard
    assert len(message.token_ids) == 20
    assert lm.engine.idle
    assert lm.engine.pool.available == lm.engine.pool.count


def test_a_stream_closed_from_another_thread(lm):
    """Whoever drives at that moment lets it go, though his own call is the last."""
    stream = lm.stream(TURNS, max_tokens=100, ignore_eos=True)
    next(stream)
    begun, closed = threading.Event(), threading.Event()

    def wait(event):
        begun.set()
        assert closed.wait(60)

    asked = dict(max_tokens=3, ignore_eos=True, on_event=wait)
    driver = threading.Thread(target=lm.chat, args=(TURNS,), kwargs=asked)
    driver.start()
    assert begun.wait(60)
    stream.close()
    assert not lm.engine.idle
    closed.set()
    driver.join(60)
    assert lm.engine.idle


# -- forced tokens, constraints -----------------------------------------------------------------


def test_tokens_that_close_a_thought_have_their_alternatives(lm):
    asked = dict(thinking=True, thinking_budget=3, max_tokens=8, ignore_eos=True)
    message = lm.chat(TURNS, logprobs=2, **asked)
    assert message.usage.reasoning_tokens > 3  # it was closed
    assert [len(one.top) for one in message.drawn] == [2] * 8
    assert all(not one.top for one in lm.chat(TURNS, **asked).drawn)


def test_drafts_under_a_constraint_change_nothing(tokenizer):
    pytest.importorskip("llguidance")
    constraint = Constraint("regex", "(求索|上下){9}(远|兮)*修")
    plain, drafted = language_model(tokenizer), language_model(tokenizer, "ngram")
    drafted.engine.drafter.pace = Steady(4)
    for warmth in (dict(), dict(temperature=1.5, seed=2)):
        asked = warmth | dict(max_tokens=60, constraint=constraint)
        [one], [two] = plain.generate([TEXT], **asked), drafted.generate([TEXT], **asked)
        assert (one.token_ids, one.finish_reason) == (two.token_ids, two.finish_reason)
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-4)
    statistics = drafted.engine.statistics
    assert statistics.accepted > 5
    assert statistics.passes < plain.engine.statistics.passes
