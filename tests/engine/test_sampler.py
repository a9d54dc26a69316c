"""Draws against transformers' filters, exact probabilities, and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qiusuo.engine import sampler
from qiusuo.engine.candidates import candidates, place_of
from qiusuo.engine.philox import uniform
from qiusuo.engine.sampler import BadLogits, Drawn, Row, draw, token_logprobs
from qiusuo.engine.sampling import Sampling

LOGITS = [1.3, -0.4, 2.1, 0.0, 0.9, -3.0, 1.2, 0.5]
DRAWS = 4000


def peers_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities after transformers' warpers, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    no_history = torch.zeros((1, 1), dtype=torch.long)
    warped = warpers(no_history, torch.from_numpy(logits)[None].clone())
    return warped.softmax(-1)[0].numpy()


def our_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    ids, weights = candidates(logits, sampling)
    assert (np.diff(ids) > 0).all()
    probs = np.zeros(len(logits))
    probs[ids] = weights / weights.sum()
    return probs


def tokens(results: list[Drawn | BadLogits]) -> list[int]:
    assert all(isinstance(result, Drawn) for result in results), results
    return [result.token for result in results]


def row(sampling: Sampling, position: int = 0, **rest) -> Row:
    return Row(sampling, prompt=(), answer=(), position=position, **rest)


def draw_one(logits, sampling: Sampling, position: int = 0, **rest) -> Drawn | BadLogits:
    return draw(torch.tensor([logits]), [row(sampling, position, **rest)])[0]


FILTERS = [
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 2000},
    {"top_k": 99_999},
    {"top_p": 0.0371},
    {"top_p": 0.5113},
    {"top_p": 0.9517, "temperature": 0.6},
    {"top_p": 0.99913, "temperature": 2.0},
    {"min_p": 0.0513},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8117, "min_p": 0.1013, "temperature": 1.3},
    {"top_k": 3000, "top_p": 0.9713},
]


@pytest.mark.parametrize("width", [5, 700, 12_000])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_as_in_transformers(width, filters):
    """Flat rows too, whose nucleus is most of the vocabulary."""
    sampling = Sampling(**{"temperature": 1.0, **filters})
    for spread in (0.3, 3.0):
        logits = np.random.default_rng(width).standard_normal(width) * spread
        ours, theirs = our_distribution(logits, sampling), peers_distribution(logits, sampling)
        assert np.array_equal(ours > 0, theirs > 0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.none() | st.integers(1, 9),
    st.sampled_from([0.1137, 0.5219, 0.9131, 1.0]),
    st.sampled_from([0.0, 0.1719, 0.6137]),
)
@settings(max_examples=300)
def test_filters_on_ties(values, top_k, top_p, min_p):
    """The same probabilities as transformers; of equals at the nucleus's edge (it leaves open
    which) the lower ids."""
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=0)
    logits = np.array(values, dtype=np.float64)
    ours, theirs = our_distribution(logits, sampling), peers_distribution(logits, sampling)
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-9, atol=1e-15)
    least = logits[ours > 0].min()
    assert (ours[logits > least] > 0).all()
    at_edge = ours[logits == least] > 0
    assert at_edge[: at_edge.sum()].all()


def test_masked_tokens_are_never_candidates_of_weight():
    logits = np.array([-math.inf, 1.0, -math.inf, 0.5], dtype=np.float32)
    for filters in FILTERS:
        probs = our_distribution(logits, Sampling(**{"temperature": 1.0, **filters}))
        assert probs[0] == probs[2] == 0


def test_mass_exactly_at_top_p_takes_no_more():
    logits = np.log2([0.5, 0.25, 0.25]) * math.log(2)

    def kept(top_p: float) -> list[int]:
        return candidates(logits, Sampling(temperature=1.0, top_p=top_p, seed=0))[0].tolist()

    assert np.exp(logits - logits.max()).tolist() == [1, 0.5, 0.5]  # exactly
    assert kept(0.5) == [0]
    assert kept(0.501) == [0, 1]
    assert kept(0.75) == [0, 1]
    assert kept(0.751) == [0, 1, 2]


# Draws


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=0),
        Sampling(temperature=2.5, seed=5),
        Sampling(temperature=1.0, top_k=3, seed=0),
        Sampling(temperature=0.6, top_p=0.95, seed=0),
        Sampling(temperature=1.5, top_k=5, top_p=0.9, min_p=0.2, seed=6),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_probabilities(sampling):
    logits = torch.tensor(LOGITS).expand(DRAWS, -1)
    drawn = tokens(draw(logits, [row(sampling, position) for position in range(DRAWS)]))
    counts = np.bincount(drawn, minlength=len(LOGITS))
    expected = peers_distribution(np.array(LOGITS), sampling) * DRAWS
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 3 * math.sqrt(2 * freedom)  # about one in a thousand


@pytest.mark.parametrize("width", [1, 255, 256, 257, 3000])
def test_a_draw_is_where_the_running_mass_passes_its_number(width):
    logits = torch.randn(width, generator=torch.Generator().manual_seed(width)) * 2
    sampling = Sampling(temperature=1.0, seed=9)
    mass = logits.double().softmax(-1).cumsum(-1).numpy()
    drawn = tokens(draw(logits.expand(300, -1), [row(sampling, i) for i in range(300)]))
    for position, token in enumerate(drawn):
        number = uniform(9, 0, position)
        before = mass[token - 1] if token else 0.0
        assert before - 1e-6 <= number <= mass[token] + 1e-6


def philox(key: tuple[int, int], counter: int) -> int:
    """The first 64 bits of Philox4x64-10 (Salmon et al. 2011), as in Random123."""
    mask = (1 << 64) - 1
    a, b, c, d = counter, 0, 0, 0
    k, l = key  # noqa: E741
    for _ in range(10):
        first, second = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = (second >> 64) ^ b ^ k, second & mask, (first >> 64) ^ d ^ l, first & mask
        k, l = (k + 0x9E3779B97F4A7C15) & mask, (l + 0xBB67AE8584CAA73B) & mask  # noqa: E741
    return a


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32), st.integers(0, 2**40))
@settings(max_examples=50)
def test_the_number_is_philox_of_seed_choice_and_position(seed, choice, position):
    # numpy counts on before it draws, and makes a float of the upper 53 bits.
    assert uniform(seed, choice, position) == (philox((seed, choice), position + 1) >> 11) / 2**53


def test_a_draw_depends_on_seed_choice_and_position_alone():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(60, 900, generator=generator) * 3
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 30, "repetition_penalty": 1.3},
        {"logit_bias": {3: 9.0}, "frequency_penalty": 0.5, "logprobs": 3},
    ]
    rows = [
        Row(Sampling(**kinds[i % 4], seed=i % 3), [1, 5, 5], [2, 7, i], i, choice=i % 2)
        for i in range(60)
    ]
    together = draw(logits, rows)
    for i in range(60):
        assert draw(logits[i : i + 1], [rows[i]]) == [together[i]]
    order = torch.randperm(60, generator=generator)
    assert draw(logits[order], [rows[i] for i in order]) == [together[i] for i in order]
    bold = [
        Row(Sampling(temperature=5.0, seed=0), [], [], 0, choice=choice) for choice in range(60)
    ]
    assert len(set(tokens(draw(logits[:1].expand(60, -1), bold)))) > 40
    bold = [Row(Sampling(temperature=5.0, seed=0), [], [], 0, choice=7) for _ in range(60)]
    assert len(set(tokens(draw(logits[:1].expand(60, -1), bold)))) == 1


def test_zero_temperature_is_the_first_of_the_likeliest():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(2)).round()
    drawn = tokens(draw(logits, [row(Sampling(), i) for i in range(50)]))
    assert drawn == [int((r == r.max()).nonzero()[0]) for r in logits]


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-4}, {"temperature": 5e-324}],
    ids=str,
)
def test_narrowest_settings_are_the_likeliest(narrow):
    sampling = Sampling(**{"temperature": 1.0, "seed": 0, **narrow})
    for position in range(40):
        assert draw_one(LOGITS, sampling, position).token == 2
        assert draw_one([-800.0, 900.0, 200.0], sampling, position).token == 1
        assert draw_one([-3e38, 3e38, -math.inf], sampling, position).token == 1


def test_hottest_setting_is_uniform_over_what_is_allowed():
    logits = [-math.inf, -900.0, 900.0]
    drawn = {draw_one(logits, Sampling(temperature=1e300, seed=0), i).token for i in range(40)}
    assert drawn == {1, 2}


@pytest.mark.parametrize("width", [5, 2000])
@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_numbers_at_the_ends_never_draw_what_cannot_be(width, number, monkeypatch):
    monkeypatch.setattr(sampler, "uniform", lambda *_: number)
    logits = [-math.inf] * width
    logits[1], logits[width - 2] = 0.3, 0.1
    for filters in ({}, {"top_p": 0.99}):
        drawn = draw_one(logits, Sampling(temperature=1.0, **filters, seed=0))
        assert drawn.token == (1 if number == 0 else width - 2)


@pytest.mark.parametrize("width", [6, 1000])
def test_rounding_never_leads_to_a_place_of_no_weight(width):
    """Targets a rounding error below nothing and at all of the mass."""
    weights = np.zeros(width, dtype=np.float32)
    weights[2], weights[width - 3] = 0.1, 0.7
    assert place_of(weights, -1e-17) == 2
    assert place_of(weights, float(weights.sum(dtype=np.float64))) == width - 3
    assert place_of(weights, 2.0) == width - 3


# Bias, penalties, masks


def test_repetition_penalty_as_in_transformers():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(8))
    prompt, answer = [3, 3, 17, 40], [17, 8, 8]
    for penalty in (0.5, 1.3, 4.0):
        peer = RepetitionPenaltyLogitsProcessor(penalty)
        theirs = peer(torch.tensor([prompt + answer]).expand(20, -1), logits.clone())
        rows = [Row(Sampling(repetition_penalty=penalty), prompt, answer, 3) for _ in range(20)]
        assert tokens(draw(logits, rows)) == theirs.argmax(-1).tolist()
    assert theirs.argmax(-1).tolist() != logits.argmax(-1).tolist()


def adjusted(logits: list[float], prompt=(), answer=(), **keys) -> list[float]:
    return sampler._adjusted(np.array(logits), Row(Sampling(**keys), prompt, answer, 0)).tolist()


def test_penalties_by_hand():
    logits = [1.0, 2.0, -2.0, 3.0, 0.5]
    # Presence: once, for a token of the answer; the prompt does not count.
    assert adjusted(logits, [3, 4], [1, 1, 2], presence_penalty=0.5) == [1.0, 1.5, -2.5, 3.0, 0.5]
    # Frequency: for each time.
    assert adjusted(logits, [3, 4], [1, 1, 2], frequency_penalty=0.5) == [1.0, 1.0, -2.5, 3.0, 0.5]
    both = {"presence_penalty": -1.0, "frequency_penalty": 0.25}
    assert adjusted(logits, [], [1, 1, 1, 1], **both) == [1.0, 2.0, -2.0, 3.0, 0.5]
    # Repetition: prompt and answer, once; a negative logit is multiplied.
    repeated = adjusted(logits, [3, 1], [1, 2], repetition_penalty=2.0)
    assert repeated == [1.0, 1.0, -4.0, 1.5, 0.5]
    # Bias first, then repetition, then the two others.
    everything = {"logit_bias": {1: 4.0, 4: -1.0, 999: 5.0}, "repetition_penalty": 2.0}
    result = adjusted(
        logits, [4], [1, 1], presence_penalty=0.5, frequency_penalty=1.0, **everything
    )
    assert result == [1.0, 0.5, -2.0, 3.0, -1.0]


def test_history_may_be_an_array():
    keys = {"repetition_penalty": 2.0, "presence_penalty": 0.5}
    logits, prompt, answer = [1.0, 2.0, -2.0], np.array([1, 1]), np.array([2])
    assert adjusted(logits, prompt, answer, **keys) == adjusted(logits, [1, 1], [2], **keys)


def test_a_bias_can_force_and_forbid():
    assert draw_one(LOGITS, Sampling(logit_bias={5: 100.0})).token == 5
    forbidding = Sampling(temperature=1.0, logit_bias={2: -100.0}, seed=0)
    rows = [row(forbidding, position) for position in range(3000)]
    drawn = tokens(draw(torch.tensor(LOGITS).expand(3000, -1), rows))
    assert set(drawn) == {0, 1, 3, 4, 5, 6, 7}


def test_only_allowed_tokens_are_drawn():
    allowed = torch.tensor([True, False, False, True, False, False, False, True])
    for temperature in (0.0, 3.0):
        sampling = Sampling(temperature=temperature, seed=0)
        drawn = {draw_one(LOGITS, sampling, i, allowed_W=allowed).token for i in range(100)}
        assert drawn == ({0} if temperature == 0 else {0, 3, 7})
    drawn = draw_one(LOGITS, Sampling(), allowed_W=allowed, banned=frozenset([0, 99]))
    assert drawn.token == 7
    assert draw_one(LOGITS, Sampling(), banned=frozenset([2])).token == 0


def test_a_ban_yields_where_a_constraint_allows_nothing_else():
    allowed = torch.tensor([False, True, True])
    drawn = draw_one([1.0, 2.0, 3.0], Sampling(), allowed_W=allowed, banned=frozenset([1, 2]))
    assert drawn.token == 2
    nothing = draw_one([1.0, 2.0], Sampling(), banned=frozenset([0, 1]))
    assert nothing == BadLogits("no token is allowed here: every one is masked out")


# What is told


def test_logprobs_are_the_models_own():
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(1)) * 5 + 70
    exact = logits.double().log_softmax(-1)
    sampling = Sampling(temperature=9.0, top_k=9, logit_bias={3: 2.0}, logprobs=6, seed=0)
    for i, drawn in enumerate(draw(logits, [row(sampling, i) for i in range(4)])):
        assert drawn.logprob == pytest.approx(float(exact[i, drawn.token]), abs=1e-5)
        values, ids = exact[i].topk(6)
        assert [token for token, _ in drawn.top] == ids.tolist()
        assert [p for _, p in drawn.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert draw_one(LOGITS, Sampling(logprobs=0)).top == ()


def test_logprobs_of_equals_come_in_the_order_of_ids():
    drawn = draw_one([1.0, 2.0, 1.0, 2.0, 1.0], Sampling(logprobs=4))
    assert (drawn.token, [token for token, _ in drawn.top]) == (1, [1, 3, 0, 2])
    equal = draw_one([0.0] * 3000, Sampling(logprobs=20))
    assert [token for token, _ in equal.top] == list(range(20))
    wide = draw_one([0.0, 0.0], Sampling(logprobs=20))
    assert wide.top == ((0, math.log(0.5)), (1, math.log(0.5)))


def test_token_logprobs():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(3))
    exact = logits.log_softmax(-1)
    answers = token_logprobs(logits, [4, 0, 29], top=2)
    for i, (target, answer) in enumerate(zip([4, 0, 29], answers, strict=True)):
        assert answer.token == target
        assert answer.logprob == pytest.approx(float(exact[i, target]), abs=1e-6)
        assert [token for token, _ in answer.top] == exact[i].topk(2).indices.tolist()
    logits[1, 3] = math.nan
    good, bad, _ = token_logprobs(logits, [4, 0, 29])
    assert isinstance(bad, BadLogits)
    assert good == Drawn(4, answers[0].logprob)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=0)])
def test_a_bad_row_spoils_no_other(sampling):
    logits = torch.tensor(LOGITS).repeat(5, 1)
    rows = [row(sampling, i) for i in range(5)]
    good = draw(logits, rows)
    logits[1, 4] = math.nan
    logits[2] = -math.inf
    logits[3, 0] = math.inf
    # NaN is broken even where a mask would hide it.
    rows[1].allowed_W = torch.arange(8) != 4
    drawn = draw(logits, rows)
    assert [drawn[0], drawn[4]] == [good[0], good[4]]
    assert [type(drawn[i]) for i in (1, 2, 3)] == [BadLogits] * 3
    assert "NaN" in drawn[1].reason
    assert "infinite" in drawn[3].reason


def test_half_precision_logits_and_no_rows():
    assert draw(torch.tensor([LOGITS], dtype=torch.bfloat16), [row(Sampling())])[0].token == 2
    assert draw(torch.empty(0, 8), []) == []
    before = torch.tensor([LOGITS])
    draw(before, [row(Sampling(temperature=1.0, logit_bias={0: 5.0}, seed=0))])
    assert before.tolist() == torch.tensor([LOGITS]).tolist()  # never written to
