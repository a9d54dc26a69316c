"""What is predicted where, and how much it costs: against loops and full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.model.transformer import Transformer
from qiusuo.training.balance import sequence_balance_loss
from qiusuo.training.losses import Window, language_model_losses, make_window, positions_with_gaps
from tests.model.shapes import tiny_model

LENGTH = 6


def batch(lookahead: int, padded: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Three rows: one document, several, and many short ones; the last row ends in padding."""
    span = LENGTH + 1 + lookahead
    tokens_BS = torch.randint(97, (3, span), generator=torch.Generator().manual_seed(lookahead))
    place_S = torch.arange(span)
    documents_BS = torch.stack([0 * place_S, place_S // 3, (place_S + 1) // 2]).int()
    valid_BS = torch.ones(3, span, dtype=torch.bool)
    if padded:
        valid_BS[2, -padded:] = False
        tokens_BS[2, -padded:] = 0
        documents_BS[2, -padded:] = -1
    return tokens_BS, documents_BS, valid_BS


@pytest.mark.parametrize("isolate", [False, True], ids=["joined", "isolated"])
@pytest.mark.parametrize("padded", [0, 4])
@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
def test_labels_of_every_depth(lookahead: int, padded: int, isolate: bool) -> None:
    tokens_BS, documents_BS, valid_BS = batch(lookahead, padded)
    window = make_window(tokens_BS, documents_BS, valid_BS, lookahead, isolate)
    assert torch.equal(window.inputs, tokens_BS[:, :LENGTH])
    assert len(window.labels) == lookahead + 1
    ignored = 0
    for depth, labels_BT in enumerate(window.labels):
        assert labels_BT.shape == (3, LENGTH)
        for row in range(3):
            for place in range(LENGTH):
                target = place + 1 + depth
                counted = bool(valid_BS[row, target])
                if isolate:
                    counted &= bool(documents_BS[row, place] == documents_BS[row, target])
                expected = int(tokens_BS[row, target]) if counted else IGNORE
                assert labels_BT[row, place] == expected, (depth, row, place)
                ignored += not counted
    assert (ignored > 0) == (isolate or padded > 0)


def test_isolated_documents_do_not_see_each_other() -> None:
    tokens_BS, documents_BS, valid_BS = batch(1)
    assert make_window(tokens_BS, documents_BS, valid_BS, 1, isolate=False).mask_BTT is None
    mask_BTT = make_window(tokens_BS, documents_BS, valid_BS, 1, isolate=True).mask_BTT
    for row in range(3):
        for query in range(LENGTH):
            for key in range(LENGTH):
                same = documents_BS[row, query] == documents_BS[row, key]
                assert mask_BTT[row, query, key] == (key <= query and bool(same))


def full_logits(model: Transformer, window: Window) -> list[Tensor]:
    """Logits of the main model and of every module, by the model's own parts."""
    inputs_BT = window.inputs
    x_BTD = model(inputs_BT, mask_BTS=window.mask_BTT).x_BTD
    context = model.context(inputs_BT, mask_BTS=window.mask_BTT)
    found = [model.logits(x_BTD)]
    for depth in range(model.config.num_nextn_predict_layers):
        next_BT = window.tokens_BS[:, depth + 1 : depth + 1 + LENGTH]
        x_BTD = model.predict_ahead(x_BTD, next_BT, depth, context).x_BTD
        found.append(model.logits(x_BTD))
    return found


@pytest.mark.parametrize("isolate", [False, True], ids=["joined", "isolated"])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_losses_and_gradients_are_those_of_full_logits(lookahead: int, isolate: bool) -> None:
    model = tiny_model(num_nextn_predict_layers=lookahead)
    window = make_window(*batch(lookahead, padded=2), lookahead, isolate)
    losses = language_model_losses(model, window)
    sums = [
        F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        for logits, labels in zip(full_logits(model, window), window.labels, strict=True)
    ]
    torch.testing.assert_close(losses.main, sums[0])
    assert len(losses.mtp) == lookahead
    for found, expected in zip(losses.mtp, sums[1:], strict=True):
        torch.testing.assert_close(found, expected)
    # Every MoE layer is balanced, the modules' too.
    assert set(losses.routings) == set(range(1, 3 + lookahead))
    each = [sequence_balance_loss(routing, 3) for routing in losses.routings.values()]
    torch.testing.assert_close(losses.balance, torch.stack(each).sum())
    assert [x.shape for x in losses.mtp_states] == [(3, LENGTH, 48)] * lookahead

    parameters = list(model.parameters())
    ours = torch.autograd.grad(losses.main + sum(losses.mtp), parameters)
    theirs = torch.autograd.grad(sum(sums), parameters)
    for (name, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
        scale = float(other.abs().max())
        assert scale > 0, name
        assert float((one - other).abs().max()) <= 1e-4 * scale, name


def test_an_isolated_document_is_predicted_as_if_alone() -> None:
    """From a cut between two documents on, nothing of the first reaches the second."""
    model = tiny_model(num_nextn_predict_layers=1)
    tokens_BS, _, valid_BS = batch(1)
    documents_BS = (torch.arange(LENGTH + 2) >= 3).int().expand(3, -1)
    other_BS = tokens_BS.clone()
    other_BS[:, :3] = (other_BS[:, :3] + 1) % 97
    states = []
    for each_BS in (tokens_BS, other_BS):
        losses = language_model_losses(
            model, make_window(each_BS, documents_BS, valid_BS, 1, isolate=True)
        )
        states.append((losses.main_states[:, 3:], losses.mtp_states[0][:, 3:]))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other)


def test_gaps_spread_positions() -> None:
    documents_BS = torch.tensor([[0] * 20 + [1] * 20, [0] * 30 + [-1] * 10])
    spread_BT, again_BT, other_BT = (
        positions_with_gaps(documents_BS, 38, 1.5, seed) for seed in (7, 7, 8)
    )
    steps_BT = spread_BT.diff(dim=1)
    assert spread_BT.shape == (2, 38)
    assert int(steps_BT.min()) == 1
    assert int(steps_BT.max()) > 2
    assert torch.equal(spread_BT, again_BT)
    assert not torch.equal(spread_BT, other_BT)
    # Rates are a document's own: up to 1.5 skipped a token, 0.75 on average over many.
    many_BS = torch.zeros(400, 41, dtype=torch.long)
    rates_B = positions_with_gaps(many_BS, 40, 1.5, 3).diff(dim=1).float().mean(1) - 1
    assert 0.65 < float(rates_B.mean()) < 0.85
    assert float(rates_B.min()) < 0.2
    assert float(rates_B.max()) > 1.2


def test_losses_see_the_positions() -> None:
    model = tiny_model()
    window = make_window(*batch(model.config.num_nextn_predict_layers), 1, isolate=True)
    length = window.inputs.shape[1]
    plain = torch.arange(length).expand(len(window.inputs), length)
    same = language_model_losses(model, window._replace(positions_BT=plain)).main
    far = language_model_losses(model, window._replace(positions_BT=3 * plain)).main
    assert torch.equal(same, language_model_losses(model, window).main)
    assert not torch.equal(same, far)
