"""From the body of a completion request to what the desk is asked.

A prompt is a text, token ids, or a list of either. With a ``suffix`` the text between the two is
wanted: the prompt is then written the way models are taught to fill in the middle, where the
model's vocabulary has the markers for it.
"""

from __future__ import annotations

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import FIM_BEGIN, FIM_END, FIM_HOLE
from qiusuo.engine.sampling import MOST_LOGPROBS
from qiusuo.server.api.errors import ApiError
from qiusuo.server.api.fields import SamplingFields, most_tokens, within
from qiusuo.server.question import TextQuestion
from qiusuo.server.registry import ServedModel
from qiusuo.server.settings import Settings

DEFAULT_TOKENS = 16  # OpenAI's
Prompt = str | list[int]

# What stands before the text, before the suffix and before the middle.
MARKERS = (
    (FIM_BEGIN, FIM_HOLE, FIM_END),  # DeepSeek
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SmolLM
)


class CompletionRequest(SamplingFields):
    """``logprobs``: how many of the likeliest tokens to tell at each place."""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None

    @property
    def each(self) -> int:
        """Answers told of each prompt."""
        return self.n or 1

    @property
    def made(self) -> int:
        """Answers written for each prompt."""
        return self.each if self.best_of is None else self.best_of

    @property
    def wants_text(self) -> bool:
        """Whether any token is wanted beside the prompt's own."""
        return self.max_tokens != 0

    def prompts(self) -> list[Prompt]:
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        if not given:
            raise ApiError(400, "Empty prompt: give a text, token ids, or a list of either")
        return list(given)  # type: ignore[arg-type]

    def questions(self, model: ServedModel, settings: Settings) -> list[TextQuestion]:
        """One for each prompt; ApiError 400 for what cannot be asked."""
        self.check(settings.most_answers)
        self._check(settings)
        prompts = self.prompts()
        if len(prompts) * self.made > settings.most_answers * 8:
            raise ApiError(
                400,
                f"Too many answers: {len(prompts)} prompts of {self.made} each; this server "
                f"writes {settings.most_answers * 8} to one request",
            )
        limit = most_tokens(self.max_tokens, 0, settings.most_tokens, DEFAULT_TOKENS)
        options = self.sampling() | dict(n=self.made, max_tokens=max(1, limit))
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
            if self.echo:
                options["prompt_logprobs"] = self.logprobs
        return [
            TextQuestion(self.model, self._written(model, prompt), options, self.asked_for)
            for prompt in prompts
        ]

    def _check(self, settings: Settings) -> None:
        within("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        within("best_of", self.best_of, self.each, settings.most_answers)
        if self.stream and self.made > self.each:
            raise ApiError(400, "best_of cannot be streamed: the best is known at the end")
        if self.stream and self.echo and self.logprobs is not None:
            raise ApiError(400, "logprobs of an echo cannot be streamed: leave out one")
        if not self.wants_text and not self.echo:
            raise ApiError(400, "max_tokens 0 gives nothing without echo")
        if self.suffix is not None and self.echo and self.logprobs is not None:
            raise ApiError(400, "logprobs of an echo cannot be told beside a suffix: leave out one")

    def _written(self, model: ServedModel, prompt: Prompt) -> Prompt:
        if self.suffix is None:
            return prompt
        tokenizer = model.lm.tokenizer
        if not isinstance(prompt, str) or tokenizer is None:
            raise ApiError(400, "suffix: give the prompt as text to have its middle filled in")
        return fill_in_the_middle(tokenizer, prompt, self.suffix)


def fill_in_the_middle(tokenizer: Tokenizer, before: str, after: str) -> list[int]:
    """Token ids after which a model writes what stands between the two. ApiError 400 where the
    vocabulary has no markers for that."""
    known = tokenizer.special_tokens
    markers = next((three for three in MARKERS if all(one in known for one in three)), None)
    if markers is None:
        raise ApiError(
            400,
            "suffix: this model's vocabulary has no tokens for filling in the middle; leave the "
            "suffix out, or ask a model that was trained for it",
        )
    begin, hole, end = (known[one] for one in markers)
    texts = tokenizer.encode_batch([before, after])
    return [*tokenizer.text_start, begin, *texts[0], hole, *texts[1], end]
