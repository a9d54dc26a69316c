"""What the request bodies of several endpoints have in common: fields, their types and ranges.

Types are strict, as in DeepSeek's own parser ("3" is no number), and fields nobody knows are
ignored. What a field may be besides its type is checked apart, because it is answered with another
status, in the words that clients have seen from DeepSeek.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from qiusuo.engine.sampling import MOST_LOGPROBS, MOST_STOPS
from qiusuo.server.api.errors import ApiError

Count = Annotated[int, Field(ge=0)]  # of Rust's unsigned integers: a negative one has a wrong type
Number = FiniteFloat

MOST_SEED = 1 << 63
MOST_USER_BYTES = 512


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


def text_or_list(value: object) -> str:
    """The tag of what is one text or a list of parts."""
    return "(text)" if isinstance(value, str) else "(list)"


def sayable(body: Any) -> Any:
    """ValueError for what a JSON parser lets in and no answer could repeat: NaN, half of a
    character."""
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("there is text in it that is not valid Unicode") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:
        raise ValueError("there is a number in it that JSON has not: NaN or Infinity") from None
    return body


class StreamOptions(Body):
    include_usage: bool | None = None


class SamplingFields(Body):
    """Of chat and of plain completions alike. ``top_k``, ``min_p``, ``repetition_penalty`` and
    ``ignore_eos`` are not in DeepSeek's API; ``qiusuo``: tell cost and speed beside the usage."""

    model: str
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    seed: Count | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    user_id: str | None = None
    qiusuo: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def extended(self) -> bool:
        """Whether cost and speed are wanted."""
        return bool(self.qiusuo) or bool(self.stream and self.include_usage)

    @property
    def asked_for(self) -> str | None:
        """Whom the caller asks for: nothing is shared in the cache between two of them."""
        return self.user_id or self.user or None

    def check(self, most_answers: int) -> None:
        """ApiError 400 for values out of range."""
        within("temperature", self.temperature, 0, 2)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise out_of_range("top_p", "(0, 1.0]")
        within("min_p", self.min_p, 0, 1)
        within("presence_penalty", self.presence_penalty, -2, 2)
        within("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None and self.seed >= MOST_SEED:
            raise out_of_range("seed", "[0, 2^63)")
        within("n", self.n, 1, most_answers)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options should be set along with stream = true")
        for name in ("user", "user_id"):
            if len((getattr(self, name) or "").encode("utf-8", "replace")) > MOST_USER_BYTES:
                raise ApiError(400, f"Invalid {name}: it may have {MOST_USER_BYTES} bytes")

    def sampling(self) -> dict[str, Any]:
        """What is given, as the engine's ``Sampling`` names it."""
        given = {
            name: value
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
                "ignore_eos",
                "seed",
            )
            if (value := getattr(self, name)) is not None
        }
        if self.top_k is not None and self.top_k > 0:  # others write -1 or 0 for "all"
            given["top_k"] = self.top_k
        if self.logit_bias:
            given["logit_bias"] = _token_ids(self.logit_bias)
        return given | dict(n=self.n or 1, stop=stop_strings(self.stop))


def within(name: str, value: float | None, low: int, high: int) -> None:
    """ApiError 400 unless the value, where there is one, lies in the range."""
    if value is not None and not low <= value <= high:
        raise out_of_range(name, f"[{low}, {high}]")


def out_of_range(name: str, valid: str) -> ApiError:
    told = f"Invalid {name} value, the valid range of {name} is {valid}"
    return ApiError(400, told)


def most_tokens(given: int | None, least: int, most: int, default: int) -> int:
    """How long an answer may be; the context may leave less."""
    within("max_tokens", given, least, most)
    return min(default, most) if given is None else given


def top_logprobs(given: int | None) -> int:
    if given is not None and not 0 <= given <= MOST_LOGPROBS:
        valid = f"[0, {MOST_LOGPROBS}]."
        raise out_of_range("top_logprobs", valid)
    return given or 0


def stop_strings(given: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > MOST_STOPS:
        raise ApiError(400, f"Stop string array too long: {len(stops)}")
    if "" in stops:
        where = "stop" if isinstance(given, str) else f"stop[{stops.index('')}]"
        raise ApiError(
            400,
            f"Invalid '{where}': empty string. Expected a string with minimum length 1, but got an "
            "empty string instead.",
        )
    return stops


def _token_ids(biases: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise ApiError(400, "Invalid logit_bias: its keys must be token ids") from None
