"""The public face of a model: weights and tokenizer together, ready to read and to write."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qiusuo.checkpoint.export import export
from qiusuo.checkpoint.load import checkpoint_of
from qiusuo.data.chat_template import Message as GivenMessage
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.answer_stream import AnswerStream
from qiusuo.engine.answering import Answering
from qiusuo.engine.constraint import Constraint, Grammars, Matcher
from qiusuo.engine.core import Engine, Limits
from qiusuo.engine.drafting import Drafter, NgramDrafter
from qiusuo.engine.mtp_drafting import MTPDrafter
from qiusuo.engine.request import Request, RequestError, check_tokens
from qiusuo.engine.request import Sequence as Answer
from qiusuo.engine.sampler import Drawn
from qiusuo.engine.sampling import Sampling
from qiusuo.engine.tool_calls import format_of
from qiusuo.model.config import ModelConfig
from qiusuo.model.transformer import Transformer

# T tokens, W vocabulary.

DRAFTS = ("auto", "mtp", "ngram", "none")


@dataclass(frozen=True)
class Completion:
    """``text`` leaves out the end token; ``token_ids`` and ``logprobs`` have it. ``drawn`` and
    ``prompt_drawn``: the likeliest alternatives, where asked for. ``versions``: of the weights, for
    each token. ``experts``: the routers' choices [tokens, MoE layers, K] of prompt and answer but
    for the last token, where asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    drawn: list[Drawn] = field(default_factory=list, repr=False)
    prompt_drawn: list[Drawn] = field(default_factory=list, repr=False)
    versions: list[int] = field(default_factory=list, repr=False)
    experts: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Usage:
    """Tokens of a turn. ``cached_tokens`` of the prompt were found in the cache."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Message:
    """A model's turn of a conversation. ``reasoning_content`` is its thought without the marks,
    None where it had none; ``tool_calls`` as OpenAI's and DeepSeek's API write them."""

    content: str
    reasoning_content: str | None
    tool_calls: list[dict[str, Any]]
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    role: str = "assistant"


OnEvent = Callable[[Event], None]
"""Called with each piece of a thought, an answer or a call as it comes."""


class LanguageModel:
    """A model and its tokenizer (None where a folder has none: then token ids only).

    ``limits``: of the engine. ``draft``: "mtp", "ngram" or "none"; "auto" takes MTP where the
    model has a module for it."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        limits: Limits | None = None,
        draft: str = "auto",
    ) -> None:
        if draft not in DRAFTS:
            raise ValueError(f"draft {draft!r} is not one of {', '.join(DRAFTS)}")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.limits, self.draft = limits or Limits(), draft

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @cached_property
    def engine(self) -> Engine:
        """Made when it is first needed: it takes memory for its cache."""
        engine = Engine(self.model, self.limits)
        drafter = self._drafter(engine)
        if drafter is not None:
            engine.drafter = drafter
        return engine

    def _drafter(self, engine: Engine) -> Drafter | None:
        has_mtp = self.config.num_nextn_predict_layers > 0
        if self.draft == "mtp" or (self.draft == "auto" and has_mtp):
            return MTPDrafter(self.model, engine.cache)
        return NgramDrafter() if self.draft == "ngram" else None

    @cached_property
    def grammars(self) -> Grammars:
        tokenizer = self._needed_tokenizer()
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
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        n: int = 1,
        best_of: int | None = None,
        constraint: Constraint | None = None,
        keep_experts: bool = False,
        **sampling: Any,
    ) -> list[Completion]:
        """Continue texts (a beginning-of-text token is put before each) or token ids as given.

        ``sampling``: the fields of ``Sampling``. ``n`` answers to each prompt, side by side in the
        list; of ``best_of`` those with the highest mean log-probability. Equal prompts draw apart.
        Raises RequestError or ValueError for what cannot be answered, before anything is."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a list: write generate([text])")
        if best_of is not None and best_of < n:
            raise RequestError(f"best_of {best_of} is less than n {n}")
        options = Sampling(**sampling)
        requests = [
            Request(
                prompt=tuple(self._encode(p)),
                sampling=options,
                end_ids=self.stop_ids,
                n=best_of or n,
                first_choice=row * (best_of or n),
                keep_experts=keep_experts,
            )
            for row, p in enumerate(prompts)
        ]
        for row, request in enumerate(requests):  # all or none
            self.engine.check(request, f"prompt {row}")
        if constraint is not None or options.stop:  # both are about text
            self._needed_tokenizer()
        matchers = [self._matcher(constraint) for request in requests for _ in range(request.n)]
        groups = [self.engine.submit(request) for request in requests]
        sequences = [sequence for group in groups for sequence in group]
        finished = iter(list(map(self._follow_text, sequences, matchers)))
        self._run(sequences)
        completions = []
        for group in groups:
            told = [self._completion(sequence, next(finished)) for sequence in group]
            if best_of is not None:
                told.sort(key=lambda one: -sum(one.logprobs) / max(1, len(one.logprobs)))
            completions += told[:n]
        return completions

    def _matcher(self, constraint: Constraint | None) -> Matcher | None:
        return None if constraint is None else self.grammars.matcher(constraint)

    def _follow_text(self, sequence: Answer, matcher: Matcher | None) -> Answering | None:
        if self.tokenizer is None:
            return None
        stream = AnswerStream(self.tokenizer, None, sequence.request.sampling.stop)
        return Answering(sequence, stream, tokenizer=self.tokenizer, matcher=matcher)

    def _completion(self, sequence: Answer, answering: Answering | None) -> Completion:
        self._check_ended(sequence)
        text = ""
        if answering is not None:
            answering.finish()
            text = answering.text(Kind.CONTENT)
        return Completion(
            text=text,
            token_ids=list(sequence.answer),
            logprobs=[one.logprob for one in sequence.drawn],
            finish_reason=sequence.finish_reason or "",
            drawn=sequence.drawn,
            prompt_drawn=sequence.prompt_drawn,
            versions=sequence.versions,
            experts=torch.cat(sequence.experts) if sequence.experts else None,
        )

    # -- conversations ----------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[GivenMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        thinking_budget: int | None = None,
        constraint: Constraint | None = None,
        on_event: OnEvent | None = None,
        **sampling: Any,
    ) -> Message:
        """Answer a conversation through the model's own template.

        ``thinking`` asks templates that know both for a thought first (R1's always opens one);
        ``thinking_budget`` is how many tokens it may have. ``constraint`` holds for the answer, not
        for the thought. ``on_event`` hears the answer grow. Raises DataError for messages that the
        template refuses or the context cannot hold."""
        tokenizer = self._needed_tokenizer()
        prompt = tokenizer.apply_chat_template(messages, thinking=thinking, tools=tools)
        if len(prompt) >= self.engine.capacity:
            raise DataError(
                f"the conversation has {len(prompt)} tokens and leaves no room for an answer: the "
                f"context holds {self.engine.capacity}; shorten it, or begin anew"
            )
        options = Sampling(**({"max_tokens": 1024} | sampling))
        calls = format_of(tokenizer) if tools else None
        matcher = self._matcher(constraint)
        [sequence] = self.engine.submit(Request(tuple(prompt), options, self.stop_ids))
        answering = Answering(
            sequence,
            AnswerStream(tokenizer, tokenizer.opens_thought(prompt), options.stop, calls),
            tokenizer=tokenizer,
            thinking_budget=thinking_budget,
            matcher=matcher,
            on_event=on_event,
        )
        self._run([sequence])
        self._check_ended(sequence)
        answering.finish()
        return _message(sequence, answering)

    def _run(self, sequences: list[Answer]) -> None:
        """Drive the engine until all of these have ended; stopped midway, they are cancelled."""
        try:
            while any(sequence.finish_reason is None for sequence in sequences):
                self.engine.step()
        except BaseException:
            for sequence in sequences:
                self.engine.cancel(sequence)
            raise

    @staticmethod
    def _check_ended(sequence: Answer) -> None:
        if sequence.finish_reason == "error":
            raise RequestError(sequence.error)

    # -- what it is made of -----------------------------------------------------------------

    def save(
        self, place: str | Path, format: str = "hf", dtype: str | torch.dtype | None = None
    ) -> Path:
        """Write the model and its tokenizer: ``format`` "hf" for a folder, "gguf" for a file.
        ``dtype`` as ``qiusuo export`` knows it; None keeps the weights' own."""
        name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
        return export(checkpoint_of(self.model, self.tokenizer), place, format, name)

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

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer.json: give token ids")
        return self.tokenizer

    def _encode(self, text: Any) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        tokenizer = self._needed_tokenizer()
        return [*tokenizer.text_start, *tokenizer.encode(text)]


def _message(sequence: Answer, answering: Answering) -> Message:
    calls: list[dict[str, Any]] = []
    for event in answering.events:
        if event.kind is Kind.CALL_BEGIN:
            function = {"name": event.name, "arguments": ""}
            identity = f"call_{uuid.uuid4().hex[:24]}"
            calls.append({"id": identity, "type": "function", "function": function})
        elif event.kind is Kind.ARGUMENTS:
            calls[-1]["function"]["arguments"] += event.text
    reason = sequence.finish_reason or ""
    return Message(
        content=answering.text(Kind.CONTENT),
        reasoning_content=answering.text(Kind.THOUGHT) or None,
        tool_calls=calls,
        token_ids=list(sequence.answer),
        finish_reason="tool_calls" if calls and reason == "stop" else reason,
        usage=Usage(
            prompt_tokens=len(sequence.request.prompt),
            completion_tokens=sequence.answered,
            reasoning_tokens=answering.stream.reasoning_tokens,
            cached_tokens=sequence.cached_tokens,
        ),
    )
