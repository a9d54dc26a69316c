"""The stage ``distil``: learn what a teacher thought of every next token, not just which one came.

The distributions were written before (stage ``teach``), so a teacher is asked once and its students
learn as often as they like. Rows are packed as in ``sft``; the modules of multi-token prediction
learn the tokens themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch

from qiusuo.data.batch import Batch
from qiusuo.data.example_loader import ExampleLoader, batch_of_examples
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.kernels.distribution_match import (
    Teacher,
    TeacherRows,
    TeacherTop,
    distribution_match,
)
from qiusuo.model.transformer import Transformer
from qiusuo.training.beginning import stage_state
from qiusuo.training.distributions import Distributions, TaughtExample
from qiusuo.training.losses import Losses, Window
from qiusuo.training.recipe import RecipeError
from qiusuo.training.scene import Scene
from qiusuo.training.stages import DistilStage
from qiusuo.training.steps import StepResult
from qiusuo.training.supervised import SupervisedSteps

# B rows, M places of a micro-batch, N of them with a distribution, D hidden.

Row = list[TaughtExample]


class TaughtBatch(NamedTuple):
    batch: Batch
    rows: list[Row]


class TaughtLoader(ExampleLoader):
    """Gives the examples of each row beside the tokens, for their distributions."""

    def taught_batch(self) -> TaughtBatch:
        rows = [cast(Row, self._next_row()) for _ in range(self._batch_size)]
        return TaughtBatch(batch_of_examples(rows, span=self._span, pad_id=self._pad_id), rows)


class Distilling(SupervisedSteps):
    stage: DistilStage

    def __init__(self, scene: Scene[DistilStage]) -> None:
        stage = scene.stage
        sources = [
            Distributions(
                source.folder or scene.distributions_path(source.taught or ""), scene.tokenizer
            )
            for source in stage.sources
        ]
        check_sources(stage, sources)
        self.loader = TaughtLoader(
            [(one, source.weight) for one, source in zip(sources, stage.sources, strict=True)],
            batch_size=stage.batch_size,
            sequence_length=stage.sequence_length,
            lookahead=scene.model.config.num_nextn_predict_layers,
            seed=scene.recipe.seed,
            pad_id=scene.tokenizer.pad_id or 0,
        )
        state = stage_state(scene, self.loader)
        super().__init__(stage, state, scene.record, True, scene.recipe.seed)
        self.label_losses, self.forward = self.forward, self.match

    def one_step(self) -> StepResult:
        taught = self.loader.taught_batch()
        size = self.stage.micro_batch_size or self.stage.batch_size
        # One teacher for each micro-batch, in the order in which they are passed.
        starts = range(0, self.stage.batch_size, size)
        self.teachers = (self.teacher_of(taught.rows[start : start + size]) for start in starts)
        self.label_loss = torch.zeros((), device=self.device)
        result = self.learn(taught.batch)
        more = {"label_loss": self.label_loss.item() / max(1, result.tokens)}
        return dataclasses.replace(result, more=result.more | more)

    def match(self, model: Transformer, window: Window) -> Losses:
        """As ``language_model_losses``, with the divergence from the teacher as the main loss."""
        losses = self.label_losses(model, window)
        self.label_loss += losses.main.detach()
        place_N = (window.labels[0].flatten() != IGNORE).nonzero().squeeze(1)
        x_ND = losses.main_states.flatten(0, 1)[place_N]
        settings = self.stage.match
        divergence, _ = distribution_match(
            x_ND,
            model.lm_head.weight,
            next(self.teachers),
            torch.ones(len(place_N), device=self.device),
            settings.divergence,
            settings.teacher_share,
            float32_head=True,
        )
        if self.stage.label_weight:
            divergence = divergence + self.stage.label_weight * losses.main
        return losses._replace(main=divergence)

    def teacher_of(self, rows: Sequence[Row]) -> Teacher:
        """The distributions of some rows, in the order of the places that have a label."""
        examples = [example for row in rows for example in row]
        logprobs_NV = np.concatenate([example.logprobs_NV for example in examples])
        logprobs = torch.from_numpy(logprobs_NV).to(self.device)
        ids = [example.ids_NV for example in examples if example.ids_NV is not None]
        if not ids:
            return TeacherRows(logprobs)
        ids_NV = np.concatenate(ids).astype(np.int64)
        return TeacherTop(torch.from_numpy(ids_NV).to(self.device), logprobs)


def check_sources(stage: DistilStage, sources: Sequence[Distributions]) -> None:
    tops = {source.about.top for source in sources}
    if len(tops) > 1:
        told = ", ".join(f"{s.folder}: {s.about.top or 'all'} tokens" for s in sources)
        raise RecipeError(
            f"stage {stage.name}: the sources keep differently much of a distribution ({told}): "
            "teach them with the same top"
        )
    if tops != {None} and stage.match.divergence != "forward":
        raise RecipeError(
            f"stage {stage.name}: match.divergence {stage.match.divergence!r} needs whole "
            f"distributions, {sources[0].folder} keeps the likeliest {sources[0].about.top}: "
            "leave top out in teach, or take forward"
        )
