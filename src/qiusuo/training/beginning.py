"""How a stage begins: the model with the right weights, its adapter, its optimizers."""

from __future__ import annotations

import torch

from qiusuo.checkpoint.load import load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.transformer import Transformer
from qiusuo.training.lora import LoRA
from qiusuo.training.optimizers import build_optimizers
from qiusuo.training.recipe import Recipe
from qiusuo.training.scene import Scene
from qiusuo.training.state import Feed, StageState


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> Transformer:
    """The base in float32, or the recipe's model with random weights from its seed."""
    if recipe.base is not None:
        return load_model(open_checkpoint(recipe.base), dtype=torch.float32).train()
    config = recipe.model_for(
        tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(recipe.seed))
    return model


def attach_adapter(recipe: Recipe, model: Transformer) -> LoRA | None:
    """The adapter that the recipe asks for, beside the frozen model."""
    section = recipe.adapter
    if section is None or section.kind != "lora":
        return None
    return LoRA(
        model,
        torch.Generator().manual_seed(recipe.seed),
        rank=section.rank,
        alpha=section.alpha,
        modules=section.modules,
    )


def stage_state(scene: Scene, feed: Feed) -> StageState:
    """A stage's state before its first step."""
    stage = scene.stage
    adapter = () if scene.adapter is None else scene.adapter.parameters()
    optimizers = build_optimizers(scene.model, stage.optimizer, adapter)
    return StageState(scene.model, optimizers, feed, stage.name, stage.steps, adapter=scene.adapter)
