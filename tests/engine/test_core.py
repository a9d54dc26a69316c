"""Answers of the engine against full passes without any cache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.engine.core import Engine
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import Request, Sequence
from qiusuo.engine.sampling import Sampling
from qiusuo.model.transformer import Transformer
from tests.engine.oracle import alone, assert_as_expected, full_logits, greedy, run
from tests.model.shapes import FAMILIES, tiny_model

NONE: frozenset[int] = frozenset()
PROMPTS = [[5, 3, 88, 17, 2], [9], [4, 4, 4, 61, 30, 12, 7, 7, 1, 90, 41], [96, 0], [9, 9]]
WARM = Sampling(max_tokens=10, temperature=1.2, top_k=40, top_p=0.95, seed=7)


def generate(
    model: Transformer, prompts, sampling, end_ids=NONE, limits: Limits | None = None
) -> list[Sequence]:
    """Each prompt's answer; draws are told apart by the prompt's number."""
    engine = Engine(model, limits or Limits(page_tokens=4))
    answers = [
        engine.submit(Request(tuple(prompt), sampling, frozenset(end_ids), first_choice=row))[0]
        for row, prompt in enumerate(prompts)
    ]
    run(engine)
    return answers


def token_ids(answers: list[Sequence]) -> list[list[int]]:
    return [list(answer.answer) for answer in answers]


def assert_logprobs(model: Transformer, answer: Sequence) -> None:
    """Those of the model itself, from one pass over all that was written."""
    logprobs = full_logits(model, answer.tokens).log_softmax(-1)
    start = len(answer.request.prompt) - 1
    expected = [float(logprobs[start + i, token]) for i, token in enumerate(answer.answer)]
    assert [one.logprob for one in answer.drawn] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    "limits",
    [
        {"page_tokens": 32},
        {"page_tokens": 3, "step_tokens": 4, "max_running": 3},
        {"page_tokens": 5, "absorbed_below": 0},
        {"page_tokens": 4, "absorbed_below": 100, "step_tokens": 9},
    ],
    ids=["one-page", "small-chunks", "expanded", "absorbed"],
)
def test_greedy_is_the_argmax_of_full_passes(changes, limits):
    model = tiny_model(**changes)
    answers = generate(model, PROMPTS, Sampling(max_tokens=12), limits=Limits(**limits))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert list(answer.answer) == greedy(model, prompt, 12)
        assert answer.finish_reason == "length"
        assert_logprobs(model, answer)


@given(
    st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(1, 8),
    st.frozensets(st.integers(0, 96), max_size=20),
    st.sampled_from([0.0, 1.0]),
    st.integers(1, 9),
)
@settings(max_examples=25)
def test_each_prompt_is_answered_as_if_alone(prompts, max_tokens, end_ids, temperature, size):
    model = tiny_model(num_hidden_layers=2)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=0)
    limits = Limits(page_tokens=size, step_tokens=7, max_running=3)
    together = generate(model, prompts, sampling, end_ids, limits)
    for row, answer in enumerate(together):
        expected = alone(model, answer.request, row)
        assert_as_expected(answer, expected, exact=False)
        told = [one.logprob for one in expected.drawn]
        assert [one.logprob for one in answer.drawn] == pytest.approx(told, abs=1e-4)


# -- ends ---------------------------------------------------------------------------------------


def test_stops_at_an_end_token_and_keeps_it():
    model = tiny_model()
    free = greedy(model, PROMPTS[0], 12)
    end = free[5]
    (answer,) = generate(model, [PROMPTS[0]], Sampling(max_tokens=12), [end])
    assert list(answer.answer) == free[: free.index(end) + 1]
    assert answer.finish_reason == "stop"
    assert len(answer.drawn) == free.index(end) + 1


def test_rows_leave_the_batch_at_different_times():
    model = tiny_model()
    free = [greedy(model, prompt, 12) for prompt in PROMPTS]
    stops = frozenset([free[0][3], free[2][7], free[4][0]])
    answers = generate(model, PROMPTS, Sampling(max_tokens=12), stops)
    for row, answer in zip(free, answers, strict=True):
        ends = [i for i, token in enumerate(row) if token in stops]
        assert list(answer.answer) == (row[: ends[0] + 1] if ends else row)
        assert answer.finish_reason == ("stop" if ends else "length")
    assert len({answer.answered for answer in answers}) > 2  # the case was as meant


def test_end_token_at_the_last_place_is_a_stop():
    model = tiny_model()
    free = greedy(model, PROMPTS[0], 1)
    (answer,) = generate(model, [PROMPTS[0]], Sampling(max_tokens=1), free)
    assert (list(answer.answer), answer.finish_reason) == (free, "stop")


def test_context_ends_the_answer():
    """Rows of one batch reach the limit at their own lengths, and use it to the last place."""
    model = tiny_model(max_position_embeddings=12)
    for prompt, answer in zip(
        PROMPTS, generate(model, PROMPTS, Sampling(max_tokens=50)), strict=True
    ):
        assert len(prompt) + answer.answered == 12
        assert answer.finish_reason == "length"
        assert list(answer.answer) == greedy(model, prompt, 12 - len(prompt))


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
    lm = LanguageModel(tiny_model(max_position_embeddings=12), None)
    monkeypatch.setattr(Transformer, "forward", None)
    with pytest.raises(ValueError, match=words):
        lm.generate(prompts)
    assert lm.engine.idle


def test_no_prompts_no_answers():
    assert LanguageModel(tiny_model(), None).generate([]) == []


# -- sampling -----------------------------------------------------------------------------------


def test_same_seed_same_draws_and_another_seed_others():
    model = tiny_model()
    first = token_ids(generate(model, PROMPTS, WARM))
    assert token_ids(generate(model, PROMPTS, WARM)) == first
    other = Sampling(**{**vars(WARM), "seed": 8})
    assert token_ids(generate(model, PROMPTS, other)) != first


def test_a_row_draws_the_same_alone_and_in_company():
    model = tiny_model()
    together = token_ids(generate(model, PROMPTS, WARM))
    assert token_ids(generate(model, PROMPTS[:1], WARM)) == together[:1]
    others = [PROMPTS[0], [1, 2, 3, 4], [80] * 20]
    assert token_ids(generate(model, others, WARM))[0] == together[0]


def test_a_neighbour_that_stops_early_takes_no_draw_away():
    model = tiny_model()
    free = token_ids(generate(model, PROMPTS, WARM))
    stop = free[0][1]
    stopped = token_ids(generate(model, PROMPTS, WARM, [stop]))
    assert len(stopped[0]) <= 2
    for row, answer in zip(free, stopped, strict=True):
        assert answer == (row[: row.index(stop) + 1] if stop in row else row)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_more_prompts_than_may_run_at_once(rows, monkeypatch):
    model = tiny_model()
    whole = {s: token_ids(generate(model, PROMPTS, s)) for s in (WARM, Sampling(10))}
    sizes = []
    forward = Transformer.forward

    def counted(self, tokens_BT, positions_BT, groups):
        sizes.append(sum(group.batch for group in groups))
        return forward(self, tokens_BT, positions_BT, groups=groups)

    monkeypatch.setattr(Transformer, "forward", counted)
    limits = Limits(page_tokens=4, max_running=rows)
    for sampling, expected in whole.items():
        assert token_ids(generate(model, PROMPTS, sampling, limits=limits)) == expected
    assert max(sizes) == rows


def test_equal_prompts_draw_apart():
    """One prompt many times is many samples: each row's numbers are its own, at every step."""
    lm = LanguageModel(tiny_model(), None)
    settings = {"max_tokens": 10, "temperature": 1.2, "seed": 7}
    rows = [one.token_ids for one in lm.generate([[5]] * 20, **settings)]
    assert len(set(map(tuple, rows))) == 20
    assert [one.token_ids for one in lm.generate([[5]], n=20, **settings)] == rows
    assert [one.token_ids for one in lm.generate([[5]] * 4, n=5, **settings)] == rows


def test_logprobs_are_the_models_own_whatever_is_filtered():
    model = tiny_model()
    for answer in generate(model, PROMPTS, WARM):
        assert_logprobs(model, answer)


@pytest.mark.parametrize("step", [0, 1])
def test_tokens_of_many_rows_follow_the_models_probabilities(step):
    """The numbers that rows and steps draw are independent enough for a chi-square test."""
    model = tiny_model(
        num_hidden_layers=1, first_k_dense_replace=1, initializer_range=0.05, eos_token_id=None
    )
    lm = LanguageModel(model, None)
    told = lm.generate([[5, 7]], n=4000, max_tokens=step + 1, temperature=1.0, seed=3)
    answers = [one.token_ids for one in told]
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


@pytest.mark.parametrize("name", ["v3", "v3-yarn", "v2-lite", "qwen2"])
@torch.no_grad()
def test_bfloat16_log_probabilities_are_those_of_the_training_forward(name):
    """Bound: 0.1 nat at the worst of many tokens, 0.02 on average (bf16 rounds to 1 part in 256,
    and a rounded router score may choose another expert). Training computes this very pass."""
    model = tiny_model(**(FAMILIES[name] | {"initializer_range": 0.05})).bfloat16()
    for router in model.routers().values():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias = router.e_score_correction_bias.float()
    prompts = [[(7 * i + j) % 97 for i in range(5 + 9 * j)] for j in range(5)]
    sampling = dict(max_tokens=20, temperature=1.0, seed=3)
    differences = []
    for prompt, answer in zip(
        prompts, LanguageModel(model, None).generate(prompts, **sampling), strict=True
    ):
        tokens = prompt + answer.token_ids
        logprobs_TW = model.logits(model(torch.tensor([tokens])).x_BTD)[0].log_softmax(-1)
        for place, (token, told) in enumerate(
            zip(answer.token_ids, answer.logprobs, strict=True), start=len(prompt) - 1
        ):
            differences.append(abs(float(logprobs_TW[place, token]) - told))
    assert max(differences) < 0.1
    assert sum(differences) / len(differences) < 0.02


@pytest.mark.parametrize("absorbed_below", [0, 100], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_prompts_of_one_length_are_read_side_by_side(changes, absorbed_below, monkeypatch):
    model = tiny_model(**changes)
    prompts = [tuple((7 * i + row) % 97 for i in range(5 + row % 2)) for row in range(6)]
    sampling = Sampling(max_tokens=6)
    engine = Engine(model, Limits(page_tokens=4, absorbed_below=absorbed_below))
    answers = [engine.submit(Request(prompt, sampling, n=2))[0] for prompt in prompts]
    read = []
    group = engine.cache.group
    monkeypatch.setattr(
        engine.cache, "group", lambda *a: read.append((len(a[0]), a[1])) or group(*a)
    )
    engine.step()
    assert read == [(3, 5), (3, 6)]
    run(engine)
    for answer in answers:
        assert_logprobs(model, answer)
