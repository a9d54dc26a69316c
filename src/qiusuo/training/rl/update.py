"""One update from a batch of rollouts: rows of tokens, their log-probabilities, the loss.

Rows are prompt and answer, padded at the end, the longest first, so that a micro-batch is about as
long as its rows. The experts that were chosen at the rollout are chosen again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.kernels.token_logprobs import token_logprobs
from qiusuo.model.moe import Routing
from qiusuo.model.transformer import Transformer
from qiusuo.training.rl.rollouts import Rollout

# B rollouts, T places (a row's inputs), L MoE layers, K experts of a token.


@dataclass(frozen=True)
class Paid:
    """A rollout and its advantage; ``counted``: whether it takes part in the loss."""

    rollout: Rollout
    advantage: float
    counted: bool = True


class Rows(NamedTuple):
    """``labels``: the answer's tokens where they are predicted, IGNORE elsewhere."""

    inputs_BT: Tensor
    labels_BT: Tensor
    rollout_logprobs_BT: Tensor
    advantages_B: Tensor
    experts_BTLK: Tensor | None

    @property
    def mask_BT(self) -> Tensor:
        return self.labels_BT != IGNORE


def rows_of(batch: Sequence[Paid], replay: bool, device: torch.device) -> Rows:
    """The rollouts as padded rows, in their order, on ``device``. ``replay``: with the experts that
    were chosen when they were sampled (−1 in the padding). One that is not ``counted`` has no
    labels."""
    longest = max(len(one.rollout.prompt) + len(one.rollout.answer) for one in batch) - 1
    inputs_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    labels_BT = torch.full((len(batch), longest), IGNORE)
    logprobs_BT = torch.zeros(len(batch), longest)
    experts = batch[0].rollout.experts if replay else None
    experts_BTLK = None
    if experts is not None:
        experts_BTLK = torch.full((len(batch), longest, *experts.shape[1:]), -1)
    for row, one in enumerate(batch):
        rollout = one.rollout
        tokens = [*rollout.prompt, *rollout.answer]
        inputs_BT[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        if one.counted:
            answer = slice(len(rollout.prompt) - 1, len(tokens) - 1)
            labels_BT[row, answer] = torch.tensor(rollout.answer)
            logprobs_BT[row, answer] = torch.tensor(rollout.logprobs)
        if experts_BTLK is not None:
            assert rollout.experts is not None
            experts_BTLK[row, : len(rollout.experts)] = rollout.experts
    advantages_B = torch.tensor([one.advantage for one in batch])
    return Rows(
        inputs_BT.to(device),
        labels_BT.to(device),
        logprobs_BT.to(device),
        advantages_B.to(device),
        None if experts_BTLK is None else experts_BTLK.to(device),
    )


def row_logprobs(
    model: Transformer, rows: Rows, temperature: float
) -> tuple[Tensor, Tensor, dict[int, Routing]]:
    """Log p of every answer token [B, T] at the temperature, 0 elsewhere; the entropies beside
    them; and the routing on the way."""
    hidden = model(rows.inputs_BT, experts_BTLK=rows.experts_BTLK)
    # Only the places with a label go through the head.
    place_N = rows.mask_BT.flatten().nonzero().squeeze(1)
    x_ND = hidden.x_BTD.flatten(0, 1)[place_N] / temperature
    logprobs_N, entropy_N = token_logprobs(
        x_ND, model.lm_head.weight, rows.labels_BT.flatten()[place_N], float32_head=True
    )
    size = rows.labels_BT.numel()
    logprobs_M = logprobs_N.new_zeros(size).index_put((place_N,), logprobs_N)
    entropy_M = entropy_N.new_zeros(size).index_put((place_N,), entropy_N)
    shape = rows.labels_BT.shape
    return logprobs_M.view(shape), entropy_M.view(shape), hidden.routings
