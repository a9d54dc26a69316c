"""The engine under every kind of company: nothing leaks, no one starves, no token is wrong."""

import dataclasses
import math
import time

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qiusuo.engine.core import Engine
from qiusuo.engine.drafting import Pass, drafting
from qiusuo.engine.limits import Limits
from qiusuo.engine.mtp_drafting import MTPDrafter
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
TestTraffic.settings = settings(
    max_examples=60, stateful_step_count=25, report_multiple_bugs=False, phases=[Phase.generate]
)


# -- one case each ------------------------------------------------------------------------------

GREEDY = Sampling(max_tokens=8)
WARM = Sampling(max_tokens=8, temperature=1.5, seed=4)


def submit(engine: Engine, prompt: tuple[int, ...], sampling=GREEDY, **options) -> list[Sequence]:
    return engine.submit(Request(prompt, sampling, **options))


def check_alone(*sequences: Sequence) -> None:
    for sequence in sequences:
        assert_as_expected(sequence, alone(MODEL, sequence.request, sequence.choice))


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9])
def test_prompts_around_whole_pages_and_their_second_coming(length):
    engine = engine_of(page_tokens=4)
    prompt = tuple(range(1, length + 1))
    (first,) = submit(engine, prompt)
    run(engine)
    (second,) = submit(engine, prompt)
    run(engine)
    check_alone(first, second)
    assert first.cached_tokens == 0
    assert second.cached_tokens == (length - 1) // 4 * 4  # one token at least is computed
    computed = engine.statistics.tokens
    assert computed == 2 * (length + 7) - second.cached_tokens
    assert engine.statistics.cached_tokens == second.cached_tokens


def test_namespaces_share_nothing_and_may_be_any_text():
    engine = engine_of(pages=40)
    prompt = tuple(range(1, 10))
    for namespace in ("", "a", "b", "a\0", "名"):
        for cached in (0, 8):
            (one,) = submit(engine, prompt, namespace=namespace)
            run(engine)
            assert one.cached_tokens == cached
            check_alone(one)


def test_without_a_prefix_cache_nothing_is_found():
    engine = engine_of(prefix_cache=False)
    for _ in range(2):
        (one,) = submit(engine, tuple(range(1, 10)))
        run(engine)
        assert one.cached_tokens == 0


def test_a_turn_whose_thought_is_stripped_is_found_up_to_the_question():
    """The next prompt has question, answer, question; the thought between is gone."""
    engine = engine_of(pages=40, page_tokens=2)
    question, thought, answer = (1, 2, 3, 4), (9, 9, 9), (6, 7)
    (first,) = submit(engine, question, Sampling(max_tokens=5))
    first.forced = [*thought, *answer]
    run(engine)
    assert tuple(first.answer) == (*thought, *answer)
    (second,) = submit(engine, (*question, *answer, 3, 3))
    run(engine)
    assert second.cached_tokens == len(question)
    (third,) = submit(engine, (*question, *thought, *answer, 3, 3))
    run(engine)
    assert third.cached_tokens == 8  # of the 9 the last was never computed
    check_alone(second, third)


def test_many_answers_read_their_prompt_once():
    engine = engine_of(pages=40)
    prompt = tuple(range(1, 7))
    answers = submit(engine, prompt, WARM, n=5, first_choice=3)
    run(engine)
    check_alone(*answers)
    assert [one.choice for one in answers] == [3, 4, 5, 6, 7]
    assert len({tuple(one.answer) for one in answers}) > 1
    assert engine.statistics.tokens == len(prompt) + 5 * 7
    assert [one.cached_tokens for one in answers] == [0, 6, 6, 6, 6]


def test_more_answers_than_pages():
    """Forks of a half-filled page are copied before they part, and take turns."""
    engine = engine_of(pages=5, page_tokens=3)
    answers = submit(engine, (1, 2, 3, 4), WARM, n=9)
    run(engine)
    check_alone(*answers)
    assert engine.statistics.preempted > 0


def test_preempted_while_its_siblings_wait():
    engine = engine_of(page_tokens=2, step_tokens=2)
    answers = submit(engine, (3, 1, 4, 1, 5), WARM, n=3)
    engine.step()
    engine.scheduler.preempt(answers[0])
    (other,) = submit(engine, (1, 2))
    check_pages(engine)
    run(engine)
    check_alone(other, *answers)


@pytest.mark.parametrize("steps", [0, 1])
def test_cancelling_one_of_many_leaves_the_others_their_prompt(steps):
    for gone in (0, 1, 2):
        engine = engine_of(step_tokens=1, page_tokens=2)
        answers = submit(engine, (1, 2, 3, 4, 5, 6), WARM, n=3)
        for _ in range(steps):
            engine.step()
        assert answers[0].answered == 0  # the others wait for it
        engine.cancel(answers[gone])
        engine.cancel(answers[gone])  # again: nothing
        run(engine)
        assert (answers[gone].finish_reason, answers[gone].answered) == ("cancelled", 0)
        check_alone(*(one for one in answers if one is not answers[gone]))


def test_cancelling_all_while_they_wait_ends_all():
    engine = engine_of(step_tokens=1)
    answers = submit(engine, (1, 2, 3, 4), WARM, n=3)
    engine.step()
    for one in reversed(answers):
        engine.cancel(one)
    assert engine.idle
    run(engine)


@pytest.mark.parametrize("whom", [[0], [1], [2], [0, 1], [3], [0, 1, 2, 3]], ids=str)
def test_a_listener_cancels_in_the_middle_of_a_pass(whom):
    """Itself, those before and behind it in the same pass, and one that still reads its prompt."""
    engine = engine_of(pages=40, step_tokens=6)
    answers = [submit(engine, (1, i, 3), WARM, first_choice=i)[0] for i in range(3)]
    engine.step()
    engine.step()
    answers += submit(engine, (7,) * 20)
    engine.step()
    assert answers[3].answered == 0

    def cancel(*_) -> None:
        for place in whom:
            engine.cancel(answers[place])

    before = [one.answered for one in answers]
    answers[1].on_token = cancel
    touched = engine.step()
    assert set(touched) >= set(answers[:3])
    check_pages(engine)
    answers[1].on_token = None
    run(engine)
    for place, one in enumerate(answers):
        if place in whom:
            assert one.finish_reason == "cancelled"
            assert one.answered == before[place] + (place in (0, 1))  # drawn before or while
        else:
            check_alone(one)


def test_a_listener_asks_for_more():
    engine = engine_of()
    more: list[Sequence] = []

    def ask(one: Sequence, _) -> None:
        if len(more) < 2:
            more.extend(submit(engine, (2, 4)))

    (first,) = submit(engine, (1, 2))
    first.on_token = ask
    run(engine)
    check_alone(first, *more)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_listener_that_raises_disturbs_no_one(at):
    """The pass breaks off; those who had got no token yet compute it again."""
    engine = engine_of(pages=40, page_tokens=2)
    expected: dict[Sequence, Expected] = {}
    engine.drafter = WildDrafter(expected, [(2, 3), (0, 0), (1, 1)])
    others = [submit(engine, (i, 3), WARM, n=2)[j] for i in range(3) for j in range(1)]
    answers = [one for s in others for one in (s, *s.siblings)]
    (bad,) = submit(engine, (5, 5, 5))
    for one in (*answers, bad):
        expected[one] = alone(MODEL, one.request, one.choice)

    def hear(one: Sequence, _) -> str | None:
        if one.answered > at:
            raise KeyboardInterrupt
        return None

    bad.on_token = hear
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    engine.cancel(bad)
    check_pages(engine)
    run(engine)
    check_alone(*answers)


def test_a_listener_may_end_an_answer():
    engine = engine_of()
    (one,) = submit(engine, (1, 2))
    one.on_token = lambda one, _: "stop" if one.answered == 3 else None
    run(engine)
    assert (one.answered, one.finish_reason) == (3, "stop")


def test_deadlines_end_what_runs_what_waits_and_its_siblings(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    engine = engine_of(max_running=1, step_tokens=2)
    (first,) = submit(engine, (1, 2, 3), Sampling(max_tokens=20), deadline=101.0)
    waiting = submit(engine, (4, 5, 6), n=3, deadline=101.0)
    (patient,) = submit(engine, (7, 8), deadline=500.0)
    for _ in range(4):
        engine.step()
    now = 101.0
    touched = engine.step()
    assert {first, *waiting} <= set(touched)
    assert {one.finish_reason for one in (first, *waiting)} == {"deadline"}
    assert first.answered > 0
    run(engine)
    check_alone(patient)


def test_higher_priorities_go_first_and_are_preempted_last():
    engine = engine_of(pages=4, max_running=1)
    low, high = submit(engine, (1, 2))[0], submit(engine, (3, 4), priority=1)[0]
    order = []
    while not engine.idle:
        order += engine.step()
    assert order == [high] * 8 + [low] * 8
    engine = engine_of(pages=3, page_tokens=4)
    low, high = submit(engine, (1, 2))[0], submit(engine, (3, 4), priority=1)[0]
    run(engine)
    assert engine.statistics.preempted > 0
    check_alone(low, high)


def test_namespaces_take_turns():
    """Ten requests of one user do not keep another's waiting."""
    engine = engine_of(pages=40, max_running=2)
    many = [submit(engine, (1, i), namespace="a")[0] for i in range(10)]
    (other,) = submit(engine, (3, 4), namespace="b")
    engine.step()
    assert (many[0].answered, many[1].answered, other.answered) == (1, 0, 1)


def test_a_long_prompt_does_not_stop_the_answers_of_others():
    engine = engine_of(pages=40, page_tokens=2, step_tokens=4)
    (quick,) = submit(engine, (1, 2), Sampling(max_tokens=12))
    engine.step()
    (long,) = submit(engine, (5,) * 30)
    while long.answered == 0:
        before = quick.answered
        engine.step()
        assert quick.answered == before + 1 or quick.finish_reason
    run(engine)
    check_alone(quick, long)


def test_nan_hurts_only_whom_it_comes_from():
    """Also those who get its pages later, and those side by side with it."""
    engine = engine_of(pages=8, page_tokens=4, prefix_cache=False)
    (bad,) = submit(engine, (1, 2, *(POISON,) * 6))
    good = [submit(engine, (i, 2, 3), WARM)[0] for i in range(2)]
    run(engine)
    assert bad.finish_reason == "error"
    assert "NaN" in bad.error
    check_alone(*good)
    again = [submit(engine, (7,) * length, WARM)[0] for length in (1, 2, 6)]
    run(engine)
    check_alone(*again)


def test_what_lay_in_the_memory_hurts_no_one():
    engine = engine_of(pages=20, page_tokens=4)
    engine.cache.entries_LpsW.fill_(math.nan)
    answers = [submit(engine, (7,) * length, WARM)[0] for length in (1, 2, 6)]
    run(engine)
    check_alone(*answers)


def test_nan_in_a_prompt_that_is_to_be_told():
    engine = engine_of(page_tokens=2, step_tokens=3)
    told = Sampling(max_tokens=3, prompt_logprobs=1)
    bad = submit(engine, (1, POISON, 2, 3, 4, 5), told, n=2)
    (good,) = submit(engine, (1, 2, 2, 3, 4, 5), told)
    run(engine)
    for one in bad:
        assert one.finish_reason == "error"
        assert "NaN" in one.error
    check_alone(good)
    check_prompt(good)


class BrokenMatcher:
    """A constraint that grows beyond its library's limits."""

    finished = False

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def allowed(self) -> torch.Tensor:
        if self.tokens == 0:
            raise ValueError("the constraint failed: too complex")
        self.tokens -= 1
        return torch.ones(MODEL.config.vocab_size, dtype=torch.bool)

    def advance(self, token: int) -> None:
        pass


def test_a_constraint_that_fails_hurts_only_its_own_answer():
    engine = engine_of()
    (bad,), (good,) = submit(engine, (1, 2)), submit(engine, (3, 4))
    bad.matcher = BrokenMatcher(2)
    run(engine)
    assert (bad.finish_reason, bad.answered) == ("error", 2)
    assert bad.error == "the constraint failed: too complex"
    check_alone(good)


def test_ends():
    engine = engine_of(pages=60)
    free = alone(MODEL, Request((1, 2), GREEDY)).tokens
    ends = frozenset([free[2], free[4]])
    changes = {
        "plain": {},
        "own": {"stop_ids": [free[1]]},
        "early": {"min_tokens": 7, "stop_ids": [free[1]]},
        "ignored": {"ignore_eos": True},
        "ignored but own": {"ignore_eos": True, "stop_ids": [free[3]]},
    }
    asked = {
        name: submit(engine, (1, 2), dataclasses.replace(GREEDY, **change), end_ids=ends)[0]
        for name, change in changes.items()
    }
    run(engine)
    check_alone(*asked.values())
    assert list(asked["plain"].answer) == free[:3]
    assert list(asked["own"].answer) == free[:2]
    assert asked["early"].answered >= 7
    assert not {*ends, free[1]} & set(asked["early"].answer[:7])
    assert list(asked["ignored"].answer) == free
    assert list(asked["ignored but own"].answer) == free[:4]


def test_the_cache_is_the_limit_where_the_context_is_not():
    engine = engine_of(pages=3, page_tokens=4)
    assert engine.capacity == 12
    (one,) = submit(engine, (1, 2, 3), Sampling(max_tokens=50))
    run(engine)
    assert (one.answered, one.finish_reason) == (9, "length")
    with pytest.raises(RequestError, match="has 12 tokens; the cache holds 12 and one must"):
        submit(engine, (1,) * 12)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(()), "the prompt is empty: give at least one token"),
        (Request((1, 13)), r"token id 13 is outside 0\.\.12"),
        (Request((1,) * 65), "the prompt has 65 tokens; the context holds 64"),
        (Request((1,) * 64), "64 tokens; the context holds 64 and one must be free"),
        (Request((1,), keep_experts=True), "this model has no experts"),
    ],
)
def test_refused_requests(request_, words):
    engine = engine_of(pages=40)
    with pytest.raises(RequestError, match=words):
        engine.submit(request_)
    assert engine.idle


def test_refused_limits():
    with pytest.raises(RequestError, match="n must be at least 1 and at most 8192, not 0"):
        engine_of().submit(Request((1,), n=0))
    with pytest.raises(RequestError, match=r"cache_bytes 10 is less than one page, [\d,]+"):
        Engine(MODEL, Limits(cache_bytes=10))
    for name in ("page_tokens", "step_tokens", "max_running"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            Limits(**{name: 0})


def test_nothing_to_do_is_no_pass():
    engine = engine_of()
    assert engine.step() == []
    assert engine.statistics.passes == 0


# -- real models: what a hash cannot show ---------------------------------------------------------


@torch.no_grad()
def experts_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    routings = model(torch.tensor([tokens])).routings
    return torch.stack([routings[layer].indices_MK for layer in sorted(routings)], 1)


def sets(experts: torch.Tensor) -> torch.Tensor:
    return experts.long().sort(-1).values


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("pages", [40, 7])
def test_experts_and_prompts_are_told_as_in_one_plain_pass(pages, drafted):
    """Through chunks, drafts, preemption and forks, every token once."""
    model = tiny_model()
    engine = engine_of(pages, 4, model, step_tokens=6)
    sampling = Sampling(max_tokens=9, temperature=1.0, prompt_logprobs=0, seed=1)
    prompts = [tuple((7 * i + j * j) % 97 for j in range(9 + i)) for i in range(3)]
    expected: dict[Sequence, Expected] = {}
    if drafted:
        engine.drafter = WildDrafter(expected, [(3, 3), (1, 2), (0, 1), (2, 2)])
    answers = [one for p in prompts for one in submit(engine, p, sampling, n=2, keep_experts=True)]
    for one in answers:
        expected[one] = alone(model, one.request, one.choice)
    run(engine)
    assert (engine.statistics.preempted > 0) == (pages == 7)
    assert (engine.statistics.accepted > 0) == drafted
    for one in answers:
        assert_as_expected(one, expected[one], exact=False)
        told = torch.cat(one.experts)
        assert told.dtype == torch.int16
        assert torch.equal(sets(told), sets(experts_of(model, one.tokens[:-1])))
        logprobs = full_logits(model, one.tokens).log_softmax(-1)
        drawn = [*one.prompt_drawn, *one.drawn]
        assert [d.token for d in drawn] == one.tokens[1:]
        plain = [float(logprobs[i, token]) for i, token in enumerate(one.tokens[1:])]
        assert [d.logprob for d in drawn] == pytest.approx(plain, abs=1e-4)


def test_a_poisoned_embedding_hurts_only_those_who_use_it():
    model = tiny_model()
    model.model.embed_tokens.weight.data[50] = math.nan
    engine = engine_of(12, 4, model)
    (bad,) = submit(engine, (1, 50, 3))
    good = [submit(engine, (i, 2, 3, 4))[0] for i in range(3)]
    run(engine)
    later = [submit(engine, (i, 9))[0] for i in range(4)]
    run(engine)
    assert bad.finish_reason == "error"
    for one in (*good, *later):
        assert_as_expected(one, alone(model, one.request), exact=False)


def test_swapped_weights():
    """Tokens carry the version they were drawn from; nothing of the old is found any more, also
    not what a request that was under way went on to write."""
    old, new = tiny_model(0), tiny_model(1)
    engine = engine_of(40, 2, tiny_model(0))
    prompt = tuple(range(1, 8))
    (before,) = submit(engine, prompt)
    run(engine)
    (across,) = submit(engine, prompt)
    for _ in range(4):
        engine.step()
    assert engine.swap_weights(new.state_dict()) == 1
    (first,) = submit(engine, prompt)
    run(engine)
    (second,) = submit(engine, tuple(across.tokens))
    run(engine)
    assert_as_expected(before, alone(old, before.request), exact=False)
    assert (before.versions, across.versions) == ([0] * 8, [0] * 4 + [1] * 4)
    assert first.versions == second.versions == [1] * 8
    assert first.cached_tokens == 0
    for one in (first, second):
        assert_as_expected(one, alone(new, one.request), exact=False)
        logprobs = full_logits(new, one.tokens).log_softmax(-1)
        place = len(one.request.prompt) - 1
        plain = [float(logprobs[place + i, token]) for i, token in enumerate(one.answer)]
        assert [d.logprob for d in one.drawn] == pytest.approx(plain, abs=1e-4)
    longest = common(first.tokens, across.tokens)
    assert second.cached_tokens <= longest


def test_forks_of_what_other_weights_have_begun_are_not_found():
    """The prompt was half read when the weights changed; its forks write on behind it."""
    new = tiny_model(1)
    engine = engine_of(60, 2, tiny_model(0), step_tokens=4)
    prompt = tuple(range(1, 8))
    forks = submit(engine, prompt, n=3)
    engine.step()
    engine.swap_weights(new.state_dict())
    run(engine)
    for tokens in (prompt, tuple(forks[0].tokens), tuple(forks[1].tokens)):
        for _ in range(2):
            (one,) = submit(engine, tokens)
            run(engine)
            assert_as_expected(one, alone(new, one.request), exact=False)
            logprobs = full_logits(new, one.tokens).log_softmax(-1)
            plain = [
                float(logprobs[i - 1, one.tokens[i]]) for i in range(len(tokens), len(one.tokens))
            ]
            assert [d.logprob for d in one.drawn] == pytest.approx(plain, abs=1e-4)


class BrokenDrafter:
    """Breaks off a pass in which everything was drawn."""

    def observe(self, done: Pass) -> None:
        raise KeyboardInterrupt


def test_a_pass_that_breaks_off_leaves_no_one_behind_who_has_finished():
    engine = engine_of()
    quick, slow = submit(engine, (1, 2), Sampling(max_tokens=1)), submit(engine, (1, 2))
    drafter, engine.drafter = engine.drafter, BrokenDrafter()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.drafter = drafter
    check_pages(engine)
    run(engine)
    check_alone(*quick, *slow)


def common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def test_weights_that_do_not_fit_change_nothing():
    model = tiny_model()
    engine = engine_of(8, 4, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = torch.zeros_like(before["model.norm.weight"])
    for wrong, words in [
        ({"model.norm.weight": good, "model.nothing": good}, "the model has no model.nothing"),
        (
            {"model.norm.weight": good, "lm_head.weight": torch.zeros(1)},
            r"lm_head.weight must have the shape \[97, 48\], not \[1\]",
        ),
    ]:
        with pytest.raises(RequestError, match=words):
            engine.swap_weights(wrong)
    assert engine.version == 0
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


# -- nobody waits for a long prompt ---------------------------------------------------------------


def steps_to_first_token(engine: Engine, sequence: Sequence) -> int:
    for step in range(1, 200):
        engine.step()
        if sequence.answered:
            return step
    raise AssertionError("it starved")


def test_a_short_prompt_does_not_wait_for_a_long_one():
    """Nor for several: each gets its share of every pass."""
    model = tiny_model(max_position_embeddings=512)
    engine = Engine(model, Limits(cache_bytes=4 << 20, page_tokens=4, step_tokens=32))
    longs = [engine.submit(Request((7, *range(90)) * 5))[0] for _ in range(2)]
    engine.step()
    (short,) = engine.submit(Request((1, 2, 3, 4, 5)))
    assert steps_to_first_token(engine, short) <= 2
    assert not any(long.answered for long in longs)
    while not engine.idle:
        engine.step()
    assert [long.finish_reason for long in longs] == ["length"] * 2


@pytest.mark.parametrize("full", ["places", "pages"])
def test_one_of_higher_priority_takes_a_place(full):
    model = tiny_model()
    page = Engine(model, Limits(cache_bytes=1 << 20, page_tokens=4)).page_bytes
    limits = Limits(
        cache_bytes=8 * page if full == "pages" else 1 << 20,
        page_tokens=4,
        max_running=1 if full == "places" else 8,
    )
    engine = Engine(model, limits)
    sampling = Sampling(max_tokens=20)
    (low,) = engine.submit(Request((5, 3, 88, 17, 2), sampling))
    for _ in range(14):
        engine.step()
    (equal,) = engine.submit(Request(tuple(range(17)), sampling))
    engine.step()
    assert not equal.answered
    (high,) = engine.submit(Request(tuple(range(20, 37)), Sampling(max_tokens=3), priority=1))
    assert steps_to_first_token(engine, high) == 1
    while not engine.idle:
        engine.step()
    for sequence in (low, equal, high):
        expected = alone(model, sequence.request, capacity=engine.capacity)
        assert_as_expected(sequence, expected, exact=False)


def test_no_one_is_preempted_for_a_guess():
    model = tiny_model(num_nextn_predict_layers=1)
    page = Engine(model, Limits(cache_bytes=1 << 20, page_tokens=4)).page_bytes
    engine = Engine(model, Limits(cache_bytes=5 * page, page_tokens=4))
    engine.drafter = MTPDrafter(model, engine.cache)
    sampling = Sampling(max_tokens=4)
    sequences = [engine.submit(Request(tuple(range(i, i + 5)), sampling))[0] for i in (0, 20)]
    while not engine.idle:
        engine.step()
    assert engine.statistics.preempted == 0
    assert [len(one.answer) for one in sequences] == [4, 4]
