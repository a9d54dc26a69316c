"""Divergences between two next-token distributions, a chunk at a time, against all at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qiusuo.kernels import distribution_match as module
from qiusuo.kernels.distribution_match import (
    Teacher,
    TeacherRows,
    TeacherStates,
    TeacherTop,
    distribution_match,
    distribution_match_reference,
)
from tests.kernels.gradients import assert_all_close, normal, value_and_grads
from tests.kernels.sizes import Sizes

# M tokens, D hidden, W vocabulary.
WORDS = 13
KINDS = [
    ("rows", "forward"),
    ("rows", "reverse"),
    ("rows", "jsd"),
    ("states", "forward"),
    ("states", "reverse"),
    ("states", "jsd"),
    ("top", "forward"),
]


def problem(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and weights, some of them zero."""
    weights = normal(tokens, seed=seed + 2).abs()
    weights[torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.3] = 0
    return normal(tokens, 6, seed=seed), normal(WORDS, 6, seed=seed + 1), weights


def states(tokens: int, seed: int = 0, words: int = WORDS) -> TeacherStates:
    return TeacherStates(normal(tokens, 4, seed=seed + 7), normal(words, 4, seed=seed + 8))


def teacher_of(kind: str, tokens: int, seed: int = 0, k: int = 4) -> Teacher:
    hidden = states(tokens, seed)
    rows = (hidden.x_ME @ hidden.head_WE.T).log_softmax(-1)
    if kind == "states":
        return hidden
    if kind == "rows":
        return TeacherRows(rows)
    return TeacherTop(rows.topk(k).indices, rows.topk(k).values)


def through(kernel, teacher, weights, divergence, share=0.3):
    return lambda x, head: kernel(x, head, teacher, weights, divergence, share)[0]


@given(st.integers(1, 20), st.integers(1, 7), st.sampled_from(KINDS), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_at_every_chunk_boundary(tokens, rows, kind, seed):
    x, head, weights = problem(tokens, seed)
    teacher = teacher_of(kind[0], tokens, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", rows * WORDS + 5)
        chunked = value_and_grads(through(distribution_match, teacher, weights, kind[1]), x, head)
        each = distribution_match(x, head, teacher, weights, kind[1], 0.3)[1]
    reference = distribution_match_reference
    whole = value_and_grads(through(reference, teacher, weights, kind[1]), x, head)
    assert_all_close(chunked, whole, 2e-5)
    assert_all_close([each], [reference(x, head, teacher, weights, kind[1], 0.3)[1]], 1e-5)


@pytest.mark.parametrize(("kind", "divergence"), KINDS)
def test_gradients_are_differences_of_values(kind, divergence):
    x, head, weights = (one.double() for one in problem(5))
    teacher = type(teacher_of(kind, 5))(
        *(one.double() if one.is_floating_point() else one for one in teacher_of(kind, 5))
    )
    inputs = (x.requires_grad_(), head.requires_grad_())
    assert torch.autograd.gradcheck(
        through(distribution_match, teacher, weights, divergence), inputs
    )


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_values_are_those_of_torch_distributions(divergence):
    x, head, _ = problem(6)
    teacher = teacher_of("rows", 6)
    q = torch.distributions.Categorical(logits=(x @ head.T).double())
    p = torch.distributions.Categorical(logits=teacher.logprobs_MW.double())
    if divergence == "forward":
        expected = torch.distributions.kl_divergence(p, q)
    elif divergence == "reverse":
        expected = torch.distributions.kl_divergence(q, p)
    else:
        m = torch.distributions.Categorical(probs=0.3 * p.probs + 0.7 * q.probs)
        expected = 0.3 * torch.distributions.kl_divergence(p, m)
        expected = expected + 0.7 * torch.distributions.kl_divergence(q, m)
    each = distribution_match(x, head, teacher, torch.ones(6), divergence, 0.3)[1]
    torch.testing.assert_close(each.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "divergence"), KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind, divergence):
    hidden = states(8)
    teacher = hidden if kind == "states" else teacher_of(kind, 8)
    run = through(distribution_match, teacher, torch.ones(8), divergence)
    value, *grads = value_and_grads(run, hidden.x_ME, hidden.head_WE)
    assert abs(float(value)) < 1e-5
    assert all(float(one.abs().max()) < 1e-5 for one in grads)


def test_top_of_everything_is_the_whole_and_of_less_is_less():
    x, head, weights = problem(9)
    whole = distribution_match(x, head, teacher_of("rows", 9), weights)[0]
    values = [
        float(distribution_match(x, head, teacher_of("top", 9, k=k), weights)[0])
        for k in (1, 4, 8, WORDS)
    ]
    assert values == sorted(values)  # a finer partition tells more of the difference
    assert values[-1] == pytest.approx(float(whole), rel=1e-5)
    assert values[0] < 0.8 * values[-1]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_zeros_of_the_teacher_and_a_sure_student_stay_finite(divergence):
    x, head, _ = problem(6)
    rows = teacher_of("rows", 6).logprobs_MW.clone()
    rows[:, 3:] = float("-inf")
    teacher = TeacherRows(rows.half())
    run = through(distribution_match, teacher, torch.ones(6), divergence)
    for value in value_and_grads(run, 60 * x, head):
        assert value.isfinite().all()
    top = TeacherTop(torch.tensor([[0, 1]] * 6), torch.tensor([[0.0, float("-inf")]] * 6))
    run = through(distribution_match, top, torch.ones(6), "forward")
    for value in value_and_grads(run, 60 * x, head):
        assert value.isfinite().all()


def test_tokens_without_weight_have_no_gradient_and_do_not_matter():
    x, head, weights = problem(12)
    off = weights == 0
    assert off.any()
    teacher = teacher_of("rows", 12)
    teacher.logprobs_MW[off] = float("nan")
    run = through(distribution_match, teacher, weights, "reverse")
    value, grad_x, grad_head = value_and_grads(run, x, head)
    assert value.isfinite()
    assert grad_head.isfinite().all()
    assert not grad_x[off].any()


def test_what_does_not_fit_is_refused():
    x, head, weights = problem(4)
    with pytest.raises(ValueError, match="top-k tells the forward"):
        distribution_match(x, head, teacher_of("top", 4), weights, "reverse")
    with pytest.raises(ValueError, match="knows 12 tokens, the student 13"):
        distribution_match(x, head, states(4, words=12), weights)
    with pytest.raises(ValueError, match="of 5 tokens, the student of 4"):
        distribution_match(x, head, teacher_of("rows", 5), weights)
    with pytest.raises(ValueError, match="between 0 and 1"):
        distribution_match(x, head, teacher_of("rows", 4), weights, "jsd", 1.0)
    with pytest.raises(ValueError, match="forward, reverse or jsd"):
        distribution_match(x, head, teacher_of("rows", 4), weights, "both")


def test_under_autocast_the_products_run_in_its_type():
    x, head, weights = problem(40)
    teacher = states(40)

    def half(x: Tensor, head: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return distribution_match(x, head, teacher, weights, "reverse")[0]

    full = value_and_grads(
        through(distribution_match_reference, teacher, weights, "reverse"), x, head
    )
    assert_all_close(value_and_grads(half, x, head), full, 0.05)


@pytest.mark.parametrize("kind", ["states", "top"])
def test_the_logits_of_all_tokens_never_exist(monkeypatch, kind):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 200)
    x, head, weights = problem(300)
    teacher = teacher_of(kind, 300)
    with Sizes() as seen:
        distribution_match(x.requires_grad_(), head.requires_grad_(), teacher, weights)[
            0
        ].backward()
    assert seen.largest <= 300 * 6
