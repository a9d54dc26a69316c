"""What a request asks of its answer: how long, how bold, where it stops. How it is drawn from the
logits is in sampler.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field

MOST_LOGPROBS = 20
MOST_STOPS = 16


@dataclass(frozen=True)
class Sampling:
    """``temperature=0`` takes the likeliest token. ``top_k``, ``top_p`` and ``min_p`` narrow what
    is drawn from. ``seed`` makes an answer's draws repeatable, whatever else is in the batch; None
    gives each request one of its own.

    ``repetition_penalty`` looks at prompt and answer, ``presence_penalty`` and
    ``frequency_penalty`` at the answer alone. ``stop`` and ``stop_ids`` end an answer besides the
    model's own end tokens, which ``ignore_eos`` turns off. ``logprobs=k``: tell the log
    probability of the drawn token and the k likeliest; ``prompt_logprobs`` the same of the prompt.

    Raises ValueError, naming key, value and range, for what cannot be."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    _: KW_ONLY
    min_tokens: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}"
            )
        _number("temperature", self.temperature)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or a positive number, not {self.temperature}")
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1)
        _number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.seed is not None:
            _whole("seed", self.seed)
            if not 0 <= self.seed < 1 << 64:
                raise ValueError(f"seed must be in 0..2**64-1, not {self.seed}")
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))
                _within(name, getattr(self, name), 0, MOST_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        # Copies: what a request was checked for is what is drawn.
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_ids", _ids(self.stop_ids))


def _whole(name: str, value: object, least: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def _number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, not {value!r}")


def _within(name: str, value: float, low: float, high: float) -> None:
    _number(name, value)
    if not low <= value <= high:  # NaN is in no range
        raise ValueError(f"{name} must be in {low}..{high}, not {value}")


def _biases(given: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, not be {given!r}")
    for token, bias in given.items():
        _whole("logit_bias: a token id", token, 0)
        _within(f"logit_bias of token {token}", bias, -100, 100)
    return dict(given)


def _stops(given: Iterable[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"stop must be a list of texts, not {given!r}")
    stops = tuple(given)
    if len(stops) > MOST_STOPS:
        raise ValueError(f"stop must hold at most {MOST_STOPS} texts, not {len(stops)}")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop must hold texts of at least one character, not {stop!r}")
    return stops


def _ids(given: Iterable[int]) -> frozenset[int]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"stop_ids must be a set of token ids, not {given!r}")
    ids = tuple(given)
    for token in ids:
        _whole("stop_ids: a token id", token, 0)
    return frozenset(ids)
