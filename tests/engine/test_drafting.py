"""Drafts change no answer, whatever is guessed; and where guesses are good, passes are saved."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.engine.core import Engine
from qiusuo.engine.drafting import REST, Drafter, NgramDrafter, NgramIndex, NoDrafter
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits
from qiusuo.engine.mtp_drafting import MTPDrafter
from qiusuo.engine.pacing import AGAIN, TRIALS, Pace
from qiusuo.engine.request import Request, Sequence
from qiusuo.engine.sampling import Sampling
from qiusuo.model.transformer import Transformer
from tests.engine.oracle import (
    HashModel,
    Steady,
    alone,
    assert_as_expected,
    check_pages,
    full_logits,
    run,
)
from tests.model.shapes import DENSE, VARIANTS, tiny_model

GREEDY = Sampling(max_tokens=20)
WARM = Sampling(max_tokens=20, temperature=0.7, seed=2)
PROMPTS = [tuple((11 * i + j * j) % 97 for j in range(5 + 4 * i)) for i in range(4)]
TEXT = [(37 * i + 5) % 97 for i in range(97)]  # goes round: no token comes twice


def drafter_of(kind: str, engine: Engine, most: int) -> Drafter:
    drafter = MTPDrafter(engine.model, engine.cache) if kind == "mtp" else NgramDrafter()
    drafter.pace = Steady(most)
    return drafter


def engine_of(model: Transformer, kind: str = "mtp", most: int = 3, pages: int = 60, **limits):
    size = Engine(model, Limits(cache_bytes=1 << 20, page_tokens=4)).page_bytes
    engine = Engine(model, Limits(cache_bytes=pages * size, page_tokens=4, **limits))
    engine.drafter = drafter_of(kind, engine, most)
    return engine


def submit(engine: Engine, prompts=PROMPTS, sampling=GREEDY, **options) -> list[Sequence]:
    return [one for p in prompts for one in engine.submit(Request(tuple(p), sampling, **options))]


def check_alone(model: Transformer, answers: list[Sequence]) -> None:
    for one in answers:
        assert_as_expected(one, alone(model, one.request, one.choice), exact=False)


@cache
def by_heart() -> Transformer:
    """A model that knows a text by heart, and so does its module."""
    model = tiny_model(num_nextn_predict_layers=1, num_hidden_layers=2, max_position_embeddings=256)
    ids = torch.tensor(TEXT * 2)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        starts = torch.randint(0, len(TEXT), (8,), generator=generator)
        tokens_BT = torch.stack([ids[start : start + 42] for start in starts])
        now, ahead, beyond = tokens_BT[:, :40], tokens_BT[:, 1:41], tokens_BT[:, 2:]
        hidden = model(now).x_BTD
        hidden_ahead = model.predict_ahead(hidden, ahead, 0, model.context(ahead)).x_BTD
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), ahead.flatten())
        loss += F.cross_entropy(model.logits(hidden_ahead).flatten(0, 1), beyond.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def guesses(model: Transformer, tokens: list[int], most: int) -> list[int]:
    """What the module guesses behind ``tokens``, from full passes without any cache."""
    states = model(torch.tensor([tokens[:-1]])).x_BTD
    following = list(tokens[1:])
    guessed: list[int] = []
    for _ in range(most):
        next_BT = torch.tensor([following])
        ahead = model.predict_ahead(states, next_BT, 0, model.context(next_BT)).x_BTD
        guessed.append(int(model.logits(ahead[:, -1]).argmax(-1)))
        states = torch.cat((states, ahead[:, -1:]), 1)
        following.append(guessed[-1])
    return guessed


# -- no answer changes ----------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("pages", [60, 10], ids=["room", "preempted"])
@pytest.mark.parametrize("name", VARIANTS)
def test_answers_with_mtp_are_those_without(name, pages, sampling):
    model = tiny_model(**VARIANTS[name], num_nextn_predict_layers=1)
    engine = engine_of(model, pages=pages, step_tokens=9)
    answers = submit(engine, sampling=sampling)
    run(engine)
    check_alone(model, answers)
    assert engine.statistics.drafted > 30
    assert (engine.statistics.preempted > 0) == (pages == 10)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["v3", *DENSE])
def test_answers_with_ngrams_are_those_without(name, sampling):
    model = tiny_model(**(VARIANTS | DENSE)[name])
    engine = engine_of(model, "ngram", most=4)
    prompts = [[*p, *p, *p[:3]] for p in PROMPTS]
    answers = submit(engine, prompts, sampling)
    run(engine)
    check_alone(model, answers)
    assert engine.statistics.drafted > 5


@pytest.mark.parametrize("kind", ["mtp", "ngram"])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_answers_are_those_without_where_drafts_are_mostly_right(kind, sampling):
    model = by_heart()
    engine = engine_of(model, kind, most=4)
    answers = submit(engine, [TEXT[:60] + TEXT[20:30], TEXT[30:40]], sampling, n=3)
    run(engine)
    check_alone(model, answers)
    assert engine.statistics.accepted > 10


def test_tokens_of_many_drafted_answers_follow_the_models_probabilities():
    model = tiny_model(vocab_size=7, num_hidden_layers=1, num_nextn_predict_layers=1)
    engine = engine_of(model, "mtp", most=2, pages=9000, max_running=4000)
    count = 3000
    answers = submit(engine, [[5, 3]], Sampling(max_tokens=5, temperature=1.0, seed=0), n=count)
    run(engine)
    assert engine.statistics.accepted > count // 10
    for place in (1, 2, 3):  # the first two have no drafts yet
        probs = sum(
            p * full_logits(model, [5, 3, *path])[-1].softmax(-1)
            for path, p in _paths(model, place)
        )
        counts = torch.bincount(torch.tensor([one.answer[place] for one in answers]), minlength=7)
        assert float(probs.min()) * count > 5
        chi_square = float(((counts - count * probs) ** 2 / (count * probs)).sum())
        assert abs(chi_square - 6) < 4 * math.sqrt(2 * 6)


def _paths(model: Transformer, length: int) -> list[tuple[tuple[int, ...], float]]:
    """All answers of so many tokens with their probabilities."""
    paths: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(length):
        paths = [
            ((*path, token), p * float(q))
            for path, p in paths
            for token, q in enumerate(full_logits(model, [5, 3, *path])[-1].softmax(-1))
        ]
    return paths


# -- guesses are the module's, and are counted ----------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("pages", [60, 16], ids=["room", "preempted"])
def test_guesses_are_those_of_the_module_without_a_cache(most, pages):
    """Through chunks, batches, accepted and rejected drafts, preemption and found beginnings."""
    model = by_heart()
    engine = engine_of(model, "mtp", most, pages=pages, step_tokens=13)
    prompts = [TEXT[start : start + 9 + start % 5] for start in (0, 33, 50, 71)]
    prompts += [TEXT[20:30] + TEXT[5:8], TEXT[33:49]]
    answers = submit(engine, prompts)
    compared = right = 0
    for _ in range(400):
        engine.step()
        check_pages(engine)
        for one in answers:
            if one.drafts:
                expected = guesses(model, one.tokens, len(one.drafts))
                compared += 1
                right += one.drafts == expected
                room = min(most, one.room - one.answered - 1)
                assert len(one.drafts) <= room
    assert engine.idle
    assert (engine.statistics.preempted > 0) == (pages == 16)
    assert compared > 20
    # At the end of a found page stands what its first reader's next token was: rarely another.
    assert right >= compared - (pages == 16)


def test_a_module_that_knows_the_text_saves_half_of_the_passes():
    model = by_heart()
    engine = engine_of(model, "mtp", most=1)
    answers = submit(engine, [TEXT[20:40]], Sampling(max_tokens=60))
    run(engine)
    (answer,) = answers
    check_alone(model, answers)
    tokens, place, drafted, accepted = answer.tokens, 21, 0, 0
    while place < 79:  # the last token is not worth a draft
        right = guesses(model, tokens[:place], 1)[0] == tokens[place]
        drafted, accepted, place = drafted + 1, accepted + right, place + 1 + right
    statistics = engine.statistics
    assert (statistics.drafted, statistics.accepted) == (drafted, accepted)
    assert statistics.acceptance > 0.9
    assert statistics.passes == 1 + 59 - accepted
    assert statistics.tokens == 20 + 59 - accepted + drafted
    assert statistics.drawn == 60


def test_repeated_text_is_copied_from_the_prompt():
    model = by_heart()
    engine = engine_of(model, "ngram", most=4)
    answers = submit(engine, [TEXT[20:36] + TEXT[20:24]], Sampling(max_tokens=12))
    run(engine)
    check_alone(model, answers)
    assert list(answers[0].answer) == TEXT[24:36]
    assert engine.statistics.acceptance > 0.8
    assert engine.statistics.passes <= 5


def test_who_missed_passes_does_not_guess_from_garbage():
    """A drafter that comes late leaves alone what it has not read, and serves what is new."""
    model = by_heart()
    engine = engine_of(model)
    drafter, engine.drafter = engine.drafter, NoDrafter()
    (late,) = submit(engine, [TEXT[:9]])
    for _ in range(3):
        engine.step()
    engine.drafter = drafter
    (new,) = submit(engine, [TEXT[40:50]])
    seen = set()
    while not engine.idle:
        engine.step()
        seen |= {one for one in (late, new) if one.drafts}
    assert seen == {new}
    check_alone(model, [late, new])


@pytest.mark.parametrize("kind", ["mtp", "ngram"])
def test_drafts_end_with_the_room_and_the_context(kind):
    model = tiny_model(num_nextn_predict_layers=1, max_position_embeddings=24)
    engine = engine_of(model, kind, most=9, pages=6)
    asked = [((1, 2, 3) * 3, 50), ((4,) * 22, 50), ((4,) * 23, 9), ((5, 6) * 4, 3), ((7, 7), 1)]
    answers = [submit(engine, [prompt], Sampling(max_tokens=most))[0] for prompt, most in asked]
    while not engine.idle:
        engine.step()
        check_pages(engine)
        for one in answers:
            assert len(one.drafts) <= max(0, one.room - one.answered - 1)
            assert len(one.tokens) + len(one.drafts) <= 24
    check_alone(model, answers)
    assert [one.answered for one in answers] == [15, 2, 1, 3, 1]


def test_a_forced_token_is_not_guessed_away():
    model = by_heart()
    engine = engine_of(model)
    (one,) = submit(engine, [TEXT[:10]])

    def force(sequence: Sequence, _) -> None:
        if sequence.answered == 5:
            sequence.forced, sequence.drafts = [50, 51, 52], []

    one.on_token = force
    run(engine)
    forced = {5: 50, 6: 51, 7: 52}
    assert list(one.answer[5:8]) == [50, 51, 52]
    assert list(one.answer) == alone(model, one.request, 0, forced).tokens


# -- n-grams --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=200)
def test_an_ngram_is_followed_as_it_was_last_time(tokens, longest, most):
    index = NgramIndex(longest)
    for count in range(1, len(tokens) + 1):  # as a text grows
        place = index.find(tokens[:count])
    followed = [] if place is None else tokens[place : place + most]
    assert NgramIndex(longest).find(tokens) == place
    for size in range(longest, 0, -1):
        tail = tokens[-size:]
        ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tail]
        if ends and len(tail) == size:
            assert followed == tokens[ends[-1] : ends[-1] + most]
            return
    assert followed == []


def test_lengths_are_tried_although_there_is_nothing_to_guess(monkeypatch):
    """What was asked for is what is judged: else it would be asked for again and again."""
    monkeypatch.setattr(NgramDrafter, "_follow", lambda *_: [])
    engine = Engine(
        HashModel(context=200), Limits(cache_bytes=1 << 20, page_tokens=4), NgramDrafter(most=2)
    )
    submit(engine, [(i, 3) for i in range(3)], Sampling(max_tokens=40))
    run(engine)
    (records,) = (r for r in engine.drafter.pace.records.values() if sum(x.passes for x in r) > 9)
    assert all(record.passes >= TRIALS for record in records)


# -- pace -----------------------------------------------------------------------------------------


def settle(pace: Pace, tokens: list[float], seconds: list[float], guessing: float = 0.0) -> None:
    """Let it try, where drafts of length i bring ``tokens[i]`` in ``seconds[i]``."""
    for _ in range(20 * TRIALS):
        length = pace.length(2)
        pace.learn(2, length, tokens[length], seconds[length], guessing)


@pytest.mark.parametrize(
    ("tokens", "seconds", "guessing", "best"),
    [
        ([1, 1.8, 2.5, 2.6], [1, 1.1, 1.2, 1.3], 0.0, 2),
        ([1, 1.9, 2.7, 3.5], [1, 1.0, 1.0, 1.0], 0.0, 3),
        ([1, 1.1, 1.1, 1.1], [1, 1.3, 1.6, 1.9], 0.0, 0),
        ([1, 1.5, 1.6, 1.6], [1, 1.1, 1.2, 1.3], 0.6, 0),  # right, but guessing costs too much
        ([1, 1.5, 1.6, 1.6], [1, 1.1, 1.2, 1.3], 0.1, 1),
    ],
)
def test_the_pace_is_the_length_that_pays(tokens, seconds, guessing, best):
    pace = Pace(3)
    settle(pace, tokens, seconds, guessing)
    assert pace.best(2) == best
    chosen = [pace.length(2) for _ in range(AGAIN)]
    assert chosen.count(best) >= AGAIN - 1
    assert pace.idle(2) == (best == 0)


def test_the_pace_tries_every_length_first_and_others_again():
    pace = Pace(3)
    tried = []
    for _ in range(4 * TRIALS):
        tried.append(pace.length(1))
        pace.learn(1, tried[-1], 1.0 + tried[-1], 1.0, 0.0)
    assert sorted(tried) == sorted([0, 1, 2, 3] * TRIALS)
    later = []
    for _ in range(5 * AGAIN):
        later.append(pace.length(1))
        pace.learn(1, later[-1], 1.0 + later[-1], 1.0, 0.0)
    assert set(later) == {0, 1, 2, 3}
    assert later.count(3) >= 5 * AGAIN - 6


def test_the_pace_notices_that_times_change():
    pace = Pace(1)
    settle(pace, [1, 1.9], [1, 1.1])
    assert pace.best(2) == 1
    for _ in range(30):
        pace.learn(2, 1, 1.0, 1.1, 0.0)  # the text has become harder
    assert pace.best(2) == 0


def test_batches_of_other_sizes_are_judged_apart():
    pace = Pace(1)
    for _ in range(9):
        pace.learn(1, 0, 1, 1.0, 0)
        pace.learn(1, 1, 2, 1.1, 0)
        pace.learn(16, 0, 1, 1.0, 0)
        pace.learn(16, 1, 2, 3.0, 0)
    assert (pace.best(1), pace.best(16), pace.best(31)) == (1, 0, 0)


def test_the_pace_bears_clocks_that_stand_still():
    pace = Pace(2)
    assert not pace.idle(1)
    for _ in range(50):
        length = pace.length(1)
        pace.learn(1, length, 1.0 + length, 0.0, 0.0)
    assert pace.best(1) == 2
    assert Pace(0).length(5) == 0


# -- which drafter --------------------------------------------------------------------------------


def test_a_model_drafts_with_what_it_has():
    plain, with_module = tiny_model(), tiny_model(num_nextn_predict_layers=1)
    kinds = {
        ("auto", plain): NoDrafter,
        ("auto", with_module): MTPDrafter,
        ("mtp", with_module): MTPDrafter,
        ("ngram", plain): NgramDrafter,
        ("none", with_module): NoDrafter,
    }
    for (draft, model), kind in kinds.items():
        assert type(LanguageModel(model, None, draft=draft).engine.drafter) is kind
    with pytest.raises(ValueError, match="no MTP module"):
        _ = LanguageModel(plain, None, draft="mtp").engine


def test_two_modules_first_one_drafts():
    model = tiny_model(num_nextn_predict_layers=2)
    engine = engine_of(model)
    answers = submit(engine)
    run(engine)
    check_alone(model, answers)
    assert engine.statistics.drafted > 30


def test_a_drafter_that_does_not_pay_looks_away():
    """It is not even asked to keep up, and is tried again after its rest."""
    model = tiny_model()
    engine = Engine(model, Limits(cache_bytes=1 << 20))
    drafter = NgramDrafter(most=1)
    drafter.rests = True
    engine.drafter = drafter
    for size in (1, 2):
        for length, tokens in ((0, 1.0), (1, 1.1)):
            for _ in range(4 * TRIALS):
                drafter.pace.learn(size, length, tokens, 1.0 + length, 0.5)
    engine.submit(Request((1, 2, 3), Sampling(max_tokens=100)))
    for _ in range(3):
        engine.step()
    assert drafter.resting == REST - 2
    asked = []
    drafter.guess = lambda done, sequences, length: asked.append(length)
    for _ in range(20):
        engine.step()
    assert not asked
    drafter.resting = 1
    engine.step()
    engine.step()
    assert len(asked) == 1
