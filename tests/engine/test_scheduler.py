"""The engine under every kind of company: nothing leaks, no one starves, no token is wrong."""

import dataclasses
import math
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qiusuo.engine.core import Engine, Limits
from qiusuo.engine.drafting import Pass, drafting
from qiusuo.engine.paged_cache import PagedCache
from qiusuo.engine.request import Request, RequestError, Sequence
from qiusuo.engine.sampling import Sampling
from tests.engine.oracle import (
    POISON,
    Expected,
    HashModel,
    alone,
    assert_as_expected,
    check_pages,
    full_logits,
    run,
)
from tests.model.shapes import tiny_model

MODEL = HashModel()
NONE: frozenset[int] = frozenset()


def engine_of(
    pages: int = 12, page_tokens: int = 4, model: torch.nn.Module = MODEL, **limits: int | bool
) -> Engine:
    weight = model.model.embed_tokens.weight
    size = PagedCache.page_bytes(model.config, weight.dtype, page_tokens)
    return Engine(model, Limits(cache_bytes=pages * size, page_tokens=page_tokens, **limits))


class WildDrafter:
    """Guesses what is right as far as ``right`` tokens go, and wrong from there on."""

    def __init__(self, answers: dict[Sequence, Expected], plan: list[tuple[int, int]]) -> None:
        self.answers, self.plan, self.turn = answers, plan, 0

    def observe(self, done: Pass) -> None:
        for sequence in drafting(done):
            right, count = self.plan[self.turn % len(self.plan)]
            self.turn += 1
            ahead = self.answers[sequence].tokens[sequence.answered :]
            ahead = (ahead + [0] * count)[:count]
            ahead[right:] = [(token + 1) % POISON for token in ahead[right:]]
            sequence.drafts = ahead[: max(0, sequence.room - sequence.answered - 1)]


BEGINNINGS = [[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [9] * 13]
token_lists = st.builds(
    lambda head, tail: (*head, *tail),
    st.sampled_from(BEGINNINGS),
    st.lists(st.integers(0, POISON - 1), min_size=1, max_size=9),
)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(3, 20),
    min_tokens=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    top_k=st.sampled_from([None, 4]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_ids=st.sampled_from([NONE, frozenset([2, 3])]),
    prompt_logprobs=st.sampled_from([None, None, 2]),
)


class Traffic(RuleBasedStateMachine):
    """Random requests, cancellations and deadlines; every answer against the same one alone."""

    @initialize(
        pages=st.integers(3, 14),
        page_tokens=st.integers(1, 6),
        step_tokens=st.integers(1, 24),
        max_running=st.integers(1, 6),
        prefix_cache=st.booleans(),
        plan=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5),
    )
    def begin(self, pages, page_tokens, step_tokens, max_running, prefix_cache, plan) -> None:
        self.clock = 0.0
        self.real_monotonic, time.monotonic = time.monotonic, lambda: self.clock
        self.engine = engine_of(
            pages,
            page_tokens,
            step_tokens=step_tokens,
            max_running=max_running,
            prefix_cache=prefix_cache,
        )
        self.expected: dict[Sequence, Expected] = {}
        self.cancelled: set[Sequence] = set()
        self.passed = 0
        self.prompts = 0
        self.engine.drafter = WildDrafter(self.expected, plan)

    @rule(
        prompt=token_lists,
        sampling=samplings,
        n=st.sampled_from([1, 1, 2, 3]),
        priority=st.integers(0, 2),
        namespace=st.sampled_from(["", "b"]),
        patience=st.none() | st.integers(0, 9),
        poisoned=st.sampled_from([False, False, False, True]),
        forced=st.dictionaries(st.integers(0, 4), st.integers(0, POISON - 1), max_size=2),
    )
    def submit(self, prompt, sampling, n, priority, namespace, patience, poisoned, forced) -> None:
        if poisoned:
            prompt = (*prompt, POISON, 1)
        request = Request(
            prompt,
            sampling,
            end_ids=frozenset([5]),
            n=n,
            priority=priority,
            namespace=namespace,
            deadline=None if patience is None else self.clock + patience,
        )
        if len(prompt) >= self.engine.capacity:
            with pytest.raises(RequestError, match="one must be free"):
                self.engine.submit(request)
            return
        self.prompts += len(prompt)
        for sequence in self.engine.submit(request):
            self.expected[sequence] = alone(
                MODEL, request, sequence.choice, forced, self.engine.capacity
            )
            force(sequence, forced)

    @property
    def live(self) -> list[Sequence]:
        return [one for one in self.expected if one.finish_reason is None]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.cancelled.add(sequence)
        self.engine.cancel(sequence)
        assert sequence.finish_reason == "cancelled"

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds) -> None:
        self.clock += seconds

    @rule(count=st.integers(1, 6))
    def step(self, count) -> None:
        for _ in range(count):
            before = {one: one.answered for one in self.live}
            touched = self.engine.step()
            assert len(set(touched)) == len(touched)
            for sequence, answered in before.items():
                changed = sequence.answered > answered or sequence.finish_reason is not None
                assert changed == (sequence in touched)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "engine"):
            return
        check_pages(self.engine)
        statistics = self.engine.statistics
        assert statistics.drawn == sum(one.answered for one in self.expected)
        assert statistics.prompt_tokens == self.prompts
        assert 0 <= statistics.accepted <= statistics.drafted
        for sequence, expected in self.expected.items():
            answer = list(sequence.answer)
            assert answer == expected.tokens[: len(answer)]
            assert sequence.drawn == expected.drawn[: len(answer)]
            if sequence.finish_reason in ("stop", "length", "error"):
                assert_as_expected(sequence, expected)
                check_prompt(sequence)
            elif sequence.finish_reason == "cancelled":
                assert sequence in self.cancelled
            elif sequence.finish_reason == "deadline":
                assert sequence.request.deadline <= self.clock

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        work = sum(len(one.request.prompt) + one.room for one in self.live)
        self.sound()
        run(self.engine, most=10 + 4 * work)
        self.sound()
        assert not self.live
        time.monotonic = self.real_monotonic


def force(sequence: Sequence, forced: dict[int, int]) -> None:
    def before_place(place: int) -> None:
        sequence.forced = [forced[place]] if place in forced else []

    def heard(one: Sequence, drawn: object) -> None:
        before_place(one.answered)

    before_place(0)
    sequence.on_token = heard


def check_prompt(sequence: Sequence) -> None:
    request = sequence.request
    if request.sampling.prompt_logprobs is None or sequence.finish_reason == "error":
        return
    logprobs = full_logits(MODEL, request.prompt).log_softmax(-1)
    told = [one.logprob for one in sequence.prompt_drawn]
    assert [one.token for one in sequence.prompt_drawn] == list(request.prompt[1:])
    expected = [float(logprobs[i, token]) for i, token in enumerate(request.prompt[1:])]
    assert told == pytest.approx(expected, abs=1e-5)
    assert all(len(one.top) == request.sampling.prompt_logprobs for one in sequence.prompt_drawn)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=120, stateful_step_count=30)
