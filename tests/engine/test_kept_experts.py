"""What the routers chose is told for every token, also for those found in the cache: as in one
pass of the training forward over the whole text."""

import pytest
import torch

from qiusuo.engine import request
from qiusuo.engine.core import Engine
from qiusuo.engine.drafting import Pass, drafting
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import Request, Sequence
from qiusuo.engine.sampling import Sampling
from qiusuo.model.transformer import Transformer
from tests.engine.oracle import run
from tests.model.shapes import tiny_model

SIZE = 4  # tokens of a page
PROMPT = tuple((7 * i + 3) % 97 for i in range(14))
WARM = Sampling(max_tokens=9, temperature=1.0, seed=1)


def engine_of(model: Transformer, pages: int = 60, **limits) -> Engine:
    engine = Engine(model, Limits(cache_bytes=1 << 20, page_tokens=SIZE, **limits))
    settings = Limits(cache_bytes=pages * engine.page_bytes, page_tokens=SIZE, **limits)
    return Engine(model, settings)


def ask(engine: Engine, prompt: tuple[int, ...], keep: bool = True, **rest) -> Sequence:
    [answer] = engine.submit(Request(prompt, WARM, keep_experts=keep, **rest))
    run(engine)
    return answer


@torch.no_grad()
def whole(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """The sets of experts in the training forward, sorted, for all but the last token."""
    routings = model(torch.tensor([tokens[:-1]])).routings
    chosen = torch.stack([routings[layer].indices_MK for layer in sorted(routings)], 1)
    return chosen.sort(-1).values


def assert_told(model: Transformer, answer: Sequence) -> None:
    told = torch.cat(answer.experts)
    assert told.dtype == torch.int16
    assert torch.equal(told.long().sort(-1).values, whole(model, answer.tokens))


def test_a_beginning_that_is_found_brings_its_experts_along():
    model = tiny_model()
    engine = engine_of(model)
    first = ask(engine, PROMPT)
    turn = (*first.tokens, 5, 6, 7)
    second, third = ask(engine, turn, first_choice=1), ask(engine, turn[:17])
    assert first.cached_tokens == 0
    assert second.cached_tokens == (len(first.tokens) - 1) // SIZE * SIZE == 20  # answers too
    assert third.cached_tokens == 16
    for answer in (first, second, third):
        assert_told(model, answer)


def test_many_pieces_are_joined(monkeypatch):
    """They are views of whole passes, which must not stay in memory for as long as an answer."""
    monkeypatch.setattr(request, "LOOSE_PIECES", 4)
    model = tiny_model()
    engine = engine_of(model)
    sampling = Sampling(max_tokens=19, temperature=1.0, seed=1)
    answers = engine.submit(Request(PROMPT, sampling, n=3, keep_experts=True))
    run(engine)
    for one in answers:
        assert [len(piece) for piece in one.experts] == [len(PROMPT) + 3, 4, 4, 4, 1, 1, 1]
        assert_told(model, one)
        assert torch.equal(one.experts_between(10, 24), torch.cat(one.experts)[10:24])


def test_siblings_and_a_found_beginning():
    model = tiny_model()
    engine = engine_of(model)
    ask(engine, PROMPT)
    answers = engine.submit(Request((*PROMPT, 8, 9), WARM, n=3, keep_experts=True))
    run(engine)
    assert len({tuple(one.answer) for one in answers}) == 3
    for one in answers:
        assert one.cached_tokens > 0
        assert_told(model, one)


def test_pages_without_known_experts_are_computed_anew_and_known_from_then_on():
    model = tiny_model()
    engine = engine_of(model)
    ask(engine, PROMPT, keep=False)
    again = ask(engine, PROMPT)
    assert again.cached_tokens == 0
    assert ask(engine, PROMPT).cached_tokens == 12
    assert ask(engine, PROMPT, keep=False).cached_tokens == 12
    assert_told(model, again)


def test_nothing_is_kept_for_those_who_do_not_ask():
    engine = engine_of(tiny_model())
    ask(engine, PROMPT, keep=False)
    assert engine.pool.key_of
    assert not engine.pool.experts_of


def test_experts_go_with_their_pages():
    """In a cache that is too small for all, what is remembered is never more than what is found."""
    model = tiny_model()
    engine = engine_of(model, pages=8)
    for number in range(6):
        answer = ask(engine, tuple((number + 5 * i) % 97 for i in range(15)))
        assert_told(model, answer)
        assert 0 < len(engine.pool.experts_of) <= len(engine.pool.key_of) <= 8


@pytest.mark.parametrize("pages", [40, 9])
def test_after_a_preemption(pages):
    model = tiny_model()
    engine = engine_of(model, pages, step_tokens=6)
    answers = [
        engine.submit(Request(PROMPT[i:], WARM, first_choice=i, keep_experts=True))[0]
        for i in (0, 1, 0, 2)
    ]
    run(engine)
    assert (engine.statistics.preempted > 0) == (pages == 9)
    assert (engine.statistics.cached_tokens > 0) == (pages == 9)
    for answer in answers:
        assert_told(model, answer)


def test_other_weights_choose_anew():
    """A request across the swap keeps what was chosen when its tokens were drawn, and leaves
    none of it to others."""
    old, new = tiny_model(0), tiny_model(1)
    engine = engine_of(tiny_model(0), pages=30)
    ask(engine, PROMPT)
    [across] = engine.submit(Request(PROMPT, WARM, keep_experts=True))
    for _ in range(3):
        engine.step()
    engine.swap_weights(new.state_dict())
    assert not engine.pool.experts_of
    engine.scheduler.preempt(across)  # what it goes on from is computed by the new weights
    run(engine)
    told = torch.cat(across.experts).long().sort(-1).values
    count = 16
    assert torch.equal(told[:count], whole(old, across.tokens)[:count])
    after = ask(engine, PROMPT)
    assert_told(new, after)
    assert ask(engine, PROMPT).cached_tokens == 12


def test_a_page_from_disk_is_computed_anew(tmp_path):
    model = tiny_model()
    limits = dict(prefix_folder=tmp_path)
    first = engine_of(model, **limits)
    first.keep_on_disk()
    ask(first, PROMPT)
    second = engine_of(model, **limits)
    second.keep_on_disk()
    answer = ask(second, PROMPT)
    assert (answer.cached_tokens, second.statistics.disk_tokens) == (0, 0)
    assert_told(model, answer)
    assert ask(second, PROMPT).cached_tokens == 12


class Knowing:
    """Drafts the two tokens that come next."""

    def __init__(self, texts: dict[Sequence, list[int]]) -> None:
        self.texts = texts

    def observe(self, done: Pass) -> None:
        for sequence in drafting(done):
            place = len(sequence.tokens)
            sequence.drafts = self.texts[sequence][place : place + 2]


def test_after_a_pass_that_breaks_off_behind_drafts_that_were_right():
    """What the routers chose for drafts is noted when all have drawn: here a listener raises."""
    model = tiny_model()
    engine = engine_of(model, prefix_cache=False)
    texts = [ask(engine, PROMPT[i:]).tokens for i in (0, 1)]
    both = [
        engine.submit(Request(PROMPT[i:], WARM, keep_experts=True, first_choice=0))[0]
        for i in (0, 1)
    ]
    engine.drafter = Knowing(dict(zip(both, texts, strict=True)))

    def listen(one: Sequence, _) -> None:
        if one.answered == 3:
            one.on_token = None
            raise KeyboardInterrupt

    both[1].on_token = listen
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    assert engine.statistics.accepted > 0
    run(engine)
    for one, text in zip(both, texts, strict=True):
        assert one.tokens == text
        assert_told(model, one)
