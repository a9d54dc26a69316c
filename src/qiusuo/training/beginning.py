"""How a stage begins: the model with the right weights, its adapter, its optimizers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qiusuo.checkpoint.load import fill_held, load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.stored import Checkpoint
from qiusuo.checkpoint.training_state import load_state
from qiusuo.data.example_loader import ExampleLoader
from qiusuo.data.loader import Loader
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.config import ModelConfig
from qiusuo.model.transformer import Transformer
from qiusuo.runs.durable import read_json, write_json
from qiusuo.runs.folder import RunFolder
from qiusuo.training.expert_selection import ExpertSelection, select_experts, train_only
from qiusuo.training.lora import LoRA
from qiusuo.training.optimizers import build_optimizers
from qiusuo.training.parallel.sharding import held_of, initialize_parts, sharded_model
from qiusuo.training.parallel.world import ALONE, World
from qiusuo.training.recipe import Recipe, RecipeError
from qiusuo.training.scene import Scene, TrainingError
from qiusuo.training.state import Feed, StageState

SELECTION = "experts.json"  # in the run folder: which experts esft trains
SELECTION_BATCHES = 8


def open_base(reference: str) -> Checkpoint:
    """What a recipe begins with. RecipeError for a quantised model: training goes on with numbers,
    and those of a few bits are not the ones that were learnt."""
    checkpoint = open_checkpoint(reference)
    if checkpoint.low_bit is not None:
        raise RecipeError(
            f"base {reference} is quantised to int{checkpoint.low_bit.bits} and cannot be trained: "
            "begin with the model that it was made from"
        )
    return checkpoint


def build_model(
    recipe: Recipe,
    tokenizer: Tokenizer,
    stage: str,
    device: str = "cpu",
    world: World = ALONE,
) -> Transformer:
    """What the recipe begins with, with the context of a stage: the base in float32, or the
    recipe's model with random weights from its seed. Of several processes each has its part of it.
    ConfigError where the base's context cannot be what a stage needs."""
    if recipe.base is not None:
        checkpoint = open_base(recipe.base)
        recipe.check_contexts(checkpoint.config)
        config = recipe.config_of(stage, checkpoint.config)
        return _base_model(replace(checkpoint, config=config), device, world).train()
    config = recipe.model_for(
        tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    return random_model(recipe.config_of(stage, config), recipe.seed, device, world)


def random_model(config: ModelConfig, seed: int, device: str, world: World) -> Transformer:
    """A model with random weights, the same numbers in any number of processes."""
    generator = torch.Generator().manual_seed(seed)
    if world.size > 1:
        model = sharded_model(config, world, device)
        initialize_parts(model, generator)
        return model
    model = Transformer(config)
    model.initialize(generator)
    return model.to(device)


def _base_model(checkpoint: Checkpoint, device: str, world: World) -> Transformer:
    if world.size > 1:
        model = sharded_model(checkpoint.config, world, device)
        fill_held(checkpoint, {name: held_of(own) for name, own in model.state_dict().items()})
        return model
    return load_model(checkpoint, dtype=torch.float32).to(device)


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


def _selection(scene: Scene, feed: Feed, share: float) -> ExpertSelection:
    """The run's experts to train: chosen once, on the first batches of its first stage."""
    kept = scene.run.path / SELECTION
    if kept.exists():
        return ExpertSelection.from_json(read_json(kept))
    if not isinstance(feed, ExampleLoader | Loader):
        raise RecipeError(
            f"stage {scene.stage.name}: esft chooses experts by what the first stage reads: begin "
            "with a stage of kind sft or pretrain"
        )
    place = feed.state_dict()
    batches = [next(feed) for _ in range(SELECTION_BATCHES)]
    feed.load_state_dict(place)
    selection = select_experts(scene.model, batches, share)
    write_json(kept, selection.to_json())
    return selection


def stage_state(scene: Scene, feed: Feed) -> StageState:
    """A stage's state before its first step."""
    stage, section = scene.stage, scene.recipe.adapter
    if section is not None and section.kind == "esft":
        train_only(scene.model, _selection(scene, feed, section.experts))
    adapter = () if scene.adapter is None else scene.adapter.parameters()
    dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
    optimizers = build_optimizers(scene.model, stage.optimizer, adapter, dtype, scene.world)
    return StageState(
        scene.model,
        optimizers,
        feed,
        stage.name,
        stage.steps,
        adapter=scene.adapter,
        world=scene.world,
    )


def last_state(run: RunFolder, world: World = ALONE) -> dict[str, Any] | None:
    latest = run.latest_checkpoint()
    return None if latest is None else load_state(latest[1], world.mesh)


def state_at_end(
    run: RunFolder, checkpoint: dict[str, Any], stage: str, world: World = ALONE
) -> dict[str, Any]:
    """What an earlier stage ended with."""
    step = checkpoint["ends"].get(stage)
    folder = dict(run.checkpoints()).get(step)
    if folder is None:
        raise TrainingError(
            f"{run.path} no longer holds the end of stage {stage!r}: put its folder back into "
            "checkpoints, or live the recipe in a new run"
        )
    return load_state(folder, world.mesh)
