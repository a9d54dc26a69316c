"""What pretraining minimises: the next token, the tokens after it, and an even load.

L = CE + λ/D · Σ CE_k + α · Σ balance (DeepSeek-V3 eq. 17, 24-25): D multi-token prediction modules
read the main model's states and the true next tokens, and predict one token further each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qiusuo.kernels.attention import causal_mask
from qiusuo.kernels.cross_entropy import IGNORE, chunked_cross_entropy
from qiusuo.model.moe import Routing
from qiusuo.model.transformer import Transformer
from qiusuo.training.balance import sequence_balance_loss

# B sequences, T tokens predicted by the main model, S = T + 1 + lookahead tokens of a window.


class Window(NamedTuple):
    """A batch as the losses want it. ``labels[k]`` [B, T]: the token k+1 ahead of each input, or
    IGNORE where there is none to predict. ``positions``: None counts from 0."""

    tokens_BS: Tensor
    labels: list[Tensor]
    mask_BTT: Tensor | None
    positions_BT: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """What the main model reads [B, T]."""
        return self.tokens_BS[:, : self.labels[0].shape[1]]


class Losses(NamedTuple):
    """Sums over tokens in nats (``main``, ``mtp``), one number per step for ``balance``."""

    main: Tensor
    mtp: list[Tensor]
    balance: Tensor
    routings: dict[int, Routing]
    main_states: Tensor  # [B, T, D], ready for the head
    mtp_states: list[Tensor]


def make_window(
    tokens_BS: Tensor, documents_BS: Tensor, valid_BS: Tensor, lookahead: int, isolate: bool
) -> Window:
    """Cut a loader's batch into inputs and labels. ``isolate``: documents neither attend to nor
    predict across their borders."""
    length = tokens_BS.shape[1] - 1 - lookahead
    labels = []
    for ahead in range(1, lookahead + 2):
        targets = slice(ahead, ahead + length)
        counted_BT = valid_BS[:, targets]
        if isolate:
            counted_BT = counted_BT & (documents_BS[:, targets] == documents_BS[:, :length])
        labels.append(tokens_BS[:, targets].masked_fill(~counted_BT, IGNORE))
    mask_BTT = None
    if isolate:
        inputs_BT = documents_BS[:, :length]
        mask_BTT = causal_mask(length, length, tokens_BS.device) & (
            inputs_BT[:, :, None] == inputs_BT[:, None, :]
        )
    return Window(tokens_BS, labels, mask_BTT)


def positions_with_gaps(documents_BS: Tensor, length: int, most: float, seed: int) -> Tensor:
    """Positions [B, ``length``] that skip: each document draws a rate from 0 to ``most``, and
    before each token so many positions are left out on average. Distances between tokens then vary
    as they do in longer texts, so what is learnt on short ones need not lean on them (randomised
    positional encodings, arXiv:2305.16843)."""
    generator = torch.Generator().manual_seed(seed)
    inputs_BT = documents_BS[:, :length].cpu().long() + 1  # padding is -1
    rate_BD = most * torch.rand(len(inputs_BT), int(inputs_BT.max()) + 1, generator=generator)
    gaps_BT = torch.poisson(rate_BD.gather(1, inputs_BT), generator=generator).long()
    return (1 + gaps_BT).cumsum(1) - 1


def language_model_losses(model: Transformer, window: Window) -> Losses:
    """Forward pass and every loss of one micro-batch."""
    inputs_BT = window.inputs
    sequences, length = inputs_BT.shape
    hidden = model(inputs_BT, window.positions_BT, window.mask_BTT)
    head_WD = model.lm_head.weight  # asked for after the pass, which gathers it if it is sharded
    routings = dict(hidden.routings)
    main = chunked_cross_entropy(hidden.x_BTD.flatten(0, 1), head_WD, window.labels[0].flatten())
    mtp: list[Tensor] = []
    mtp_states: list[Tensor] = []
    x_BTD = hidden.x_BTD
    context = model.context(inputs_BT, window.positions_BT, window.mask_BTT)
    for depth in range(model.config.num_nextn_predict_layers):
        next_BT = window.tokens_BS[:, depth + 1 : depth + 1 + length]
        ahead = model.predict_ahead(x_BTD, next_BT, depth, context)
        routings |= ahead.routings
        x_BTD = ahead.x_BTD
        mtp_states.append(x_BTD)
        labels_M = window.labels[depth + 1].flatten()
        mtp.append(chunked_cross_entropy(x_BTD.flatten(0, 1), head_WD, labels_M))
    balance = torch.zeros((), device=main.device)
    for routing in routings.values():
        balance = balance + sequence_balance_loss(routing, sequences)
    return Losses(main, mtp, balance, routings, hidden.x_BTD, mtp_states)
