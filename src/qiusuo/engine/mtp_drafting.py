"""Drafts of the model's own multi-token prediction module (DeepSeek-V3, arXiv:2412.19437 §2.2).

The module joins the hidden state that predicted a token with that token's embedding, and predicts
the one after. It has a layer of the cache of its own, and reads the states of all tokens that were
right, each with its next token. For a second guess it reads its own output as if it were the main
model's, and so on; that is a step beyond its training, and pacing.py sees whether it pays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qiusuo.engine.cached_drafting import CachedDrafter, Reading
from qiusuo.engine.drafting import Pass
from qiusuo.engine.limits import few_queries
from qiusuo.engine.paged_cache import PagedCache
from qiusuo.model.transformer import Transformer

# N tokens to read, B sequences, D hidden.


class MTPDrafter(CachedDrafter):
    """``most``: tokens to guess at most. The first module serves; deeper ones need states two
    tokens back."""

    def __init__(self, model: Transformer, cache: PagedCache, most: int = 3) -> None:
        if not model.model.mtp_blocks:
            raise ValueError("this model has no MTP module to draft with")
        # One less than the model's context: the module reads a place together with the next token.
        limit = model.config.max_position_embeddings - 1
        super().__init__(cache, most, limit, few=few_queries(model.config))
        self.model = model

    def _settled(self, done: Pass, readings: list[Reading]) -> Tensor:
        rows: list[int] = []
        following: list[int] = []
        for reading in readings:
            rows += range(reading.row, reading.row + reading.count)
            first = reading.length + 1
            following += reading.sequence.tokens[first : first + reading.count]
        device = done.hidden_ND.device
        states_ND = done.hidden_ND[torch.tensor(rows, device=device)]
        return self._onward(states_ND, torch.tensor(following, device=device), readings)

    def _onward(self, states_ND: Tensor, next_N: Tensor, readings: list[Reading]) -> Tensor:
        positions_1N, groups = self._where(readings, states_ND.device)
        context = self.model.context(next_N[None], positions_1N, groups=groups)
        return self.model.predict_ahead(states_ND[None], next_N[None], 0, context).x_BTD[0]

    def _logits(self, states_BD: Tensor) -> Tensor:
        return self.model.logits(states_BD)
