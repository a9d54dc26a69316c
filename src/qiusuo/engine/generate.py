"""Batched generation on the latent cache: prefill once, then one token per row and step.

Prefill attends in the expanded form, decoding in the absorbed one. Rows that are finished leave
the batch. A row's answer does not depend on its neighbours: padding is masked, its draws are its
own, and experts have no capacity to fight over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qiusuo.engine.cache import LatentCache
from qiusuo.engine.sampling import Sampling, choose
from qiusuo.model.transformer import Transformer

# B rows, T new tokens, S places in the cache, W vocabulary.

MAX_ROWS = 256
OnToken = Callable[[int, int], None]


@dataclass
class Generated:
    """One row's answer. ``logprobs``: log p of each token under the model itself (temperature 1,
    nothing filtered). ``finish_reason``: "stop" at an end token, "length" at the limit."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    on_token: OnToken | None = None,
) -> list[Generated]:
    """Continue every prompt; ``on_token`` hears of each (row, token) as it is drawn.

    Raises ValueError for a prompt that is empty, holds an id outside the vocabulary, or leaves no
    room for one token in ``max_position_embeddings``."""
    for number, prompt in enumerate(prompts):
        _check_prompt(model, number, prompt)
    answers: list[Generated] = []
    for start in range(0, len(prompts), MAX_ROWS):
        rows = prompts[start : start + MAX_ROWS]
        answers += _Batch(model, rows, sampling, stop_ids, start, on_token).run()
    return answers


class _Batch:
    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        first_row: int,
        on_token: OnToken | None,
    ) -> None:
        self.first_row, self.on_token = first_row, on_token
        self.model, self.sampling, self.stop_ids = model, sampling, stop_ids
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        longest = max(map(len, prompts))
        limit = model.config.max_position_embeddings
        self.room = [min(sampling.max_tokens, limit - len(prompt)) for prompt in prompts]
        capacity = longest + max(self.room)
        self.cache = LatentCache(model.config, len(prompts), capacity, weight.dtype, self.device)
        self.padding_B = torch.tensor([longest - len(p) for p in prompts], device=self.device)
        self.tokens_BT = torch.tensor(
            [[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device
        )
        self.answers = [Generated() for _ in prompts]
        self.rows = list(range(len(prompts)))  # the answer each row of the batch belongs to
        # Philox keyed by (seed, row): a row's draws are the same alone and in company.
        self.draws = [_uniforms(sampling.seed, first_row + row) for row in self.rows]

    @torch.inference_mode()
    def run(self) -> list[Generated]:
        tokens_BT, absorbed = self.tokens_BT, False
        while self.rows:
            logits_BW = self.step(tokens_BT, absorbed)
            uniforms_B = torch.tensor([next(self.draws[row]) for row in self.rows])
            chosen_B = choose(logits_BW, self.sampling, uniforms_B.to(self.device))
            self.record(chosen_B, logits_BW.log_softmax(-1))
            going = self.going(chosen_B)
            kept_B = torch.tensor(going, dtype=torch.long, device=self.device)
            if len(going) < len(self.rows):
                self.rows = [self.rows[place] for place in going]
                self.cache.keep(kept_B)
                self.padding_B = self.padding_B[kept_B]
            tokens_BT, absorbed = chosen_B[kept_B, None], True
        return self.answers

    def step(self, tokens_BT: Tensor, absorbed: bool) -> Tensor:
        """Logits [B, W] after the last of these tokens."""
        start, new = self.cache.length, tokens_BT.shape[1]
        place_T = torch.arange(start, start + new, device=self.device)
        place_S = torch.arange(start + new, device=self.device)
        positions_BT = (place_T - self.padding_B[:, None]).clamp_min(0)
        causal_TS = place_S <= place_T[:, None]
        real_BS = place_S >= self.padding_B[:, None]
        own_TS = place_S == place_T[:, None]  # padding looks at itself, so no row is all masked
        mask_BTS = (causal_TS & real_BS[:, None]) | own_TS
        group = self.cache.group(new, mask_BTS, absorbed)
        hidden = self.model(tokens_BT, positions_BT, groups=(group,))
        self.cache.advance(new)
        return self.model.logits(hidden.x_BTD[:, -1])

    def record(self, chosen_B: Tensor, logprobs_BW: Tensor) -> None:
        picked_B = logprobs_BW.gather(1, chosen_B[:, None]).squeeze(1)
        for row, token, logprob in zip(
            self.rows, chosen_B.tolist(), picked_B.tolist(), strict=True
        ):
            self.answers[row].token_ids.append(token)
            self.answers[row].logprobs.append(logprob)
            if self.on_token is not None:
                self.on_token(self.first_row + row, token)

    def going(self, chosen_B: Tensor) -> list[int]:
        """Places in the batch of the rows that want another token."""
        places = []
        for place, (row, token) in enumerate(zip(self.rows, chosen_B.tolist(), strict=True)):
            if token in self.stop_ids:
                self.answers[row].finish_reason = "stop"
            elif len(self.answers[row].token_ids) < self.room[row]:
                places.append(place)
        return places


def check_tokens(model: Transformer, tokens: Sequence[int], what: str = "token_ids") -> None:
    """Raise ValueError for no tokens, too many, or one outside the vocabulary."""
    if not tokens:
        raise ValueError(f"{what} is empty: give at least one token")
    limit = model.config.max_position_embeddings
    if len(tokens) > limit:
        raise ValueError(f"{what} has {len(tokens)} tokens; the context holds {limit}")
    vocabulary = model.config.vocab_size
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise ValueError(f"{what}: token id {token} is outside 0..{vocabulary - 1}")


def _check_prompt(model: Transformer, number: int, prompt: Sequence[int]) -> None:
    check_tokens(model, prompt, f"prompt {number}")
    limit = model.config.max_position_embeddings
    if len(prompt) == limit:
        raise ValueError(
            f"prompt {number} has {len(prompt)} tokens; the context holds {limit} "
            "and one must be free for the answer"
        )


def _uniforms(seed: int, row: int) -> Iterator[float]:
    import numpy as np

    draws = np.random.Generator(np.random.Philox(key=[seed, row]))
    while True:
        yield float(draws.random())
