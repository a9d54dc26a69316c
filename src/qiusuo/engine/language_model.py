"""The public face of a model: weights and tokenizer together, ready to read and to write."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qiusuo.checkpoint.export import export
from qiusuo.checkpoint.load import checkpoint_of
from qiusuo.checkpoint.stored import NO_SAMPLING
from qiusuo.data.chat_template import Message as GivenMessage
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.answer_events import Event
from qiusuo.engine.answering import OnEvent
from qiusuo.engine.asking import (
    Completion,
    Message,
    beside_the_words,
    prepare_chat,
    prepare_text,
    worth,
)
from qiusuo.engine.constraint import Constraint, Grammars
from qiusuo.engine.core import Engine
from qiusuo.engine.drafting import NgramDrafter
from qiusuo.engine.driving import Driver
from qiusuo.engine.limits import Limits
from qiusuo.engine.model_drafting import ModelDrafter
from qiusuo.engine.mtp_drafting import MTPDrafter
from qiusuo.engine.paged_cache import check_cache
from qiusuo.engine.request import RequestError, check_tokens
from qiusuo.model.config import ModelConfig
from qiusuo.model.transformer import Transformer

# T tokens, W vocabulary.

DRAFTS = ("auto", "mtp", "ngram", "none")


class LanguageModel:
    """A model and its tokenizer (None where a folder has none: then token ids only).

    ``limits``: of the engine. ``draft``: "mtp", "ngram" or "none"; "auto" takes MTP where the
    model has a module for it; or another, smaller LanguageModel of the same vocabulary.
    ``sampling``: what its makers recommend; a server takes it where a client asks for nothing.
    ``cache``: "int8" keeps the engine's entries so, in 58% of bfloat16's bytes for V3."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        limits: Limits | None = None,
        draft: str | LanguageModel = "auto",
        sampling: Mapping[str, float] = NO_SAMPLING,
        cache: str | None = None,
    ) -> None:
        check_cache(cache)
        if isinstance(draft, LanguageModel):
            _check_draft_model(draft, model, tokenizer)
        elif draft not in DRAFTS:
            raise ValueError(f"draft {draft!r} is not one of {', '.join(DRAFTS)}")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.limits, self.draft = limits or Limits(), draft
        self.sampling = sampling
        # Holds none of this object: its memory is free as soon as nobody holds it.
        self.driver = Driver(
            partial(_made_engine, self.model, tokenizer, self.limits, draft, cache)
        )

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def engine(self) -> Engine:
        """Made when it is first needed: it takes memory for its cache."""
        return self.driver.engine

    @property
    def drafting(self) -> str:
        """How next tokens are guessed: "mtp", "ngram", "model" or "none"."""
        return _drafting(self.draft, self.config)

    def describe(self) -> str:
        """One line for people: the cache, what it holds, and how next tokens are guessed."""
        return f"{self.engine.describe()}; drafts: {self.drafting}"

    def report(self) -> dict[str, Any]:
        """What the engine has done since it began, in figures: tokens and passes, hits in the
        cache, and of drafts what they brought and cost."""
        return {"drafting": self.drafting} | self.engine.statistics.told()

    @cached_property
    def grammars(self) -> Grammars:
        tokenizer = self.needed_tokenizer()
        return Grammars(tokenizer, self.config.vocab_size, self.stop_ids)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Float32 logits [T, W] after each of these tokens."""
        check_tokens(self.config, token_ids)
        tokens_BT = torch.tensor([list(token_ids)], device=self._device)
        return self.model.logits(self.model(tokens_BT).x_BTD)[0]

    # -- texts ------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        n: int = 1,
        best_of: int | None = None,
        constraint: Constraint | None = None,
        priority: int = 0,
        deadline: float | None = None,
        namespace: str = "",
        keep_experts: bool = False,
        **sampling: Any,
    ) -> list[Completion]:
        """Continue texts (a beginning-of-text token is put before each) or token ids as given.

        ``sampling``: the fields of ``Sampling``. ``n`` answers to each prompt, side by side in the
        list; of ``best_of`` those with the highest mean log-probability. Equal prompts draw apart.
        ``priority``, ``deadline`` (of ``time.monotonic()``), ``namespace`` and ``keep_experts`` as
        in ``Request``. Raises RequestError or ValueError for what cannot be answered, before
        anything is."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list: write generate([text])")
        if best_of is not None and best_of < n:
            raise RequestError(f"best_of {best_of} is less than n {n}")
        each = best_of or n
        request = beside_the_words(priority, deadline, namespace, keep_experts)
        groups = [  # all or none
            prepare_text(
                self,
                prompt,
                {"n": each, "first_choice": row * each, **request},
                constraint=constraint,
                what=f"prompt {row}",
                **sampling,
            )
            for row, prompt in enumerate(prompts)
        ]
        completions = []
        for told in self.driver.answers(groups):
            if best_of is not None:
                told.sort(key=worth, reverse=True)
            completions += told[:n]
        return completions

    # -- conversations ----------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[GivenMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        thinking_budget: int | None = None,
        constraint: Constraint | None = None,
        continue_last: bool = False,
        must_call: str | bool = False,
        allow_calls: bool = True,
        priority: int = 0,
        deadline: float | None = None,
        namespace: str = "",
        keep_experts: bool = False,
        on_event: OnEvent | None = None,
        **sampling: Any,
    ) -> Message:
        """Answer a conversation through the model's own template.

        ``thinking`` asks templates that know both for a thought first (R1's always opens one);
        ``thinking_budget`` is how many tokens it may have. ``constraint`` holds for the answer, not
        for the thought. ``continue_last``: go on where the last message, the assistant's, ends.
        ``must_call``: True for a call of one or more of the tools, or the name of one;
        ``allow_calls=False`` hides them. ``priority``, ``deadline``, ``namespace`` and
        ``keep_experts`` as in ``generate``. ``on_event`` hears the answer grow. Raises DataError
        for messages that the template refuses or the context cannot hold."""
        asked = prepare_chat(
            self,
            messages,
            beside_the_words(priority, deadline, namespace, keep_experts),
            tools=tools,
            thinking=thinking,
            thinking_budget=thinking_budget,
            constraint=constraint,
            continue_last=continue_last,
            must_call=must_call,
            allow_calls=allow_calls,
            **sampling,
        )
        [[message]] = self.driver.answers([asked], on_event)
        return message

    def stream(
        self,
        messages: Sequence[GivenMessage],
        *,
        priority: int = 0,
        deadline: float | None = None,
        namespace: str = "",
        keep_experts: bool = False,
        **options: Any,
    ) -> Generator[Event, None, Message]:
        """``chat``, with its options, as an iterator over the events of the answer. Its value (of
        ``yield from``) is the message; closed early, the answer is cancelled, at the latest when
        whoever drives the engine at that moment is done. The engine goes on only while some
        iterator is asked for more."""
        request = beside_the_words(priority, deadline, namespace, keep_experts)
        return self.driver.stream(prepare_chat(self, messages, request, **options))

    # -- what it is made of -----------------------------------------------------------------

    def save(
        self, place: str | Path, format: str | None = None, dtype: str | torch.dtype | None = None
    ) -> Path:
        """Write the model and its tokenizer: ``format`` "hf" for a folder, "gguf" for a file, None
        by the name. ``dtype`` as ``qiusuo export`` knows it; None keeps the weights' own."""
        name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
        return export(checkpoint_of(self.model, self.tokenizer, self.sampling), place, format, name)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those of the config, and the tokenizer's own."""
        eos = self.config.eos_token_id
        ends: list[int | None] = list(eos) if isinstance(eos, tuple) else [eos]
        if self.tokenizer is not None:
            ends.append(self.tokenizer.eos_id)
        return frozenset(end for end in ends if end is not None)

    @property
    def _device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    def needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer.json: give token ids")
        return self.tokenizer

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text to continue, a beginning-of-text token before them."""
        tokenizer = self.needed_tokenizer()
        return [*tokenizer.text_start, *tokenizer.encode(text)]


def _drafting(draft: str | LanguageModel, config: ModelConfig) -> str:
    if isinstance(draft, LanguageModel):
        return "model"
    if draft == "auto":
        return "mtp" if config.num_nextn_predict_layers > 0 else "none"
    return draft


def _made_engine(
    model: Transformer,
    tokenizer: Tokenizer | None,
    limits: Limits,
    draft: str | LanguageModel,
    cache: str | None,
) -> Engine:
    draft_model = draft.model if isinstance(draft, LanguageModel) else None
    engine = Engine(model, limits, draft_model=draft_model, cache=cache)
    drafting = _drafting(draft, model.config)
    match drafting:
        case "mtp":
            engine.drafter = MTPDrafter(model, engine.cache)
        case "model":
            [beside] = engine.cache.beside
            engine.drafter = ModelDrafter(engine.models[1], beside)
        case "ngram":
            engine.drafter = NgramDrafter()
    if limits.prefix_folder is not None:
        words = "" if tokenizer is None else tokenizer.fingerprint
        engine.keep_on_disk(f"{words} mtp={drafting == 'mtp'}")
    return engine


def _check_draft_model(
    draft: LanguageModel, model: Transformer, tokenizer: Tokenizer | None
) -> None:
    """ValueError unless a token id means the same to both."""
    words, drafted = model.config.vocab_size, draft.config.vocab_size
    if words != drafted:
        raise ValueError(
            f"the draft model has a vocabulary of {drafted:,} and the model one of {words:,}: "
            "drafts need the same"
        )
    if tokenizer is None or draft.tokenizer is None:
        return
    if tokenizer.fingerprint != draft.tokenizer.fingerprint:
        raise ValueError("the draft model's tokenizer is not the model's: drafts need the same")
