"""What is looked at beside the steps: held-out problems and answers, and what the model writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.evaluation.answers import ANSWERS_AT_ONCE, ModelAnswerer
from qiusuo.evaluation.evaluate import Score, evaluate
from qiusuo.model.transformer import Transformer
from qiusuo.training.given_tasks import task_of
from qiusuo.training.recipe import RecipeError
from qiusuo.training.scene import Scene
from qiusuo.training.speaking import PROMPT_TOKENS, Speaker
from qiusuo.training.stages import SamplesSection, Stage, TaskEntry


def check_prompts(stage: Stage, tokenizer: Tokenizer, context: int) -> None:
    """Before the first step, not at the first look."""
    for prompt in _samples(stage).prompts:
        length = (tokenizer.bos_id is not None) + len(tokenizer.encode(prompt))
        if not 0 < length < context:
            raise RecipeError(
                f"stage {stage.name}: the sample prompt {prompt[:20]!r} has {length} tokens; "
                f"it must have from 1 to {context - 1}"
            )


def write_samples(
    model: Transformer, tokenizer: Tokenizer, stage: Stage
) -> Iterator[dict[str, str]]:
    """What the model writes after each prompt of the stage."""
    settings = _samples(stage)
    if not settings.prompts:
        return
    completions = LanguageModel(model, tokenizer).generate(
        list(settings.prompts),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=0,  # two runs of a recipe are compared by what they write
    )
    for prompt, completion in zip(settings.prompts, completions, strict=True):
        yield {"prompt": prompt, "continuation": completion.text}


class TaskLook:
    """How the model does on the held-out problems of the recipe's evaluation."""

    def __init__(self, scene: Scene[Any]) -> None:
        self.settings, self.scene = scene.recipe.evaluation, scene
        self.speaker: Speaker | None = None

    def look(self) -> dict[str, Any]:
        """Rates by task and difficulty, as a validation record has them; empty where none is
        asked for."""
        if not self.settings.tasks:
            return {}
        began = time.perf_counter()
        if self.speaker is None:
            scene = self.scene
            self.speaker = Speaker(
                scene.model,
                scene.tokenizer,
                scene.adapter,
                torch.float32,
                answers=ANSWERS_AT_ONCE,
                tokens=PROMPT_TOKENS + self.settings.max_tokens,
            )
        rates: dict[str, Any] = {}
        with self.speaker.speaking() as lm:
            for entry in self.settings.tasks:
                rates |= self.rates(lm, entry)
        return {
            "kind": "validation",
            "tasks": rates,
            "look_seconds": time.perf_counter() - began,
        }

    def rates(self, lm: LanguageModel, entry: TaskEntry) -> dict[str, Any]:
        settings, found = self.settings, {}
        answerer = ModelAnswerer(lm, self.scene.asker)
        difficulties = sorted(set(entry.difficulties))
        for score in evaluate(
            answerer,
            task_of(entry),
            difficulties,
            count=settings.count * len(difficulties),
            samples=settings.samples,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
        ):
            if score.difficulty is not None:
                found[f"{score.task}/{score.difficulty}"] = _told(score)
        return found


def _told(score: Score) -> dict[str, Any]:
    accuracy = score.greedy.rates["accuracy"]
    told: dict[str, Any] = {
        "problems": score.problems,
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "length": score.greedy.length,
        **score.greedy.measures,
    }
    if score.sampled is not None:
        for name, rate in score.sampled.rates.items():
            told[name.replace("@", "_at_")] = rate.value
        told["sampled_length"] = score.sampled.length
    return told


def _samples(stage: Stage) -> SamplesSection:
    return getattr(stage, "samples", SamplesSection())
