"""What is asked of the engine, and how far each answer has come."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qiusuo.engine.sampler import Drawn, looks_back
from qiusuo.engine.sampling import Sampling
from qiusuo.model.config import ModelConfig

if TYPE_CHECKING:
    from qiusuo.engine.constraint import Matcher


MOST_ANSWERS = 8192  # to one request
LOOSE_PIECES = 64


class RequestError(ValueError):
    """A request that cannot be served; the message says which part and what would do."""


class EngineError(RuntimeError):
    """The engine cannot be used now: someone else drives it, it was stopped, or it has failed."""


def check_tokens(config: ModelConfig, tokens: SequenceOf[int], what: str = "token_ids") -> None:
    """RequestError for no tokens, more than the context holds, or one outside the vocabulary."""
    if not tokens:
        raise RequestError(f"{what} is empty: give at least one token")
    limit, vocabulary = config.max_position_embeddings, config.vocab_size
    if len(tokens) > limit:
        raise RequestError(f"{what} has {len(tokens)} tokens; the context holds {limit}")
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise RequestError(f"{what}: token id {token} is outside 0..{vocabulary - 1}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


@dataclass(frozen=True)
class Request:
    """``end_ids`` end an answer and are its last token. ``n`` answers; their draws are told apart
    by numbers from ``first_choice`` on. A sampling that draws and has no seed gets one here, from
    the operating system. ``priority``: higher goes first. ``deadline``: of ``time.monotonic()``.
    Requests share beginnings within a ``namespace`` only. ``keep_experts``: return the router's
    choices for every token."""

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    end_ids: frozenset[int] = frozenset()
    n: int = 1
    first_choice: int = 0
    priority: int = 0
    deadline: float | None = None
    namespace: str = ""
    keep_experts: bool = False

    def __post_init__(self) -> None:
        for name in ("n", "first_choice", "priority"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise RequestError(f"{name} must be a whole number, not {value!r}")
        if not 1 <= self.n <= MOST_ANSWERS:
            raise RequestError(f"n must be at least 1 and at most {MOST_ANSWERS}, not {self.n}")
        if not 0 <= self.first_choice < 1 << 62:
            raise RequestError(f"first_choice must not be negative, not {self.first_choice}")
        late = self.deadline
        if late is not None and (not isinstance(late, int | float) or math.isnan(late)):
            raise RequestError(f"deadline must be a time of time.monotonic(), not {late!r}")
        if not isinstance(self.namespace, str) or not _is_unicode(self.namespace):
            raise RequestError(f"namespace must be a text, not {self.namespace!r}")
        if self.sampling.seed is None and self.sampling.temperature > 0:
            seeded = replace(self.sampling, seed=secrets.randbits(64))
            object.__setattr__(self, "sampling", seeded)

    @cached_property
    def looks_back(self) -> bool:
        """Whether a draw depends on the tokens before it, and not on their logits alone."""
        return looks_back(self.sampling)

    @cached_property
    def ends(self) -> frozenset[int]:
        """All tokens that end an answer to it; asked for at every token."""
        own = frozenset() if self.sampling.ignore_eos else self.end_ids
        return own | self.sampling.stop_ids


@dataclass(eq=False)
class Sequence:
    """One answer in the making. ``tokens``: prompt and answer; ``length`` of them are in the cache.

    ``finish_reason``: None while it goes on; "stop" at an end token or a stop string, "length" at
    a limit, "cancelled", "deadline", or "error" with the reason in ``error``."""

    request: Request
    choice: int
    room: int  # tokens the answer may have
    arrival: int
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    length: int = 0
    outdated: bool = False  # what the cache holds of it was made by other weights
    keys: list[bytes] = field(default_factory=list)  # of its full pages
    drawn: list[Drawn] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the weights, for each answer token
    prompt_drawn: list[Drawn] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)  # [tokens, MoE layers, K] of each piece
    routed: int = 0  # tokens that ``experts`` tells of
    loose: int = 0  # of its last pieces, to be joined when they are many
    swapped: bool = False  # some of ``experts`` were chosen by other weights
    refused: tuple[int, int] | None = None  # while it waits: pages free, and of it shared
    cached_tokens: int = 0  # of the prompt, found in the cache before it answered
    finish_reason: str | None = None
    error: str | None = None
    siblings: list[Sequence] = field(default_factory=list)  # wait for this one's prompt
    matcher: Matcher | None = None
    forced: list[int] = field(default_factory=list)  # tokens to come next, whatever is likely
    drafts: list[int] = field(default_factory=list)
    on_token: Callable[[Sequence, Drawn], str | None] | None = None  # gives a reason to finish

    @property
    def answer(self) -> SequenceOf[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def answered(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def add_experts(self, experts_NLK: Tensor) -> None:
        """May be a view of a whole pass: it does not hold that for long."""
        self.experts.append(experts_NLK)
        self.routed += len(experts_NLK)
        self.loose += 1
        if self.loose == LOOSE_PIECES:
            self.experts[-self.loose :] = [torch.cat(self.experts[-self.loose :])]
            self.loose = 0

    def experts_between(self, start: int, stop: int) -> Tensor:
        """A copy of the choices for some of the last tokens, [tokens, MoE layers, K]."""
        parts: list[Tensor] = []
        end = self.routed
        for part in reversed(self.experts):
            begin = end - len(part)
            parts.append(part[max(0, start - begin) : max(0, stop - begin)])
            if begin <= start:
                break
            end = begin
        return torch.cat(parts[::-1])

    @property
    def pending(self) -> int:
        """Known tokens that are not in the cache yet; 1 while it is decoding."""
        return len(self.tokens) - self.length

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first, and is preempted last."""
        return -self.request.priority, self.arrival, self.choice
