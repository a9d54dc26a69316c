"""The stage ``pretrain``: predict the next tokens of text, step after step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qiusuo.data.loader import Loader
from qiusuo.training.beginning import stage_state
from qiusuo.training.scene import Scene
from qiusuo.training.stages import PretrainStage
from qiusuo.training.supervised import SupervisedSteps
from qiusuo.training.validation import Validation, validate
from qiusuo.training.vocabulary import prepare

VALIDATION_TOKENS = 8192  # of one pass: without gradients there is room for more than in training


class Pretraining(SupervisedSteps):
    stage: PretrainStage

    def __init__(self, scene: Scene[PretrainStage]) -> None:
        stage, recipe, model = scene.stage, scene.recipe, scene.model
        with scene.world.in_turn():
            self.data = prepare(recipe, stage, scene.run.path / "tokenizer")
        feed = Loader(
            self.data.train,
            batch_size=stage.batch_size,
            sequence_length=stage.sequence_length,
            lookahead=model.config.num_nextn_predict_layers,
            seed=recipe.seed,
        )
        state = stage_state(scene, feed)
        isolate = stage.data.isolate_documents
        super().__init__(stage, state, scene.record, isolate, recipe.seed)
        self.last_validation: Validation | None = None

    def look(self, whole: bool) -> Iterator[dict[str, Any]]:
        """Loss on text that was held out."""
        stage = self.stage
        if not self.data.validation:
            return
        with self.autocast():
            seen = validate(
                self.state.model,
                self.data.validation,
                batch_size=max(1, VALIDATION_TOKENS // stage.sequence_length),
                sequence_length=stage.sequence_length,
                isolate=stage.data.isolate_documents,
                limit_tokens=None if whole else stage.validation_tokens,
                world=self.world,
            )
        self.last_validation = seen
        record: dict[str, Any] = {
            "kind": "validation",
            "loss": seen.loss,
            "bits_per_character": seen.bits_per_character,
            "tokens": seen.tokens,
        }
        if seen.mtp_agreement:
            record["mtp_agreement"] = seen.mtp_agreement[0]
            record["mtp_loss"] = seen.mtp_loss[0]
        yield record
