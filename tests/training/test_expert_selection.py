"""Which experts a task uses, counted by hand, and that no other weight moves by a bit."""

from __future__ import annotations

import json

import pytest
import torch

from qiusuo.data.batch import Batch
from qiusuo.model.transformer import Transformer
from qiusuo.training.expert_selection import (
    ExpertSelection,
    expert_scores,
    fewest_reaching,
    select_experts,
    train_only,
)
from qiusuo.training.losses import language_model_losses, make_window
from qiusuo.training.optimizers import build_optimizers
from qiusuo.training.recipe import RecipeError
from qiusuo.training.sections import OptimizerSection
from tests.model.shapes import tiny_model


def batch(seed: int, rows: int = 3, length: int = 20, padding: int = 0) -> Batch:
    """Two documents a row; the last ``padding`` tokens are none."""
    tokens_BS = torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))
    documents_BS = (torch.arange(length).expand(rows, -1) >= 9).int().clone()
    valid_BS = torch.ones(rows, length, dtype=torch.bool)
    if padding:
        documents_BS[:, -padding:], valid_BS[:, -padding:] = -1, False
    return Batch(tokens_BS, documents_BS, valid_BS)


def by_hand(model: Transformer, batches: list[Batch]) -> tuple[dict, int]:
    """Choices of each document by itself, one token after the other."""
    counts = {layer: torch.zeros(8, dtype=torch.double) for layer in model.routers()}
    depth, seen = model.config.num_nextn_predict_layers, 0
    for one in batches:
        for tokens_S, documents_S in zip(one.tokens_BS, one.documents_BS, strict=True):
            read = len(tokens_S) - 1 - depth
            for document in (0, 1):
                places = [t for t in range(read) if documents_S[t] == document]
                if not places:
                    continue
                seen += len(places)
                hidden = model(tokens_S[None, places])
                routings = dict(hidden.routings)
                if depth:
                    following = tokens_S[None, [t + 1 for t in places]]
                    context = model.context(tokens_S[None, places])
                    routings |= model.predict_ahead(hidden.x_BTD, following, 0, context).routings
                for layer, routing in routings.items():
                    for experts in routing.indices_MK.tolist():
                        for expert in experts:
                            counts[layer][expert] += 1
    return counts, seen


@pytest.mark.parametrize(
    "changes", [{"num_nextn_predict_layers": 1}, {"model_type": "deepseek_v2"}]
)
@torch.no_grad()
def test_scores_are_what_one_counts_by_hand(changes: dict) -> None:
    model = tiny_model(**changes)
    batches = [batch(1), batch(2, padding=8)]
    counts, seen = by_hand(model, batches)
    assert set(counts) == ({1, 2, 3} if "num_nextn_predict_layers" in changes else {1, 2})
    scores, tokens = expert_scores(model, batches)
    assert tokens == seen
    assert scores.keys() == counts.keys()
    for layer, score_E in scores.items():
        torch.testing.assert_close(score_E, counts[layer] / counts[layer].sum())


@pytest.mark.parametrize(
    ("scores", "share", "chosen"),
    [
        ([0.1, 0.4, 0.2, 0.3], 0.2, [1]),
        ([0.1, 0.4, 0.2, 0.3], 0.4, [1]),
        ([0.1, 0.4, 0.2, 0.3], 0.41, [1, 3]),
        ([0.25, 0.25, 0.25, 0.25], 0.5, [0, 1]),
        ([0.0, 0.7, 0.3, 0.0], 1.0, [1, 2]),
        ([0.1] * 10, 1.0, list(range(10))),
    ],
)
def test_the_fewest_that_reach_the_share(
    scores: list[float], share: float, chosen: list[int]
) -> None:
    assert fewest_reaching(torch.tensor(scores, dtype=torch.double), share) == chosen


def test_a_selection_is_json() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    selection = select_experts(model, [batch(1)], share=0.5)
    assert ExpertSelection.from_json(json.loads(json.dumps(selection.to_json()))) == selection
    assert select_experts(model, [batch(1)], share=0.5) == selection
    assert selection.experts.keys() == {1, 2, 3}
    assert all(1 < len(experts) < 8 for experts in selection.experts.values())


def test_nothing_to_select() -> None:
    with pytest.raises(RecipeError, match="no routed experts"):
        select_experts(tiny_model(model_type="llama"), [batch(1)])
    with pytest.raises(RecipeError, match="no tokens"):
        select_experts(tiny_model(), [batch(1, padding=20)])


@pytest.mark.parametrize("experts", [{1: [8]}, {0: [1]}, {7: [1]}])
def test_another_models_selection_is_refused(experts: dict) -> None:
    model = tiny_model()
    with pytest.raises(RecipeError, match="another model"):
        train_only(model, ExpertSelection(0.2, 10, experts))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_no_other_weight_moves_by_a_bit(kind: str) -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selection = select_experts(model, [batch(1)], share=0.3)
    train_only(model, selection)
    section = OptimizerSection(kind=kind, weight_decay=0.5, learning_rate=0.02)
    optimizers = build_optimizers(model, section)
    for step in range(4):
        one = batch(step)
        window = make_window(one.tokens_BS, one.documents_BS, one.valid_BS, 1, True)
        losses = language_model_losses(model, window)
        (losses.main + losses.mtp[0] + 0.1 * losses.balance).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    named = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        if ".mlp.experts." in name:
            chosen = selection.experts[int(name.split(".")[2])]
            for expert in range(8):
                moved = not torch.equal(tensor[expert], before[name][expert])
                assert moved == (expert in chosen), (name, expert)
        else:
            assert torch.equal(tensor, before[name]), name
            assert name not in named or not named[name].requires_grad, name
