"""The model in training, answering through the engine: the one sampler there is.

In float32 the engine runs on the very modules that learn; nothing is copied but what it derives
from the weights. In bfloat16 it has a model of its own, whose weights are swapped in place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits
from qiusuo.engine.paged_cache import PAGE_TOKENS, PagedCache
from qiusuo.model.transformer import Transformer
from qiusuo.training.lora import LoRA

PROMPT_TOKENS = 256  # that the cache is made for; with longer prompts fewer run at a time
WIDE = 512  # hidden size from which bfloat16 is worth a copy of the weights
STEP_TOKENS = 4096  # of one pass: there is nobody to keep waiting


def spoken_dtype(model: Transformer) -> torch.dtype:
    """What a model is measured and sampled in where nothing is learnt from it: float32, exact and
    no slower, where it is small; bfloat16 where its matrices are what takes the time."""
    return torch.bfloat16 if model.config.hidden_size >= WIDE else torch.float32


class Speaker:
    """``answers`` of at most ``max_tokens`` tokens run side by side. Without a tokenizer the engine
    gives tokens and no text, and is a third faster for it."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        adapter: LoRA | None,
        dtype: torch.dtype,
        *,
        answers: int,
        max_tokens: int,
    ) -> None:
        self.model, self.adapter = model, adapter
        self.own = dtype != torch.float32
        spoken = _copied(model, adapter, dtype) if self.own else model
        self.lm = sampler_of(spoken, tokenizer, answers=answers, max_tokens=max_tokens)

    @contextmanager
    def speaking(self) -> Iterator[LanguageModel]:
        """The model with the weights of this moment."""
        engine = self.lm.engine
        if self.own:
            engine.swap_weights(weights_of(self.model, self.adapter))
            yield self.lm
        elif self.adapter is not None:
            with self.adapter.merged():
                engine.swap_weights({})
                yield self.lm
            self.model.train()
        else:
            engine.swap_weights({})
            yield self.lm
            self.model.train()


def sampler_of(
    model: Transformer, tokenizer: Tokenizer | None, *, answers: int, max_tokens: int
) -> LanguageModel:
    """An engine on the model, with room for just that."""
    weight = model.model.embed_tokens.weight
    pages = answers * (2 + (PROMPT_TOKENS + max_tokens) // PAGE_TOKENS)
    limits = Limits(
        cache_bytes=pages * PagedCache.page_bytes(model.config, weight.dtype),
        step_tokens=STEP_TOKENS,
        max_running=answers,
        prefix_cache=False,
    )
    return LanguageModel(model, tokenizer, limits, draft="none")


def weights_of(model: Transformer, adapter: LoRA | None) -> dict[str, Tensor]:
    """The weights of this moment, the adapter inside."""
    state: dict[str, Tensor] = model.state_dict()
    return state if adapter is None else state | adapter.merged_weights()


def in_dtype(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The very model, frozen, to be asked in that type."""
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(dtype)  # not the routers' biases: those stay float32
    return model


def _copied(model: Transformer, adapter: LoRA | None, dtype: torch.dtype) -> Transformer:
    """The model in another type, without the adapter's hooks: it gets weights with it inside."""
    with nullcontext() if adapter is None else adapter.disabled():
        return in_dtype(copy.deepcopy(model), dtype)
