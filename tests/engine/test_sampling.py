"""Draws against exact probabilities, and the edges of top-k and top-p."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.engine.sampling import Sampling, choose

LOGITS = [1.3, -0.4, 2.1, 0.0, 0.9, -3.0, 1.2, 0.5]
DRAWS = 20_000


def exact(logits: list[float], sampling: Sampling) -> list[float]:
    """Temperature, then the k likeliest, then the fewest whose mass reaches p, then rescaled."""
    weights = [math.exp(logit / sampling.temperature) for logit in logits]
    probs = [w / sum(weights) for w in weights]
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept, mass = [], 0.0
    for i in order[: sampling.top_k]:
        if mass >= sampling.top_p:
            break
        kept.append(i)
        mass += probs[i]
    return [probs[i] / mass if i in kept else 0.0 for i in range(len(probs))]


def draw(logits: list[float], sampling: Sampling, uniforms: torch.Tensor) -> torch.Tensor:
    return choose(torch.tensor(logits).expand(len(uniforms), -1), sampling, uniforms)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6),
        Sampling(temperature=2.5),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=0.6, top_p=0.95),
        Sampling(temperature=1.5, top_k=5, top_p=0.9),
        Sampling(temperature=1.5, top_k=2, top_p=0.9),
    ],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(sampling):
    uniforms = torch.rand(DRAWS, generator=torch.Generator().manual_seed(11))
    counts = torch.bincount(draw(LOGITS, sampling, uniforms), minlength=8).tolist()
    expected = exact(LOGITS, sampling)
    chi_square, freedom = 0.0, -1
    for count, probability in zip(counts, expected, strict=True):
        if probability == 0:
            assert count == 0
            continue
        chi_square += (count - DRAWS * probability) ** 2 / (DRAWS * probability)
        freedom += 1
    assert chi_square < freedom + 3 * math.sqrt(2 * freedom)  # about one in a thousand


@given(
    st.lists(st.integers(-30, 30), min_size=1, max_size=9, unique=True),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.none() | st.integers(1, 12),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200)
def test_a_draw_falls_where_its_number_points(tenths, temperature, top_k, top_p, uniform):
    """Walk the kept tokens from the likeliest down until their mass passes the number."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = [t / 10 for t in tenths]
    probs = exact(logits, sampling)
    token = int(draw(logits, sampling, torch.tensor([uniform], dtype=torch.float64))[0])
    assert probs[token] > 0
    above = sum(p for p in probs if p > probs[token] + 1e-9)
    assert above - 1e-5 <= uniform <= above + probs[token] + 1e-5


def test_zero_temperature_is_the_likeliest_whatever_the_number():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(2))
    for uniform in (0.0, 0.5, 0.999):
        chosen = choose(logits, Sampling(temperature=0.0), torch.full((50,), uniform))
        assert torch.equal(chosen, logits.argmax(-1))


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}, {"temperature": 5e-324}],
    ids=str,
)
def test_narrowest_settings_are_the_likeliest(narrow):
    uniforms = torch.linspace(0, 0.9999, 40)
    sampling = Sampling(**{"temperature": 1.0, **narrow})
    assert set(draw(LOGITS, sampling, uniforms).tolist()) == {2}
    assert set(draw([-800.0, 900.0, 200.0], sampling, uniforms).tolist()) == {1}


def test_mass_exactly_at_top_p_takes_no_more():
    quarters = [math.log(0.5), math.log(0.25), math.log(0.25)]
    logits = torch.tensor(quarters).softmax(-1).log().tolist()
    uniforms = torch.linspace(0, 0.9999, 40)

    def drawn(top_p: float) -> set[int]:
        return set(draw(logits, Sampling(temperature=1.0, top_p=top_p), uniforms).tolist())

    assert torch.tensor(logits).softmax(-1)[0] == 0.5  # exactly
    assert drawn(0.5) == {0}
    assert drawn(0.501) == {0, 1}  # the first of equals
    assert drawn(0.75) == {0, 1}
    assert drawn(0.751) == {0, 1, 2}


def test_number_on_the_boundary_belongs_to_the_next_token():
    """Token i is drawn by the numbers in [mass before it, mass up to it)."""
    logits = [math.log(0.5), math.log(0.25), math.log(0.25)]
    drawn = draw(logits, Sampling(temperature=1.0), torch.tensor([0.0, 0.5, 0.75]))
    assert torch.tensor(logits).softmax(-1).tolist() == [0.5, 0.25, 0.25]  # exactly
    assert drawn.tolist() == [0, 1, 2]


def test_top_k_beyond_the_vocabulary_is_all_of_it():
    uniforms = torch.linspace(0, 0.9999, 2000)
    wide = draw([0.0, 0.0, 0.0], Sampling(temperature=1.0, top_k=99), uniforms)
    assert set(wide.tolist()) == {0, 1, 2}


def test_top_k_of_equals_keeps_the_first():
    uniforms = torch.linspace(0, 0.9999, 200)
    assert set(draw([0.0] * 4, Sampling(temperature=1.0, top_k=2), uniforms).tolist()) == {0, 1}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1 - 2**-53])
def test_numbers_at_the_ends_never_draw_what_cannot_be(uniform):
    """A float64 just below one is one in float32; zero must not draw a token of no mass."""
    logits = [-math.inf, 0.3, -math.inf, 0.1, -math.inf]
    sampling = Sampling(temperature=1.0)
    chosen = draw(logits, sampling, torch.tensor([uniform], dtype=torch.float64))
    assert chosen.tolist() == [1 if uniform == 0 else 3]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature .* not -0.1"),
        ({"temperature": math.nan}, "temperature .* not nan"),
        ({"temperature": math.inf}, "temperature .* not inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 64}, "seed"),
    ],
)
def test_refused_settings(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)
