"""``qiusuo train``: begin a run or go on with one, in this process or in several."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from qiusuo.runs.folder import FollowedRun, RunFolder, default_run_path
from qiusuo.training.parallel.launch import STOPPED, LaunchError, launch
from qiusuo.training.parallel.limits import check_shared
from qiusuo.training.parallel.world import World, join_world, met_by_all, processes, restarts
from qiusuo.training.recipe import Recipe, RecipeError, parse_recipe, read_recipe
from qiusuo.training.scene import TrainingError
from qiusuo.training.train import resume_run, start_run, train


@dataclass(frozen=True)
class Order:
    """What was asked for: a new run of ``recipe`` with ``changes``, in ``path``, or with ``resume``
    to go on with the run there; ``stage``: that one alone; ``expert_parallel``: let tokens go to
    their experts, where there are several processes."""

    recipe: str | None
    changes: tuple[str, ...]
    path: Path | None
    resume: bool
    stage: str | None
    device: str
    expert_parallel: bool = False

    def check(self) -> Recipe | None:
        """The recipe of a new run. RecipeError where the words do not fit together."""
        if self.resume:
            if self.path is None:
                raise RecipeError("--resume needs --run FOLDER: the run to go on with")
            if self.recipe is not None or self.changes:
                raise RecipeError("a resumed run has its own recipe: give neither RECIPE nor --set")
            return None
        if self.recipe is None:
            raise RecipeError("give a RECIPE, or --resume --run FOLDER")
        read = read_recipe(self.recipe, list(self.changes))
        if self.stage is not None:
            read.stage(self.stage)  # before a folder is made
        return read


def carry_out(order: Order, nproc: int | None) -> int:
    """Train, and say where the run is. The exit code: 0, or 130 where it was stopped and saved."""
    recipe = order.check()
    if order.expert_parallel and max(nproc or 1, processes()) == 1:
        raise RecipeError(
            "--expert-parallel needs several processes: give --nproc, or use torchrun"
        )
    if nproc is None or nproc == 1:
        return _work(order)
    if processes() > 1:
        raise RecipeError(
            "--nproc starts processes, and torchrun has done so already: leave it out"
        )
    path = order.path
    if recipe is not None:  # refused now, before processes are started
        stages = recipe.stages if order.stage is None else (recipe.stage(order.stage),)
        check_shared(recipe, stages, nproc)
        path = path or default_run_path(recipe.name)
    try:
        return launch(nproc, _worker, replace(order, path=path))
    except LaunchError as error:
        raise TrainingError(str(error)) from error


def _worker(order: Order) -> int:
    """One of several processes. What a person must mend, if all have met it, is said and no reason
    to start anew; an error of one process alone ends it, and the agent all."""
    from qiusuo.cli import complain, mendable

    try:
        return _work(order)
    except mendable() as error:
        complain(error)
        if not (met_by_all(error) or isinstance(error, TrainingError)):
            sys.exit(1)
        return 1


def _work(order: Order) -> int:
    with ExitStack() as stack:
        world, device = stack.enter_context(join_world(order.device, order.expert_parallel))
        if not world.leads:
            silence = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(silence))
        recipe, run = open_run(order, world)
        with run:
            finished = train(recipe, run, device=device, only_stage=order.stage, world=world)
        print(f"Run folder   {run.path}")
        if run.report_path.is_file():
            print(f"Report       {run.report_path}")
        if not finished:
            print(f"Stopped and saved. Go on with: qiusuo train --resume --run {run.path}")
        sys.stdout.flush()
    return 0 if finished else STOPPED


def open_run(order: Order, world: World) -> tuple[Recipe, RunFolder]:
    """The run, which the first process writes and the others follow. Processes that were started
    anew go on with what they had begun."""
    with world.together():
        if world.leads:
            if world.size > 1 and order.path is None:
                raise RecipeError("several processes need --run FOLDER: they all share it")
            return _opened(order)
    assert order.path is not None
    run = FollowedRun(order.path)
    return parse_recipe(run.recipe, where=str(order.path / "recipe.toml")), run


def _opened(order: Order) -> tuple[Recipe, RunFolder]:
    path, recipe = order.path, order.check()
    if recipe is None or (restarts() and path is not None and (path / "recipe.toml").is_file()):
        assert path is not None
        recipe, run = resume_run(path)
        if restarts():
            with run.open_log() as log:
                text = f"a process died; all were started again (restart {restarts()})"
                log.append({"kind": "event", "text": text})
        return recipe, run
    return recipe, start_run(recipe, path or default_run_path(recipe.name))
