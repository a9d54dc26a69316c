"""Who answers problems: a model in this process, through the engine. (A server: server_answers.py.)

An answerer gets problems and gives replies, each the whole response as a verifier reads it. Draws
follow from the seed and the problem, so the same call gives the same replies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.request import RequestError
from qiusuo.evaluation.asking import Ask, Asker
from qiusuo.tasks.task import Problem, Task

ANSWERS_AT_ONCE = 512  # handed to the engine together; it runs as many of them as its limits let
GLANCE = 8  # problems looked at where a task names no alphabet

Answered = Callable[[int], None]  # hears of so many more replies


class EvaluationError(RuntimeError):
    """A measurement that cannot be made, or not to its end; the message says what to do."""


@dataclass(frozen=True)
class Reply:
    """One answer. ``tokens`` it has, the end token included, None where a server does not say.
    ``finish``: "stop", or "length" where it was cut off, or "error" with the reason in
    ``error``."""

    response: str
    tokens: int | None
    finish: str
    error: str | None = None


class Answerer(Protocol):
    def answers(
        self,
        problems: Sequence[Problem],
        *,
        samples: int,
        temperature: float,
        max_tokens: int,
        seed: int,
        progress: Answered | None = None,
    ) -> list[list[Reply]]:
        """``samples`` replies to each problem, in their order. EvaluationError where there can be
        none."""

    def describe(self) -> dict[str, Any]:
        """Who answers and how it is asked, for the record."""


class ModelAnswerer:
    """A language model with a chat template, asked as ``asker`` says."""

    def __init__(self, lm: LanguageModel, asker: Asker) -> None:
        self.lm, self.asker = lm, asker

    def answers(
        self,
        problems: Sequence[Problem],
        *,
        samples: int,
        temperature: float,
        max_tokens: int,
        seed: int,
        progress: Answered | None = None,
    ) -> list[list[Reply]]:
        prompts = [self.asker.prompt_ids(problem) for problem in problems]
        at_once = max(1, ANSWERS_AT_ONCE // samples)
        replies: list[list[Reply]] = []
        for start in range(0, len(prompts), at_once):
            part = prompts[start : start + at_once]
            try:
                completions = self.lm.generate(
                    part,
                    n=samples,
                    temperature=temperature,
                    max_tokens=max_tokens,
                    # Draws are told apart by their place in a call: each call needs its own.
                    seed=draw_seed(seed, problems[start], start),
                )
            except RequestError as error:
                raise EvaluationError(f"the model cannot be asked: {error}") from error
            told = [
                Reply(
                    self.asker.response(one.text), len(one.token_ids), one.finish_reason, one.error
                )
                for one in completions
            ]
            replies += [told[row : row + samples] for row in range(0, len(told), samples)]
            if progress is not None:
                progress(len(told))
        return replies

    def describe(self) -> dict[str, Any]:
        asker = self.asker
        return {
            "ask": asker.ask,
            "thinking": asker.thinking,
            "system": asker.system,
            "opened": asker.opened,
        }


def draw_seed(seed: int, problem: Problem, place: int) -> int:
    """Of 31 bits, which every server takes."""
    return random.Random(f"{seed}/{problem.key}/{place}").getrandbits(31)


def default_ask(task: Task, tokenizer: Tokenizer) -> Ask:
    """How a model is asked when nobody says: one that knows nothing but characters, those of this
    task among them, was made here and gets the bare prompt; all others the question.

    A task without an alphabet is judged by a few of its prompts."""
    text = task.alphabet
    if text is None:
        chance = random.Random(0)
        glanced = (task.problem(task.difficulties[0], chance) for _ in range(GLANCE))
        text = "".join(problem.prompt for problem in glanced)
    known = is_of_characters(tokenizer) and tokenizer.unknown_id not in tokenizer.encode(text)
    return "prompt" if known else "question"


def is_of_characters(tokenizer: Tokenizer) -> bool:
    """Whether every token is one character, besides the special ones and the unknown."""
    aside = {tokenizer.unknown_id, *tokenizer.special_tokens.values()}
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return tokenizer.unknown_id is not None and all(
        len(token) == 1 for token, index in vocabulary.items() if index not in aside
    )


def check_model(lm: LanguageModel, name: str) -> Tokenizer:
    """Its tokenizer. DataError for a model that cannot be asked anything."""
    if lm.tokenizer is None or lm.tokenizer.chat_template is None:
        raise DataError(
            f"{name} has no chat template: it is a base model, which cannot be asked; measure its "
            "bits per character with --text, or put a chat_template.jinja beside its tokenizer.json"
        )
    return lm.tokenizer
