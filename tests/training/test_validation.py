"""Validation against a naive pass over every token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qiusuo.data.shards import Shards
from qiusuo.model.transformer import Transformer
from qiusuo.training.beginning import build_model
from qiusuo.training.validation import validate
from qiusuo.training.vocabulary import prepare
from tests.training import lives

LENGTH = 16


@pytest.fixture(scope="module")
def splits(corpus: Path) -> list[Shards]:
    recipe = lives.recipe_for(corpus)
    return prepare(recipe, recipe.stages[0]).validation


@pytest.fixture(scope="module")
def model(corpus: Path) -> Transformer:
    """Weights large enough that predictions differ from place to place."""
    recipe = lives.recipe_for(
        corpus, model={"initializer_range": 0.3, "num_nextn_predict_layers": 2}
    )
    return build_model(recipe, prepare(recipe, recipe.stages[0]).tokenizer, recipe.stages[0].name)


class Naive:
    """Window by window, place by place; every window a batch of its own."""

    @torch.no_grad()
    def __init__(self, model: Transformer, shards: Shards, isolate: bool) -> None:
        text = torch.from_numpy(shards.slice(0, shards.tokens).astype("int64"))
        ends = shards.offsets_D[1:].tolist()
        document = [sum(end <= place for end in ends) for place in range(shards.tokens)]
        self.nats, self.tokens = [0.0, 0.0, 0.0], [0, 0, 0]
        self.agreed, self.compared = [0, 0], [0, 0]
        self.predicted: list[int] = []
        for start in range(0, shards.tokens - 1, LENGTH):
            inputs_T = text[start : min(start + LENGTH, shards.tokens - 1)]
            logits = self.all_logits(model, text, start, len(inputs_T), document, isolate)
            for k, logits_TW in enumerate(logits):
                for t in range(len(inputs_T)):
                    target = start + t + 1 + k
                    if target >= shards.tokens:
                        continue
                    if isolate and document[target] != document[start + t]:
                        continue
                    self.nats[k] -= float(logits_TW[t].log_softmax(-1)[text[target]])
                    self.tokens[k] += 1
                    if k == 0:
                        self.predicted.append(target)
                    elif t + k < len(inputs_T):
                        self.compared[k - 1] += 1
                        same = logits_TW[t].argmax() == logits[0][t + k].argmax()
                        self.agreed[k - 1] += int(same)

    def all_logits(
        self,
        model: Transformer,
        text: Tensor,
        start: int,
        count: int,
        document: list,
        isolate: bool,
    ) -> list[Tensor]:
        place = range(start, start + count)
        mask = None
        if isolate:
            rows = [[document[q] == document[k] and k <= q for k in place] for q in place]
            mask = torch.tensor(rows)[None]
        inputs_BT = text[None, start : start + count]
        x = model(inputs_BT, mask_BTS=mask).x_BTD
        context = model.context(inputs_BT, mask_BTS=mask)
        found = [model.logits(x)[0]]
        for depth in range(model.config.num_nextn_predict_layers):
            # Past the end any token will do: nothing there is counted.
            after = torch.zeros(count, dtype=torch.long)
            known = text[start + depth + 1 : start + depth + 1 + count]
            after[: len(known)] = known
            x = model.predict_ahead(x, after[None], depth, context).x_BTD
            found.append(model.logits(x)[0])
        return found


@pytest.mark.parametrize("isolate", [False, True], ids=["joined", "isolated"])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_validation_is_the_naive_one(
    model: Transformer, splits: list[Shards], isolate: bool, batch_size: int
) -> None:
    [shards] = splits
    found = validate(model, splits, batch_size=batch_size, sequence_length=LENGTH, isolate=isolate)
    naive = Naive(model, shards, isolate)
    assert found.tokens == naive.tokens[0]
    # Every token once: all but the very first, and isolated all but the first of a document.
    heads = set(shards.offsets_D[:-1].tolist()) if isolate else {0}
    assert naive.predicted == [p for p in range(shards.tokens) if p not in heads]
    assert found.loss == pytest.approx(naive.nats[0] / naive.tokens[0], rel=1e-4)
    for k in (1, 2):
        expected = naive.nats[k] / naive.tokens[k]
        assert found.mtp_loss[k - 1] == pytest.approx(expected, rel=1e-4)
        expected = naive.agreed[k - 1] / naive.compared[k - 1]
        assert found.mtp_agreement[k - 1] == pytest.approx(expected)
    bits = naive.nats[0] / math.log(2) / shards.characters
    assert found.bits_per_character == pytest.approx(bits, rel=1e-4)
    assert set(found.load.counts) == {1, 2, 3}


def test_a_model_that_always_says_one_thing_agrees_with_itself(
    model: Transformer, splits: list[Shards]
) -> None:
    """The ends of windows, where there is nothing to compare with, do not count against it."""
    head = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = validate(model, splits, batch_size=8, sequence_length=LENGTH, isolate=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    assert found.mtp_agreement == [1.0, 1.0]
    assert found.loss == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)


def test_a_limit_takes_the_first_tokens_of_every_split(
    model: Transformer, splits: list[Shards]
) -> None:
    how = {"batch_size": 4, "sequence_length": LENGTH, "isolate": False}
    assert validate(model, splits, **how, limit_tokens=50).tokens == 50
    assert validate(model, splits * 2, **how, limit_tokens=50).tokens == 100
    whole = validate(model, splits, **how)
    assert validate(model, splits, **how, limit_tokens=10**9).loss == whole.loss


def test_validation_changes_nothing(model: Transformer, splits: list[Shards]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = {"batch_size": 4, "sequence_length": LENGTH, "isolate": True}
    first, second = (validate(model, splits, **how) for _ in range(2))
    assert (first.loss, first.mtp_agreement) == (second.loss, second.mtp_agreement)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
