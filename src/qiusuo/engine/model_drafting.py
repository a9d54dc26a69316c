"""Drafts of another, smaller model of the same vocabulary (arXiv:2211.17192).

It reads the tokens that the large model's passes settle, into a cache of its own on the same
pages, and then the last known token, whose successor it guesses. That token it reads again when it
is settled: one row more in a pass that would read its weights all the same.
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


class ModelDrafter(CachedDrafter):
    """``cache``: the draft model's, beside the model's (``Engine(draft_model=...)``). ``most``:
    tokens to guess at most. Sequences beyond the draft model's context go on without drafts."""

    ahead = 1

    def __init__(self, draft_model: Transformer, cache: PagedCache, most: int = 4) -> None:
        config = draft_model.config
        super().__init__(cache, most, config.max_position_embeddings, few_queries(config))
        self.model = draft_model

    def _settled(self, done: Pass, readings: list[Reading]) -> Tensor:
        tokens = [
            token
            for reading in readings
            for token in reading.sequence.tokens[reading.length : reading.length + reading.count]
        ]
        return self._read(torch.tensor(tokens, device=self._device), readings)

    def _onward(self, states_BD: Tensor, guessed_B: Tensor, readings: list[Reading]) -> Tensor:
        return self._read(guessed_B, readings)

    def _read(self, tokens_N: Tensor, readings: list[Reading]) -> Tensor:
        positions_1N, groups = self._where(readings, self._device)
        return self.model(tokens_N[None], positions_1N, groups=groups).x_BTD[0]

    def _logits(self, states_BD: Tensor) -> Tensor:
        return self.model.logits(states_BD)

    @property
    def _device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device
