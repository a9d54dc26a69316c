"""Who is chosen, and with what weight."""

import pytest
import torch
from torch import Tensor

from qiusuo.model.moe import Router
from tests.model.shapes import tiny_config

# M tokens, E experts, K chosen.


def router(bias: list[float] | None = None, **changes: object) -> Router:
    """Eight experts whose logits are the eight inputs: the weight is the identity."""
    made = Router(tiny_config(hidden_size=8, **changes))
    made.weight.data.copy_(torch.eye(8))
    if bias is not None:
        assert made.e_score_correction_bias is not None
        made.e_score_correction_bias.copy_(torch.tensor(bias))
    return made


def logits_for(scores: list[float]) -> Tensor:
    """The input that makes a V3 router score its experts so."""
    return torch.logit(torch.tensor([scores], dtype=torch.float64)).float()


V2 = {"model_type": "deepseek_v2"}
TWO_GROUPS = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4}


def test_negative_biases_never_let_a_dropped_group_in():
    """All biased scores are below zero: masking the other group with 0 would choose from it."""
    scores = [0.4, 0.3, 0.2, 0.1, 0.35, 0.15, 0.12, 0.11]
    routing = router([-1.0] * 8, **TWO_GROUPS)(logits_for(scores))
    assert sorted(routing.indices_MK[0].tolist()) == [0, 1, 2, 3]
    total = sum(scores[:4])
    for expert, weight in zip(routing.indices_MK[0], routing.weights_MK[0].tolist(), strict=True):
        assert weight == pytest.approx(2.5 * scores[int(expert)] / total, rel=1e-5)


def test_v3_scores_a_group_by_its_two_best():
    scores = [0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.05, 0.05]  # sums of two 1.0 and 1.2, bests .9 and .6
    routing = router([0.0] * 8, **TWO_GROUPS)(logits_for(scores))
    assert sorted(routing.indices_MK[0].tolist()) == [4, 5, 6, 7]


def test_v2_scores_a_group_by_its_best():
    scores = torch.tensor([0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.05, 0.05])
    routing = router(**V2, **TWO_GROUPS)(scores.log()[None])
    assert sorted(routing.indices_MK[0].tolist()) == [0, 1, 2, 3]
    expected = scores / scores.sum()  # softmax over all eight, not over the chosen
    assert routing.weights_MK[0].tolist() == pytest.approx(
        expected[routing.indices_MK[0]].tolist(), rel=1e-5
    )


def test_two_best_count_with_their_biases():
    scores = [0.5, 0.5, 0.1, 0.1, 0.4, 0.4, 0.1, 0.1]
    plain, biased = router([0.0] * 8, **TWO_GROUPS), router([0] * 5 + [0.3] + [0] * 2, **TWO_GROUPS)
    assert sorted(plain(logits_for(scores)).indices_MK[0].tolist()) == [0, 1, 2, 3]
    assert sorted(biased(logits_for(scores)).indices_MK[0].tolist()) == [4, 5, 6, 7]


def test_bias_moves_the_choice_and_not_the_weights():
    one_group = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    scores = [0.8, 0.7, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]
    routing = router([0, 0, 0.9, 0, 0, 0, 0, 0], **one_group)(logits_for(scores))
    assert set(routing.indices_MK[0].tolist()) == {0, 2}
    weights = dict(zip(routing.indices_MK[0].tolist(), routing.weights_MK[0].tolist(), strict=True))
    assert weights[0] == pytest.approx(2.5 * 0.8 / (0.8 + 0.2), rel=1e-5)
    assert weights[2] == pytest.approx(2.5 * 0.2 / (0.8 + 0.2), rel=1e-5)
    assert routing.scores_ME[0].tolist() == pytest.approx(scores, rel=1e-5)  # unbiased


def test_weights_may_stay_unnormalised():
    scores = [0.8, 0.7, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]
    made = router([0.0] * 8, n_group=1, topk_group=1, num_experts_per_tok=2, norm_topk_prob=False)
    assert made(logits_for(scores)).weights_MK[0].tolist() == pytest.approx([2.0, 1.75], rel=1e-5)


def test_same_choice_as_trying_every_expert():
    """Random scores and biases against a plain search, many tokens at once."""
    generator = torch.Generator().manual_seed(0)
    scores_ME = torch.rand(200, 8, generator=generator)
    for n_group, topk_group in ((4, 2), (2, 1), (4, 3), (1, 1), (4, 4)):
        bias_E = torch.rand(8, generator=generator) * 2 - 1.5
        made = router(
            bias_E.tolist(), n_group=n_group, topk_group=topk_group, num_experts_per_tok=2
        )
        logits_ME = torch.logit(scores_ME.double()).float()
        chosen_MK = made(logits_ME).indices_MK
        with torch.no_grad():  # natively, where that is to be had
            assert torch.equal(made(logits_ME).indices_MK, chosen_MK)
        size = 8 // n_group
        for row, biased in enumerate((scores_ME + bias_E).tolist()):
            groups = [range(start, start + size) for start in range(0, 8, size)]
            if n_group > 1:
                groups.sort(key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[:2]))
            kept = [e for group in groups[:topk_group] for e in group]
            best = sorted(kept, key=lambda e: -biased[e])[:2]
            assert chosen_MK[row].tolist() == best


def test_gate_learns_through_the_weights_of_the_chosen_only():
    one_group = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    made = router([0.0] * 8, **one_group, norm_topk_prob=False)
    x_MD = logits_for([0.8, 0.7, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])
    routing = made(x_MD)
    assert routing.indices_MK[0].tolist() == [0, 1]
    assert not routing.indices_MK.requires_grad
    routing.weights_MK[0, 0].backward()
    assert made.weight.grad is not None
    expected = torch.zeros(8, 8)
    expected[0] = 2.5 * 0.8 * 0.2 * x_MD[0]  # d sigmoid = s(1-s), for the expert asked about
    torch.testing.assert_close(made.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_scores_are_float32_under_autocast_and_with_bfloat16_weights():
    made = router([0.0] * 8)
    x_MD = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    full = made(x_MD)
    with torch.autocast("cpu", torch.bfloat16):
        again = made(x_MD)
    assert all(torch.equal(a, b) for a, b in zip(full, again, strict=True))
    half = router([0.0] * 8)
    weight_ED = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    half.weight.data = weight_ED
    routing = half(x_MD.bfloat16())
    assert routing.scores_ME.dtype == routing.weights_MK.dtype == torch.float32
    expected = (x_MD.bfloat16().double() @ weight_ED.double().T).sigmoid()
    torch.testing.assert_close(routing.scores_ME.double(), expected, rtol=1e-5, atol=1e-6)


def test_v2_has_no_bias_and_v3s_is_a_float32_buffer():
    assert router(**V2).e_score_correction_bias is None
    assert list(router(**V2).state_dict()) == ["weight"]
    state = router().state_dict()
    assert state["e_score_correction_bias"].dtype == torch.float32
