"""Generation against full passes without any cache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.engine import generate as room
from qiusuo.engine.generate import Generated, generate
from qiusuo.engine.sampling import Sampling
from qiusuo.model.transformer import Transformer
from tests.model.shapes import VARIANTS, tiny_model

NONE: frozenset[int] = frozenset()
PROMPTS = [[5, 3, 88, 17, 2], [9], [4, 4, 4, 61, 30, 12, 7, 7, 1, 90, 41], [96, 0], [9, 9]]


@torch.no_grad()
def full_logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([tokens])).x_BTD)[0]


def greedy_without_cache(model: Transformer, prompt: list[int], tokens: int) -> list[int]:
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(full_logits(model, text)[-1].argmax()))
    return text[len(prompt) :]


def token_ids(answers: list[Generated]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def assert_logprobs(model: Transformer, prompt: list[int], answer: Generated) -> None:
    """Those of the model itself, from one pass over all that was written."""
    logprobs = full_logits(model, prompt + answer.token_ids).log_softmax(-1)
    expected = [
        float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer.token_ids)
    ]
    assert answer.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_greedy_is_the_argmax_of_full_passes(changes):
    model = tiny_model(**changes)
    answers = generate(model, PROMPTS, Sampling(max_tokens=12), NONE)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.token_ids == greedy_without_cache(model, prompt, 12)
        assert answer.finish_reason == "length"
        assert_logprobs(model, prompt, answer)


@given(
    st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(1, 8),
    st.frozensets(st.integers(0, 96), max_size=20),
)
@settings(max_examples=15)
def test_each_prompt_is_answered_as_if_alone(prompts, max_tokens, stop_ids):
    model = tiny_model(num_hidden_layers=2)
    sampling = Sampling(max_tokens=max_tokens)
    together = generate(model, prompts, sampling, stop_ids)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = generate(model, [prompt], sampling, stop_ids)
        assert answer.token_ids == alone.token_ids
        assert answer.finish_reason == alone.finish_reason
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_stops_at_an_end_token_and_keeps_it():
    model = tiny_model()
    free = greedy_without_cache(model, PROMPTS[0], 12)
    end = free[5]
    first = free.index(end)
    (answer,) = generate(model, [PROMPTS[0]], Sampling(max_tokens=12), frozenset([end]))
    assert answer.token_ids == free[: first + 1]
    assert answer.finish_reason == "stop"
    assert len(answer.logprobs) == first + 1


def test_rows_leave_the_batch_at_different_times():
    model = tiny_model()
    free = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    stops = frozenset([free[0][3], free[2][7], free[4][0]])
    answers = generate(model, PROMPTS, Sampling(max_tokens=12), stops)
    for row, answer in zip(free, answers, strict=True):
        ends = [i for i, token in enumerate(row) if token in stops]
        assert answer.token_ids == (row[: ends[0] + 1] if ends else row)
        assert answer.finish_reason == ("stop" if ends else "length")
    assert len({len(answer.token_ids) for answer in answers}) > 2  # the case was as meant


def test_end_token_at_the_last_place_is_a_stop():
    model = tiny_model()
    free = greedy_without_cache(model, PROMPTS[0], 1)
    (answer,) = generate(model, [PROMPTS[0]], Sampling(max_tokens=1), frozenset(free))
    assert (answer.token_ids, answer.finish_reason) == (free, "stop")


def test_context_ends_the_answer():
    """Rows of one batch reach the limit at their own lengths, and use it to the last place."""
    model = tiny_model(max_position_embeddings=12)
    answers = generate(model, PROMPTS, Sampling(max_tokens=50), NONE)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(prompt) + len(answer.token_ids) == 12
        assert answer.finish_reason == "length"
        assert answer.token_ids == greedy_without_cache(model, prompt, 12 - len(prompt))


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 12], "prompt 0 has 12 tokens; the context holds 12 and one must be free"),
        ([[1], [2], [1] * 13], "prompt 2 has 13 tokens; the context holds 12"),
        ([[96, 97]], r"prompt 0: token id 97 is outside 0\.\.96"),
        ([[-1]], "token id -1"),
    ],
)
def test_refused_prompts_are_named_before_anything_is_run(prompts, words, monkeypatch):
    model = tiny_model(max_position_embeddings=12)
    monkeypatch.setattr(Transformer, "forward", None)
    with pytest.raises(ValueError, match=words):
        generate(model, prompts, Sampling(), NONE)


def test_no_prompts_no_answers():
    assert generate(tiny_model(), [], Sampling(), NONE) == []


# -- sampling -----------------------------------------------------------------------------------

WARM = Sampling(max_tokens=10, temperature=1.2, top_k=40, top_p=0.95, seed=7)


def test_same_seed_same_draws_and_another_seed_others():
    model = tiny_model()
    first = token_ids(generate(model, PROMPTS, WARM, NONE))
    assert token_ids(generate(model, PROMPTS, WARM, NONE)) == first
    other = Sampling(**{**vars(WARM), "seed": 8})
    assert token_ids(generate(model, PROMPTS, other, NONE)) != first


def test_a_row_draws_the_same_alone_and_in_company():
    model = tiny_model()
    together = generate(model, PROMPTS, WARM, NONE)
    (alone,) = generate(model, PROMPTS[:1], WARM, NONE)
    assert alone.token_ids == together[0].token_ids
    others = [PROMPTS[0], [1, 2, 3, 4], [80] * 20]
    assert generate(model, others, WARM, NONE)[0].token_ids == alone.token_ids


def test_a_neighbour_that_stops_early_takes_no_draw_away():
    model = tiny_model()
    free = token_ids(generate(model, PROMPTS, WARM, NONE))
    stop = free[0][1]
    stopped = generate(model, PROMPTS, WARM, frozenset([stop]))
    assert len(stopped[0].token_ids) <= 2
    for row, answer in zip(free, stopped, strict=True):
        assert answer.token_ids == (row[: row.index(stop) + 1] if stop in row else row)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_more_prompts_than_fit_in_a_batch(rows, monkeypatch):
    model = tiny_model()
    whole = {s: token_ids(generate(model, PROMPTS, s, NONE)) for s in (WARM, Sampling(10))}
    sizes = []
    forward = Transformer.forward

    def counted(self, tokens_BT, *args, **kwargs):
        sizes.append(len(tokens_BT))
        return forward(self, tokens_BT, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", counted)
    monkeypatch.setattr(room, "MAX_ROWS", rows)
    for sampling, expected in whole.items():
        assert token_ids(generate(model, PROMPTS, sampling, NONE)) == expected
    assert max(sizes) == rows


def test_equal_prompts_draw_apart():
    """One prompt many times is many samples: each row's numbers are its own, at every step."""
    answers = token_ids(generate(tiny_model(), [[5]] * 20, WARM, NONE))
    assert len(set(map(tuple, answers))) == 20


def test_logprobs_are_the_models_own_whatever_is_filtered():
    model = tiny_model()
    for prompt, answer in zip(PROMPTS, generate(model, PROMPTS, WARM, NONE), strict=True):
        assert_logprobs(model, prompt, answer)


@pytest.mark.parametrize("step", [0, 1])
def test_tokens_of_many_rows_follow_the_models_probabilities(step, monkeypatch):
    """The numbers that rows and steps draw are independent enough for a chi-square test."""
    monkeypatch.setattr(room, "MAX_ROWS", 4000)
    model = tiny_model(num_hidden_layers=1, first_k_dense_replace=1, initializer_range=0.05)
    sampling = Sampling(max_tokens=step + 1, temperature=1.0, seed=3)
    answers = token_ids(generate(model, [[5, 7]] * 4000, sampling, NONE))
    first = full_logits(model, [5, 7])[-1].softmax(-1)
    if step == 0:
        expected = first
    else:
        after = [full_logits(model, [5, 7, token])[-1].softmax(-1) for token in range(97)]
        expected = first @ torch.stack(after)
    counts = torch.bincount(torch.tensor([answer[step] for answer in answers]), minlength=97)
    assert float(expected.min()) * 4000 > 5
    chi_square = float(((counts - 4000 * expected) ** 2 / (4000 * expected)).sum())
    assert abs(chi_square - 96) < 3 * math.sqrt(2 * 96)  # neither too far nor too good
