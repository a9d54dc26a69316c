"""What is looked at beside the steps: held-out problems and answers, and what the model writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from qiusuo.data.example_loader import batch_of_examples
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.evaluation.answers import ANSWERS_AT_ONCE, ModelAnswerer
from qiusuo.evaluation.evaluate import Score, evaluate
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.model.transformer import Transformer
from qiusuo.tasks.task import END_THINK
from qiusuo.training.given_tasks import task_of
from qiusuo.training.losses import language_model_losses, make_window
from qiusuo.training.recipe import RecipeError
from qiusuo.training.scene import Scene
from qiusuo.training.sections import SamplesSection, TaskEntry
from qiusuo.training.sft import Solutions
from qiusuo.training.speaking import Speaker, spoken_dtype
from qiusuo.training.stages import Stage

ANSWERS = 512  # known answers whose loss is told, of each task
ROWS = 32  # of them in one pass


def check_prompts(stage: Stage, tokenizer: Tokenizer, context: int) -> None:
    """Before the first step, not at the first look."""
    for prompt in samples_of(stage).prompts:
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
    settings = samples_of(stage)
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

    @property
    def asks(self) -> bool:
        """Whether there is anything to ask the model."""
        return bool(self.settings.tasks or self.settings.answers)

    def look(self) -> dict[str, Any]:
        """Rates by task and difficulty, as a validation record has them; empty where none is
        asked for."""
        if not self.asks:
            return {}
        began = time.perf_counter()
        if self.speaker is None:
            scene = self.scene
            self.speaker = Speaker(
                scene.model,
                scene.tokenizer,
                scene.adapter,
                spoken_dtype(scene.model),
                answers=ANSWERS_AT_ONCE,
                max_tokens=self.settings.max_tokens,
            )
        rates: dict[str, Any] = {}
        with self.speaker.speaking() as lm:
            for entry in self.settings.tasks:
                rates |= self.rates(lm, entry)
        told: dict[str, Any] = {"kind": "validation"}
        if rates:
            told["tasks"] = rates
        if self.settings.answers:
            told["answer_loss"] = self.answer_loss()
        return told | {"look_seconds": time.perf_counter() - began}

    @torch.no_grad()
    def answer_loss(self) -> float:
        """Nats per token of known answers to held-out problems."""
        nats, tokens = 0.0, 0
        pad, model = self.scene.tokenizer.pad_id or 0, self.scene.model
        depth = model.config.num_nextn_predict_layers
        for entry in self.settings.answers:
            thoughts = float(self.scene.asker.opened != END_THINK)
            source = Solutions(entry, self.scene.asker, thoughts, 0, "test")
            examples = [source.example(index) for index in range(ANSWERS)]
            examples.sort(key=lambda example: len(example.tokens))
            for start in range(0, ANSWERS, ROWS):
                rows = [[example] for example in examples[start : start + ROWS]]
                span = max(len(row[0].tokens) for row in rows) + depth
                batch = batch_of_examples(rows, span=span, pad_id=pad)
                parts = (batch.tokens_BS, batch.documents_BS, batch.valid_BS)
                window = make_window(*parts, depth, isolate=True)
                nats += language_model_losses(model, window).main.item()
                tokens += int((window.labels[0] != IGNORE).sum())
        return nats / tokens

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
        told |= score.sampled.together
        told |= {f"sampled_{name}": mean for name, mean in score.sampled.measures.items()}
    return told


def samples_of(stage: Stage) -> SamplesSection:
    """What the model is to write at a look of this stage."""
    return getattr(stage, "samples", SamplesSection())
