"""Living a recipe: its stages one after the other in one run folder.

Whatever stops it (Ctrl-C, kill -9, a full disk, a loss that is not finite), the run folder keeps
the last whole checkpoint, and ``resume`` goes on from it as if nothing had happened.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import torch

from qiusuo.data.deduplicate import require_datasketch
from qiusuo.engine.loading import device_fault
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import RunFolder
from qiusuo.training.beginning import last_state
from qiusuo.training.finish import draw_report, mend_papers
from qiusuo.training.given_tasks import check_task, stage_tasks
from qiusuo.training.hardware import keep_freed_memory
from qiusuo.training.life import StageLife
from qiusuo.training.parallel.limits import check_shared
from qiusuo.training.parallel.world import ALONE, World, tells_of_a_death
from qiusuo.training.recipe import Recipe, RecipeError, parse_recipe
from qiusuo.training.rl.reinforce import resolved
from qiusuo.training.scene import TrainingError
from qiusuo.training.stages import PretrainStage, RlStage, Stage
from qiusuo.version import __version__


def start_run(recipe: Recipe, path: Path) -> RunFolder:
    """A new run folder that holds the recipe as resolved, unless its work could not begin: then
    there is none. One that never took a step, because its data could not work, gives way."""
    _check(recipe)
    if _never_began(path):
        RunFolder.open(path).close()  # refuses where another process is just beginning
        shutil.rmtree(path)
    return RunFolder.create(path, recipe.model_dump(mode="json"), version=__version__)


def _never_began(path: Path) -> bool:
    begun = (path / "log.jsonl").is_file() and (path / "log.jsonl").stat().st_size > 0
    return (path / "recipe.toml").is_file() and not begun and not any(path.glob("checkpoints/*"))


def resume_run(path: Path) -> tuple[Recipe, RunFolder]:
    """An existing run folder, to go on where its last checkpoint is."""
    run = RunFolder.open(path)
    run.record_resumption(__version__)
    return parse_recipe(run.recipe, where=str(path / "recipe.toml")), run


def train(
    recipe: Recipe,
    run: RunFolder,
    *,
    device: str = "cpu",
    only_stage: str | None = None,
    world: World = ALONE,
) -> bool:
    """Live the recipe from the run's last checkpoint on. False where it was interrupted. Of several
    processes each calls it, with the run as ``open_run`` gave it.

    Raises TrainingError, RunError, DataError or CheckpointError with the run marked as failed and
    its last checkpoint intact; RecipeError for an ``only_stage`` that is not there or whose turn it
    is not.
    """
    if only_stage is not None:
        recipe.stage(only_stage)
    if run.status().get("state") == "finished":
        print(f"{run.path} is finished: there is nothing left to train")
        mend_papers(run)
        return True
    if only_stage is not None:
        _check_turn(recipe, only_stage, last_state(run, world))
    life: StageLife | None = None
    keep_freed_memory()
    torch.set_flush_denormal(True)  # probabilities near zero make a CPU ten times slower otherwise
    try:
        if fault := device_fault(device):  # before any work is done
            raise TrainingError(fault)
        _check(recipe)
        left = _stages_left(recipe, last_state(run, world))
        stages = [stage for stage in left if only_stage in (None, stage.name)]
        with world.together():
            check_shared(recipe, stages, world.size)
        for stage in stages:
            life = StageLife(recipe, stage, run, device, world)
            if not life.live(last=stage is recipe.stages[-1]):
                return False
        if life is not None and run.status().get("state") == "running":
            run.set_status("interrupted", **life.place())  # later stages are left
            draw_report(run)
    except (KeyboardInterrupt, Exception) as error:
        _mark(run, life, error)
        raise
    finally:
        torch.set_flush_denormal(False)  # the process may have other plans
        gc.unfreeze()
    return True


def _check(recipe: Recipe) -> None:
    """Refuse now what a later stage's work could not begin with: RecipeError, TaskError or
    DataError."""
    for stage in recipe.stages:
        if isinstance(stage, PretrainStage) and stage.data.deduplicate == "near":
            require_datasketch()
        for entry in stage_tasks(stage):
            check_task(entry)
        if isinstance(stage, RlStage):
            try:
                resolved(stage)
            except RecipeError:
                raise
            except ValueError as error:
                raise RecipeError(f"stage {stage.name}: {error}") from error
    for entry in (*recipe.evaluation.tasks, *recipe.evaluation.answers):
        check_task(entry)


def _check_turn(recipe: Recipe, name: str, checkpoint: dict[str, Any] | None) -> None:
    """RecipeError for a stage that would begin with random weights, or leave one out."""
    place = recipe.stages.index(recipe.stage(name))
    before = recipe.stages[place - 1].name
    if place and (checkpoint is None or before not in checkpoint["ends"]):
        raise RecipeError(
            f"stage {name} goes on from {before}, which this run has not ended: leave --stage out, "
            "or live that one first"
        )


def _stages_left(recipe: Recipe, checkpoint: dict[str, Any] | None) -> tuple[Stage, ...]:
    if checkpoint is None:
        return recipe.stages
    # One that has ended comes again: it has no step to take, but perhaps its last look.
    return recipe.stages[recipe.stages.index(recipe.stage(checkpoint["stage"])) :]


def _mark(run: RunFolder, life: StageLife | None, error: BaseException) -> None:
    """Say in the folder why the run stopped; a disk that is full may refuse even that. That another
    process died is no reason of this run: all are started again, or who stopped them says why."""
    if tells_of_a_death(error):
        return
    stopped: Any = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    place = {} if life is None else life.place()
    try:
        run.set_status(stopped, **place, error=str(error) or type(error).__name__)
        draw_report(run)
    except (RunError, OSError):
        return
