"""``qiusuo train``: begin a run or go on with one, in this process or in several."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qiusuo.runs.checkpoints import list_checkpoints
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import FollowedRun, RunFolder, State, default_run_path
from qiusuo.training.parallel.launch import RESTARTS, LaunchError, launch
from qiusuo.training.parallel.limits import check_shared
from qiusuo.training.parallel.worker import SAID, STOPPED
from qiusuo.training.parallel.world import (
    World,
    join_world,
    met_by_all,
    processes,
    restarts,
    tells_of_a_death,
)
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
    assert path is not None
    return _watched(replace(order, path=path), path, nproc)


def _watched(order: Order, path: Path, nproc: int) -> int:
    """Several processes, and a word where they can give none themselves: of a death, and of a stop
    that they did not live to answer."""

    def tell(death: str, restart: int) -> None:
        _say(f"{death}; all go on {_from_where(path)} (restart {restart} of {RESTARTS})")

    try:
        code = launch(nproc, _worker, order, tell=tell)
    except LaunchError as error:
        _record_end(path, "failed", str(error))
        raise TrainingError(str(error)) from error
    if code is None:
        if _record_end(path, "interrupted"):
            _say(f"Stopped. Go on with: qiusuo train --resume --run {path}")
        else:
            _say(f"Stopped before there was a run in {path}")
        return STOPPED
    return 1 if code == SAID else code


def _say(text: str) -> None:
    """One line, on a terminal below the picture of a process that was killed, and had hidden the
    cursor."""
    with suppress(OSError):  # of a terminal that is gone
        print(f"\n\x1b[?25h{text}" if sys.stdout.isatty() else text, flush=True)


def _from_where(path: Path) -> str:
    found = list_checkpoints(path / "checkpoints")
    return f"from the checkpoint of step {found[-1][0]:,}" if found else "from the beginning"


def _record_end(path: Path, state: State, why: str | None = None) -> bool:
    """Write down for the dead how their run ended; false where they had not begun one."""
    if not (path / "recipe.toml").is_file():
        return False
    with suppress(RunError, OSError), RunFolder.open(path) as run:
        last = run.status()
        if last.get("state") != "finished":
            place = {key: last[key] for key in ("stage", "step", "steps") if key in last}
            run.set_status(state, **place, error=why)
    return True


def _worker(order: Order) -> int:
    """One of several processes. What a person must mend, if all have met it, is said and no reason
    to start anew; an error of one process alone ends it, and the launcher all."""
    from qiusuo.cli import complain, mendable

    try:
        return _work(order)
    except mendable() as error:
        if tells_of_a_death(error):
            raise
        complain(error)
        if not (met_by_all(error) or isinstance(error, TrainingError)):
            sys.exit(1)
        return SAID


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
