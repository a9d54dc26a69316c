"""Models that a stage names beside its own: teachers, and what is to be merged.

"stage:NAME" is what an earlier stage of this run ended with; everything else is a path or the name
of a pulled model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qiusuo.checkpoint.load import load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.transformer import Transformer
from qiusuo.training.beginning import attach_adapter, build_model, last_state, state_at_end
from qiusuo.training.recipe import RecipeError
from qiusuo.training.scene import Scene
from qiusuo.training.speaking import in_dtype
from qiusuo.training.stages import stage_named
from qiusuo.training.state import take_weights


@dataclass(frozen=True)
class NamedModel:
    """A model to ask and not to train, and the tokenizer it reads with."""

    model: Transformer
    tokenizer: Tokenizer


def named_model(scene: Scene[Any], name: str, dtype: torch.dtype) -> NamedModel:
    """Frozen, in ``dtype``, on the device of the model in training. CheckpointError or RecipeError
    where there is none."""
    device = scene.model.lm_head.weight.device
    stage = stage_named(name)
    if stage is not None:
        model, tokenizer = _after_stage(scene, stage), scene.tokenizer
    else:
        checkpoint = open_checkpoint(name)
        found = checkpoint.read_tokenizer()
        if found is None:
            raise RecipeError(
                f"stage {scene.stage.name}: {name} has no tokenizer.json, so nobody knows what its "
                "tokens are"
            )
        model, tokenizer = load_model(checkpoint, dtype=dtype), found
    return NamedModel(in_dtype(model.to(device), dtype).eval(), tokenizer)


def same_vocabulary(scene: Scene[Any], named: NamedModel, name: str) -> None:
    """RecipeError where the model reads other tokens than the one in training."""
    if named.tokenizer.fingerprint != scene.tokenizer.fingerprint:
        raise RecipeError(
            f"stage {scene.stage.name}: {name} has another tokenizer ({_told(named.tokenizer)}) "
            f"than the model in training ({_told(scene.tokenizer)}), so their tokens cannot be "
            'compared: give the run the same one ([tokenizer] kind = "path", path = its folder), '
            "or learn from text: sample with that model, then sft on the traces"
        )


def _told(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.vocab_size} tokens, {tokenizer.fingerprint[:8]}"


def _after_stage(scene: Scene[Any], stage: str) -> Transformer:
    checkpoint = last_state(scene.run)
    if checkpoint is None:
        raise RecipeError(f"stage {scene.stage.name}: no stage of this run has ended yet")
    model = build_model(scene.recipe, scene.tokenizer, stage)
    adapter = attach_adapter(scene.recipe, model)
    take_weights(model, adapter, state_at_end(scene.run, checkpoint, stage))
    if adapter is not None:
        adapter.merge_for_good()
    return model
