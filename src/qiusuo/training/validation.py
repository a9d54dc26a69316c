"""How well the model predicts text it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qiusuo.data.batch import Batch
from qiusuo.data.shards import Shards
from qiusuo.data.validation import validation_batches
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.model.transformer import Transformer
from qiusuo.training.balance import ExpertLoad
from qiusuo.training.losses import language_model_losses, make_window
from qiusuo.training.parallel.sharding import let_go
from qiusuo.training.parallel.world import ALONE, World

# B sequences, T tokens, M = B*T, D hidden.


@dataclass(frozen=True)
class Validation:
    """``loss`` in nats per token; ``mtp_agreement`` per MTP module: how often its likeliest token
    is the main model's one step later, which is what self-speculation would accept."""

    loss: float
    bits_per_character: float
    tokens: int
    mtp_loss: list[float]
    mtp_agreement: list[float]
    load: ExpertLoad


@torch.no_grad()
def validate(
    model: Transformer,
    splits: list[Shards],
    *,
    batch_size: int,
    sequence_length: int,
    isolate: bool,
    limit_tokens: int | None = None,
    world: World = ALONE,
) -> Validation:
    """Every token of the splits is predicted once (of each, the first ``limit_tokens``). Several
    processes share the batches, and each is told the whole."""
    depth = model.config.num_nextn_predict_layers
    totals, load = _Totals(depth), ExpertLoad(model)
    characters = 0.0
    for shards in splits:
        before = totals.predicted
        batches: Iterable[Batch] = validation_batches(
            shards,
            batch_size=batch_size,
            sequence_length=sequence_length,
            lookahead=depth,
            limit_tokens=limit_tokens,
        )
        own = _Totals(depth)
        for batch, counts in _shared(batches, world):
            # A pass over sharded weights is made by all, also by those who have no batch left.
            _add_batch(model, batch, own if counts else _Totals(depth), load, counts, isolate)
        totals.add(own, world)
        # The share of the split that was looked at; every token but the first can be.
        characters += shards.characters * (totals.predicted - before) / (shards.tokens - 1)
    let_go(model)
    load.add_up(world)
    loss = totals.nats / totals.tokens
    return Validation(
        loss=loss,
        bits_per_character=totals.nats / math.log(2) / characters,
        tokens=totals.tokens,
        mtp_loss=[n / max(1, t) for n, t in zip(totals.mtp_nats, totals.mtp_tokens, strict=True)],
        mtp_agreement=[a / max(1, c) for a, c in zip(totals.agreed, totals.compared, strict=True)],
        load=load,
    )


def _shared(batches: Iterable[Batch], world: World) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, the same number on each: with False, one that another counts."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == world.size:
            yield waiting[world.rank], True
            waiting = []
    if waiting:
        yield waiting[min(world.rank, len(waiting) - 1)], world.rank < len(waiting)


class _Totals:
    def __init__(self, depth: int) -> None:
        self.nats, self.tokens, self.predicted = 0.0, 0, 0
        self.mtp_nats, self.mtp_tokens = [0.0] * depth, [0] * depth
        self.agreed, self.compared = [0] * depth, [0] * depth

    def add(self, other: _Totals, world: World) -> None:
        """What all processes counted in ``other``."""
        depth = len(self.mtp_nats)
        single = [other.nats, other.tokens, other.predicted]
        each = [*other.mtp_nats, *other.mtp_tokens, *other.agreed, *other.compared]
        numbers = torch.tensor([*single, *each], dtype=torch.float64)
        nats, tokens, predicted, *rest = world.sum(numbers).tolist()
        self.nats += nats
        self.tokens += int(tokens)
        self.predicted += int(predicted)
        for k in range(depth):
            self.mtp_nats[k] += rest[k]
            self.mtp_tokens[k] += int(rest[depth + k])
            self.agreed[k] += int(rest[2 * depth + k])
            self.compared[k] += int(rest[3 * depth + k])


def _add_batch(
    model: Transformer,
    batch: Batch,
    totals: _Totals,
    load: ExpertLoad,
    counts: bool,
    isolate: bool,
) -> None:
    depth = model.config.num_nextn_predict_layers
    device = model.lm_head.weight.device
    tokens_BS, documents_BS, valid_BS = (
        part.to(device) for part in (batch.tokens_BS, batch.documents_BS, batch.valid_BS)
    )
    window = make_window(tokens_BS, documents_BS, valid_BS, depth, isolate)
    losses = language_model_losses(model, window)
    if counts:
        load.add(losses.routings)
    totals.nats += losses.main.item()
    totals.tokens += int((window.labels[0] != IGNORE).sum())
    totals.predicted += int(valid_BS[:, 1 : window.labels[0].shape[1] + 1].sum())
    for k, (loss, labels_BT) in enumerate(zip(losses.mtp, window.labels[1:], strict=True)):
        counted_BT = labels_BT != IGNORE
        totals.mtp_nats[k] += loss.item()
        totals.mtp_tokens[k] += int(counted_BT.sum())
        # Module k at place t and the main model at t + k + 1 predict the same token.
        ahead_BT = _likeliest(model, losses.mtp_states[k])[:, : -(k + 1)]
        main_BT = _likeliest(model, losses.main_states)[:, k + 1 :]
        compared_BT = counted_BT[:, : -(k + 1)]
        totals.agreed[k] += int(((ahead_BT == main_BT) & compared_BT).sum())
        totals.compared[k] += int(compared_BT.sum())


def _likeliest(model: Transformer, x_BTD: Tensor) -> Tensor:
    """Greedy token of every place [B, T], one sequence's logits in memory at a time."""
    return torch.stack([model.logits(x_TD).argmax(-1) for x_TD in x_BTD])
