"""From what a caller asks to a request, and from a finished sequence to what the caller gets.

The one way in and out for calls that wait (driving.py) and for streams (running.py). What
may take long (rendering a template, tokenising, compiling a grammar) is done in ``prepare_*``,
which only reads the engine's limits and so may run in any thread. ``Asked.follow`` and ``told``
belong to whoever drives the engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from qiusuo.data.chat_template import Message as GivenMessage
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.tool_format import ToolFormat
from qiusuo.data.unfinished_turn import Turn, turn_so_far
from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.answer_stream import AnswerStream
from qiusuo.engine.answering import Answering, OnEvent
from qiusuo.engine.constraint import Constraint, Matcher
from qiusuo.engine.forced_calls import forced_matchers, never_calling
from qiusuo.engine.request import Request, RequestError
from qiusuo.engine.request import Sequence as Answer
from qiusuo.engine.sampler import Drawn
from qiusuo.engine.sampling import Sampling
from qiusuo.engine.tool_calls import format_of

if TYPE_CHECKING:
    from qiusuo.engine.language_model import LanguageModel

CHAT_TOKENS = 1024  # of an answer, where the caller sets no limit
ALONE: Mapping[str, Any] = MappingProxyType({})  # a request that asks for nothing among others

T = TypeVar("T", "Message", "Completion")


@dataclass(frozen=True)
class Usage:
    """Tokens of a turn. ``cached_tokens`` of the prompt were found in the cache."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Completion:
    """``text`` leaves out the end token; ``token_ids`` and ``logprobs`` have it. ``drawn`` and
    ``prompt_drawn``: the likeliest alternatives, where asked for. ``versions``: of the weights, for
    each token. ``experts``: the routers' choices [tokens, MoE layers, K] of prompt and answer but
    for the last token, where asked for. ``finish_reason`` "error" has its reason in ``error``."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    usage: Usage = field(repr=False, compare=False)  # the same answer may find more in the cache
    drawn: list[Drawn] = field(default_factory=list, repr=False)
    prompt_drawn: list[Drawn] = field(default_factory=list, repr=False)
    versions: list[int] = field(default_factory=list, repr=False)
    experts: Tensor | None = field(default=None, repr=False)
    error: str | None = None


@dataclass(frozen=True)
class Message:
    """A model's turn of a conversation. ``reasoning_content`` is its thought without the marks,
    None where it had none; ``tool_calls`` as OpenAI's and DeepSeek's API write them; ``drawn`` and
    ``versions`` as in ``Completion``. ``reasoning_drawn`` and ``content_drawn``: those of the
    tokens drawn that gave the thought and the content their text (see ``Event``), where
    log-probabilities were asked for. Of a turn that was continued all of it is only what is new."""

    content: str
    reasoning_content: str | None
    tool_calls: list[dict[str, Any]]
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    drawn: list[Drawn] = field(default_factory=list, repr=False)
    reasoning_drawn: list[Drawn] = field(default_factory=list, repr=False)
    content_drawn: list[Drawn] = field(default_factory=list, repr=False)
    versions: list[int] = field(default_factory=list, repr=False)
    experts: Tensor | None = field(default=None, repr=False)  # as in ``Completion``
    role: str = "assistant"


@dataclass(frozen=True)
class Asked(Generic[T]):
    """A request, and how its answers are followed. ``told(sequence, answering)`` is what the caller
    gets of an ended one; RequestError where it ended in an error."""

    request: Request
    told: Callable[[Answer, Answering | None], T]
    tokenizer: Tokenizer | None
    matchers: tuple[Matcher, ...] = ()  # one for each answer, or none
    thought_open: bool | None = None
    continued: bool = False  # the answer goes on with words that stand in the prompt
    calls: ToolFormat | None = None
    thinking_budget: int | None = None

    def follow(
        self, sequences: Sequence[Answer], listeners: Sequence[OnEvent | None]
    ) -> list[Answering | None]:
        """Hang on the sequences of the submitted request, before they get a token. None for each
        where there is no tokenizer to write text with."""
        if self.tokenizer is None:
            return [None] * len(sequences)
        matchers = self.matchers or (None,) * len(sequences)
        stops = self.request.sampling.stop
        return [
            Answering(
                sequence,
                AnswerStream(
                    self.tokenizer,
                    self.thought_open,
                    stops,
                    self.calls,
                    continued=self.continued,
                    keep_drawn=self.request.sampling.logprobs is not None,
                ),
                tokenizer=self.tokenizer,
                thinking_budget=self.thinking_budget,
                matcher=matcher,
                on_event=on_event,
            )
            for sequence, matcher, on_event in zip(sequences, matchers, listeners, strict=True)
        ]


def worth(one: Completion) -> tuple[bool, float]:
    """By mean log-probability, behind all others what failed or was ended from outside: of an
    answer of no tokens the mean would be the best."""
    whole = one.finish_reason in ("stop", "length")
    return whole, sum(one.logprobs) / max(1, len(one.logprobs))


def beside_the_words(
    priority: int, deadline: float | None, namespace: str, keep_experts: bool
) -> dict[str, Any]:
    """What a call asks for beside its words, as fields of ``Request`` but ``n``."""
    return {
        "priority": priority,
        "deadline": deadline,
        "namespace": namespace,
        "keep_experts": keep_experts,
    }


def prepare_chat(
    lm: LanguageModel,
    messages: Sequence[GivenMessage],
    request: Mapping[str, Any] = ALONE,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = False,
    thinking_budget: int | None = None,
    constraint: Constraint | None = None,
    continue_last: bool = False,
    must_call: str | bool = False,
    allow_calls: bool = True,
    **sampling: Any,
) -> Asked[Message]:
    """A conversation through the model's own template. ``request``: fields of ``Request`` (``n``,
    ``priority`` and so on); ``sampling``: of ``Sampling``; the rest as in ``LanguageModel.chat``.

    ``continue_last``: the last message is the assistant's, and the answer goes on where it ends
    (see ``turn_so_far``). ``must_call``: True for a call of one or more tools, a name for one call
    of that tool, after the thought; a ``constraint`` then has no content to hold for.
    ``allow_calls=False`` hides the tools from the model, and keeps it from beginning a call.

    DataError, RequestError or ValueError for what cannot be answered."""
    tokenizer = lm.needed_tokenizer()
    if thinking_budget is not None and (
        not isinstance(thinking_budget, int) or thinking_budget < 0
    ):
        raise RequestError(f"thinking_budget must be 0 or more tokens, not {thinking_budget!r}")
    options = Sampling(**({"max_tokens": CHAT_TOKENS} | sampling))
    if not allow_calls:
        tools, options = None, never_calling(tokenizer, options)
    prompt = tokenizer.apply_chat_template(
        messages, thinking=thinking, tools=tools, continue_last=continue_last
    )
    turn = turn_so_far(messages, thinking) if continue_last else Turn()
    thought_open = turn.open if turn.begun else tokenizer.opens_thought(prompt)
    if len(prompt) >= lm.engine.capacity:
        raise DataError(
            f"the conversation has {len(prompt)} tokens and leaves no room for an answer: the "
            f"context holds {lm.engine.capacity}; shorten it, or begin anew"
        )
    asked = Request(tuple(prompt), options, lm.stop_ids, **dict(request))
    lm.engine.check(asked, "the conversation")
    if must_call is False:
        matchers = _matchers(lm, constraint, asked.n)
    else:
        matchers = forced_matchers(
            lm.grammars, tokenizer, tools or (), must_call, asked.n, thought_open
        )
    return Asked(
        asked,
        _message,
        tokenizer,
        matchers=matchers,
        thought_open=thought_open,
        continued=turn.continued,
        calls=format_of(tokenizer) if tools else None,
        thinking_budget=thinking_budget,
    )


def prepare_text(
    lm: LanguageModel,
    prompt: str | Sequence[int],
    request: Mapping[str, Any] = ALONE,
    *,
    constraint: Constraint | None = None,
    what: str = "the prompt",
    **sampling: Any,
) -> Asked[Completion]:
    """A text to continue (a beginning-of-text token is put before it), or token ids as given."""
    token_ids = lm.encode_text(prompt) if isinstance(prompt, str) else list(map(index, prompt))
    options = Sampling(**sampling)
    asked = Request(tuple(token_ids), options, lm.stop_ids, **dict(request))
    lm.engine.check(asked, what)
    if options.stop:  # is about text
        lm.needed_tokenizer()
    matchers = _matchers(lm, constraint, asked.n)
    return Asked(asked, _completion, lm.tokenizer, matchers=matchers)


def _matchers(lm: LanguageModel, constraint: Constraint | None, n: int) -> tuple[Matcher, ...]:
    return () if constraint is None else tuple(lm.grammars.matcher(constraint) for _ in range(n))


def _usage(sequence: Answer, answering: Answering | None) -> Usage:
    return Usage(
        prompt_tokens=len(sequence.request.prompt),
        completion_tokens=sequence.answered,
        reasoning_tokens=0 if answering is None else answering.stream.reasoning_tokens,
        cached_tokens=sequence.cached_tokens,
    )


def _finish(sequence: Answer, answering: Answering | None) -> list[Event]:
    """Whatever happened, what was held back is given first."""
    events = [] if answering is None else answering.finish()
    if sequence.finish_reason == "error":
        raise RequestError(sequence.error)
    return events


def _text(events: list[Event], kind: Kind) -> str:
    return "".join(event.text for event in events if event.kind is kind)


def _drawn(events: list[Event], kind: Kind) -> list[Drawn]:
    return [one for event in events if event.kind is kind for one in event.drawn]


def _completion(sequence: Answer, answering: Answering | None) -> Completion:
    return _completed(sequence, answering, _finish(sequence, answering))


def failed(sequence: Answer) -> Completion:
    """What there is of an answer that ended in an error, for a caller who asked for others too."""
    return _completed(sequence, None, [])


def _completed(sequence: Answer, answering: Answering | None, events: list[Event]) -> Completion:
    return Completion(
        text=_text(events, Kind.CONTENT),
        token_ids=list(sequence.answer),
        logprobs=[one.logprob for one in sequence.drawn],
        finish_reason=sequence.finish_reason or "",
        usage=_usage(sequence, answering),
        drawn=sequence.drawn,
        prompt_drawn=sequence.prompt_drawn,
        versions=sequence.versions,
        experts=torch.cat(sequence.experts) if sequence.experts else None,
        error=sequence.error,
    )


def _message(sequence: Answer, answering: Answering | None) -> Message:
    calls: list[dict[str, Any]] = []
    events = _finish(sequence, answering)
    for event in events:
        if event.kind is Kind.CALL_BEGIN:
            function = {"name": event.name, "arguments": ""}
            identity = f"call_{uuid.uuid4().hex[:24]}"
            calls.append({"id": identity, "type": "function", "function": function})
        elif event.kind is Kind.ARGUMENTS:
            calls[-1]["function"]["arguments"] += event.text
    reason = sequence.finish_reason or ""
    return Message(
        content=_text(events, Kind.CONTENT),
        reasoning_content=_text(events, Kind.THOUGHT) or None,
        tool_calls=calls,
        token_ids=list(sequence.answer),
        finish_reason="tool_calls" if calls and reason == "stop" else reason,
        usage=_usage(sequence, answering),
        drawn=sequence.drawn,
        reasoning_drawn=_drawn(events, Kind.THOUGHT),
        content_drawn=_drawn(events, Kind.CONTENT),
        versions=sequence.versions,
        experts=torch.cat(sequence.experts) if sequence.experts else None,
    )
