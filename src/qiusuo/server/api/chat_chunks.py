"""Answers of the chat API, chunk by chunk and whole, in DeepSeek's shape.

A model that thinks opens with ``content: null`` and says in every later delta which of the two
texts it is not; the usage rides on the last chunk that ends an answer, whether it was asked for or
not (``stream_options.include_usage`` only adds a null to the chunks before it). The tests hold
these against the chunks of ``deepseek-recipe``.
"""

from __future__ import annotations

import hashlib
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.asking import Message, Usage
from qiusuo.engine.sampler import Drawn
from qiusuo.server.api.token_texts import TokenTexts
from qiusuo.server.job import Job
from qiusuo.server.money import told
from qiusuo.server.registry import ServedModel

LETTERS = string.ascii_letters + string.digits
KNOWN_REASONS = ("stop", "length", "tool_calls", "content_filter")
Chunk = dict[str, Any]


@dataclass
class ChatShape:
    """One response. ``thinking``: whether its model was asked to think. ``texts``: where
    log-probabilities were asked for. ``null_usage``: told in every chunk but the last."""

    id: str
    created: int
    model: str
    fingerprint: str
    thinking: bool
    null_usage: bool = False
    texts: TokenTexts | None = None
    _calls: dict[tuple[int, int], str] = field(default_factory=dict)

    # -- chunks -----------------------------------------------------------------------------

    def opening(self, choice: int) -> Chunk:
        delta: Chunk = {"role": "assistant", "content": "", "reasoning_content": ""}
        if self.thinking:
            delta["content"] = None
        else:
            del delta["reasoning_content"]
        return self._chunk(choice, delta)

    def piece(self, choice: int, event: Event) -> Chunk | None:
        """None for an event that no delta tells."""
        match event.kind:
            case Kind.THOUGHT:
                delta: Chunk = {"content": None, "reasoning_content": event.text}
            case Kind.CONTENT:
                delta = self._content(event.text)
            case Kind.CALL_BEGIN:
                delta = {"tool_calls": [self._call(choice, event.index or 0, event.name or "", "")]}
            case Kind.ARGUMENTS:
                call = {"index": event.index, "function": {"arguments": event.text}}
                delta = {"tool_calls": [call]}
            case _:
                return None
        logprobs = None
        if self.texts is not None and event.drawn:
            which = "reasoning_content" if event.kind is Kind.THOUGHT else "content"
            logprobs = {which: self._tokens(event.drawn)}
        return self._chunk(choice, delta, logprobs)

    def closing(self, choice: int, reason: str) -> Chunk:
        """The end of one answer; the last one's gets the usage as well."""
        return self._chunk(choice, self._content(""), reason=finish_reason(reason))

    def _chunk(
        self, choice: int, delta: Chunk, logprobs: Chunk | None = None, reason: str | None = None
    ) -> Chunk:
        told: Chunk = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [
                {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            ],
        }
        if self.null_usage:
            told["usage"] = None
        return told

    def _content(self, text: str) -> Chunk:
        delta: Chunk = {"content": text}
        if self.thinking:
            delta["reasoning_content"] = None
        return delta

    # -- whole ------------------------------------------------------------------------------

    def whole(self, messages: Sequence[Message], usage: Chunk) -> Chunk:
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(place, one) for place, one in enumerate(messages)],
            "usage": usage,
            "system_fingerprint": self.fingerprint,
        }

    def _choice(self, place: int, answer: Message) -> Chunk:
        message: Chunk = {"role": "assistant", "content": answer.content}
        if self.thinking or answer.reasoning_content:
            message["reasoning_content"] = answer.reasoning_content or ""
        if answer.tool_calls:
            functions = [call["function"] for call in answer.tool_calls]
            message["tool_calls"] = [
                self._call(place, index, one["name"], one["arguments"])
                for index, one in enumerate(functions)
            ]
        logprobs = None
        if self.texts is not None:
            logprobs = {"content": self._tokens(answer.content_drawn)}
            if answer.reasoning_drawn:
                logprobs["reasoning_content"] = self._tokens(answer.reasoning_drawn)
        return {
            "index": place,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason(answer.finish_reason),
        }

    # -- parts ------------------------------------------------------------------------------

    def _call(self, choice: int, index: int, name: str, arguments: str) -> Chunk:
        function = {"name": name, "arguments": arguments}
        identity = self._calls.setdefault((choice, index), call_id(index))
        return {"index": index, "id": identity, "type": "function", "function": function}

    def _tokens(self, drawn: Sequence[Drawn]) -> list[Chunk]:
        assert self.texts is not None
        return [self.texts.told(one) for one in drawn]


def call_id(index: int) -> str:
    return f"call_{index:02d}_" + "".join(secrets.choice(LETTERS) for _ in range(24))


def finish_reason(reason: str) -> str:
    """What the server cut off, for its own reasons, is not told as an answer that is whole."""
    return reason if reason in KNOWN_REASONS else "insufficient_system_resource"


def fingerprint(model: ServedModel) -> str:
    """Of the model as it was loaded: the same answer to the same seed under the same one."""
    named = f"{model.name} {model.source} {model.created}"
    return "fp_" + hashlib.sha256(named.encode("utf-8", "replace")).hexdigest()[:10]


def usage_told(usage: Usage, thinking: bool) -> Chunk:
    """Hits and misses add up to the prompt."""
    hit = usage.cached_tokens
    details = {"completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": hit},
        **(details if thinking or usage.reasoning_tokens else {}),
        "prompt_cache_hit_tokens": hit,
        "prompt_cache_miss_tokens": usage.prompt_tokens - hit,
    }


def extension(jobs: Sequence[Job], completion_tokens: int, currency: str) -> Chunk:
    """Cost (an exact decimal) and speed of what was settled; the times of the slowest."""
    costs = [job.cost for job in jobs if job.cost is not None]
    seconds = max((job.seconds or 0.0 for job in jobs), default=0.0)
    firsts = [job.first_token_seconds for job in jobs if job.first_token_seconds is not None]
    first = min(firsts, default=None)
    writing = seconds - (first or 0.0)
    speed = (completion_tokens - 1) / writing if completion_tokens > 1 and writing > 0 else None
    return {
        "cost": told(sum(costs)) if len(costs) == len(jobs) else None,
        "currency": currency,
        "seconds": round(seconds, 4),
        "ttft": None if first is None else round(first, 4),
        "tokens_per_second": None if speed is None else round(speed, 2),
    }
