"""Even experts: the bias's rule and what it achieves, and V3's loss against its equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qiusuo.kernels.routing import choose_experts
from qiusuo.model.moe import Router, Routing
from qiusuo.training.balance import ExpertLoad, sequence_balance_loss
from tests.model.shapes import tiny_config, tiny_model


def routing_of(scores_ME: Tensor, choices: int) -> Routing:
    indices_MK = scores_ME.topk(choices, dim=-1).indices
    return Routing(scores_ME, indices_MK, scores_ME.gather(1, indices_MK))


def chosen(*indices: tuple[int, ...], experts: int = 8) -> Routing:
    """Given choices; scores do not matter."""
    indices_MK = torch.tensor(indices)
    return Routing(torch.rand(len(indices), experts), indices_MK, torch.ones(indices_MK.shape))


def flat_biases(load: ExpertLoad) -> None:
    for router in load.routers.values():
        router.e_score_correction_bias.zero_()


def test_bias_rises_for_idle_experts_and_falls_for_busy_ones() -> None:
    load = ExpertLoad(tiny_model())
    flat_biases(load)
    # Eight pairs on eight experts: one is an even share.
    load.add({1: chosen((0, 1), (0, 2), (0, 3), (4, 5)), 2: chosen((0, 1), (2, 3), (4, 5), (6, 7))})
    assert load.relative()[1] == [3, 1, 1, 1, 1, 1, 0, 0]
    assert load.max_violation() == {1: 2.0, 2: 0.0}
    load.update_biases(0.25)
    bias = load.routers[1].e_score_correction_bias
    assert bias.tolist() == [-0.25, 0, 0, 0, 0, 0, 0.25, 0.25]
    assert not load.routers[2].e_score_correction_bias.any()  # even: nothing moves
    assert not any(count.any() for count in load.counts.values())  # and counts anew


def test_bias_moves_by_gamma_whatever_the_distance() -> None:
    load = ExpertLoad(tiny_model())
    flat_biases(load)
    for _ in range(3):
        load.add({1: chosen(*[(0, 1)] * 100, (2, 3))})
        load.update_biases(0.001)
    bias = load.routers[1].e_score_correction_bias
    torch.testing.assert_close(bias, torch.tensor([-3.0, -3, 3, 3, 3, 3, 3, 3]) * 0.001)


def test_counts_are_the_whole_batchs() -> None:
    """Two lopsided micro-batches that make an even batch move nothing."""
    load = ExpertLoad(tiny_model())
    flat_biases(load)
    load.add({1: chosen((0, 1), (2, 3))})
    load.add({1: chosen((4, 5), (6, 7))})
    assert load.max_violation()[1] == 0
    load.update_biases(0.1)
    assert not load.routers[1].e_score_correction_bias.any()


def test_mtp_routers_are_balanced_too() -> None:
    model = tiny_model(num_nextn_predict_layers=2)
    load = ExpertLoad(model)
    assert set(load.counts) == {1, 2, 3, 4}
    flat_biases(load)
    load.add({4: chosen((0, 1))})
    load.update_biases(0.1)
    bias = model.model.layers[4].mlp.gate.e_score_correction_bias
    torch.testing.assert_close(bias, torch.tensor([-0.1, -0.1, *[0.1] * 6]))


def test_no_speed_no_bias_no_change() -> None:
    load = ExpertLoad(tiny_model())
    flat_biases(load)
    load.add({1: chosen((0, 1))})
    load.update_biases(0.0)
    assert not load.routers[1].e_score_correction_bias.any()
    plain = ExpertLoad(tiny_model(model_type="deepseek_v2"))  # which has no biases
    plain.add({1: chosen((0, 1))})
    plain.update_biases(0.1)
    assert not plain.counts[1].any()


def test_dense_models_have_nothing_to_balance() -> None:
    load = ExpertLoad(tiny_model(n_routed_experts=0))
    assert load.counts == {}
    load.update_biases(0.1)
    assert load.max_violation() == {}


@pytest.mark.parametrize("groups", [1, 4], ids=["one-group", "four-groups"])
def test_a_skewed_router_becomes_even(groups: int) -> None:
    """Scores that favour a few experts stay as they are; only the bias moves the choice."""
    config = tiny_config(n_group=groups, topk_group=max(1, groups // 2), num_experts_per_tok=2)
    model = tiny_model(n_group=groups, topk_group=max(1, groups // 2), num_experts_per_tok=2)
    load = ExpertLoad(model)
    flat_biases(load)
    router: Router = load.routers[1]
    generator = torch.Generator().manual_seed(0)
    tilt_E = torch.linspace(2.0, -2.0, config.n_routed_experts)
    history = []
    for _ in range(300):
        scores_ME = (torch.randn(400, 8, generator=generator) * 0.7 + tilt_E).sigmoid()
        bias_E, logits_ME = router.e_score_correction_bias, scores_ME.logit()
        indices_MK = choose_experts(logits_ME, bias_E, router.choice).indices_MK
        load.add({1: Routing(scores_ME, indices_MK, scores_ME.gather(1, indices_MK))})
        history.append(load.max_violation()[1])
        load.update_biases(0.01)
    assert history[0] > 1.0
    assert sum(history[-20:]) / 20 < 0.3


# The sequence-wise loss


def equations_17_to_20(scores_BTE: Tensor, choices: int) -> float:
    """V3 §2.1.2, one number at a time."""
    total = 0.0
    sequences, tokens, experts = scores_BTE.shape
    for scores_TE in scores_BTE.tolist():
        for i in range(experts):
            count, share = 0, 0.0
            for scores_E in scores_TE:
                best = sorted(range(experts), key=lambda e: -scores_E[e])[:choices]
                count += i in best
                share += scores_E[i] / sum(scores_E)
            f_i = experts / (choices * tokens) * count
            p_i = share / tokens
            total += f_i * p_i
    return total / sequences


@pytest.mark.parametrize(
    ("sequences", "tokens", "experts", "choices"), [(1, 5, 4, 1), (3, 7, 8, 3)]
)
def test_sequence_loss_is_the_papers(
    sequences: int, tokens: int, experts: int, choices: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    scores_BTE = torch.randn(sequences, tokens, experts, generator=generator).sigmoid()
    routing = routing_of(scores_BTE.flatten(0, 1), choices)
    found = sequence_balance_loss(routing, sequences)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(equations_17_to_20(scores_BTE, choices), rel=1e-5)


def test_sequence_loss_does_not_see_the_bias() -> None:
    scores_ME = torch.rand(12, 8, generator=torch.Generator().manual_seed(2))
    honest = routing_of(scores_ME, 2)
    biased = honest._replace(indices_MK=(-scores_ME).topk(2, dim=-1).indices)
    assert sequence_balance_loss(biased, 3) == sequence_balance_loss(honest, 3)


def test_sequence_loss_is_one_when_even_and_more_when_not() -> None:
    even = 0.5 + 0.4 * torch.eye(8).repeat(2, 1)  # each expert is one token's favourite
    assert sequence_balance_loss(routing_of(even, 1), 2).item() == pytest.approx(1.0)
    # The same favourites, but each sequence has its own: even over the batch is not enough.
    alone = 0.5 + 0.4 * torch.eye(2).repeat_interleave(8, 0)
    assert sequence_balance_loss(routing_of(alone, 1), 2).item() == pytest.approx(2 * 0.9 / 1.4)


def test_sequence_loss_moves_the_scores_of_the_busy() -> None:
    logits_ME = torch.tensor([[1.0, 0, 0, 0]] * 6, requires_grad=True)
    sequence_balance_loss(routing_of(logits_ME.sigmoid(), 1), 2).backward()
    assert (logits_ME.grad[:, 0] > 0).all()  # descent lowers the favourite
    assert (logits_ME.grad[:, 1:] < 0).all()
