"""The life of one stage in its run folder: steps, looks and checkpoints, to its end or a stop."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qiusuo.runs.console import LiveView
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import read_log
from qiusuo.training.beginning import attach_adapter, build_model, last_state, state_at_end
from qiusuo.training.finish import draw_report, finish_run, write_model
from qiusuo.training.kinds import work_of
from qiusuo.training.looks import TaskLook, check_prompts, samples_of, write_samples
from qiusuo.training.parallel.stopping import StopAsked
from qiusuo.training.parallel.world import ALONE, World
from qiusuo.training.recipe import Recipe, earlier_stages
from qiusuo.training.saving import Saver
from qiusuo.training.scene import Scene, TrainingError
from qiusuo.training.stages import SampleStage, Stage, TeachStage
from qiusuo.training.state import take_weights
from qiusuo.training.steps import PACE_STEPS
from qiusuo.training.vocabulary import run_tokenizer

STATUS_SECONDS = 1.0  # between two writings of status.json


class StageLife:
    """Made ready: data, model with the right weights, and the work of the stage's kind."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        run: RunFolder,
        device: str,
        world: World = ALONE,
    ) -> None:
        self.recipe, self.stage, self.run, self.world = recipe, stage, run, world
        with world.in_turn():
            self.tokenizer = run_tokenizer(recipe, run.path / "tokenizer")
        with world.together():
            model = build_model(recipe, self.tokenizer, stage.name, device, world)
        check_prompts(stage, self.tokenizer, model.config.max_position_embeddings)
        adapter = attach_adapter(recipe, model)
        checkpoint = last_state(run, world)
        if checkpoint is not None:
            take_weights(model, adapter, self.starting_weights(checkpoint))
        scene = Scene(recipe, stage, run, self.tokenizer, model, adapter, self.note, world)
        self.work = work_of(scene)
        self.state = self.work.state
        self.task_look = TaskLook(replace(scene, model=self.state.shown))
        self.saver = Saver(run, world, self.kept)
        if checkpoint is not None:
            self.state.take_over(checkpoint)
        self.saved_at = self.resumed_at = self.state.run_step if checkpoint is not None else -1
        self.status_at = -STATUS_SECONDS
        self.trouble: RunError | OSError | None = None

    def starting_weights(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint's own, unless the stage begins now and from another stage's end."""
        start_from = getattr(self.stage, "start_from", None)
        if start_from is None or checkpoint["stage"] == self.stage.name:
            return checkpoint
        return state_at_end(self.run, checkpoint, start_from, self.world)

    def place(self) -> dict[str, Any]:
        """Where the run stands, as its status says it."""
        state = self.state
        steps = state.run_step - state.step + state.planned
        return {"stage": state.stage, "step": state.run_step, "steps": steps}

    def live(self, last: bool) -> bool:
        """Train to the stage's end; false where someone stopped it."""
        run, state = self.run, self.state
        with run.open_log() as log, run.open_samples() as samples, _Stop(self.world) as stop:
            log.truncate_after(self.saved_at)
            # The look at a stage's end comes after its last checkpoint, and is then done again.
            samples.truncate_after(self.saved_at - (state.step >= state.planned))
            title = f"{self.recipe.name}: {self.stage.name}"
            with LiveView(self.place()["steps"], title, start_step=state.run_step) as view:
                self.log, self.samples, self.view, self.stop = log, samples, view, stop
                if state.run_step == 0 and self.recipe.base is not None:
                    self.look(whole=True, when="before")
                gc.collect()
                gc.freeze()  # what is loaded by now stays: no need to walk it again and again
                try:
                    self.work.run(self.after_step)
                except TrainingError:  # all processes meet it at the same step
                    self.saver.settle()
                    raise
                finally:
                    self.work.close()
                finished = state.step >= state.planned
                if finished:
                    state.ends[state.stage] = state.run_step
                self.checkpoint()
                self.saver.settle()
                if finished and not isinstance(self.stage, SampleStage | TeachStage):
                    self.look(whole=True, when="after")
                self.stopping()  # too late to stop, but not to say what could not be written
        if finished and last:
            self.finish()
        elif not finished:
            run.set_status("interrupted", **self.place())
            draw_report(run)
        return finished

    def finish(self) -> None:
        with self.world.together():
            write_model(self.run, self.recipe, self.stage, self.state, self.tokenizer)
            if self.world.leads:
                report_missing = finish_run(self.run, self.recipe, self.stage, self.work)
                if report_missing:
                    print(f"report.html was not drawn: {report_missing}")

    def note(self, record: dict[str, Any]) -> None:
        with self.until_all_meet():
            self.log.append(record)
        self.view.update(record)

    @contextmanager
    def until_all_meet(self) -> Iterator[None]:
        """An error of the one that writes waits until all processes can leave together."""
        try:
            yield
        except (RunError, OSError) as error:
            if self.world.size == 1:
                raise
            self.trouble = error

    def after_step(self) -> bool:
        """Between steps: look, save, or stop. True to stop."""
        stage, state = self.stage, self.state
        self.saver.look()
        place = self.place()
        self.view.set_total(place["steps"])
        if time.monotonic() - self.status_at > STATUS_SECONDS:
            with self.until_all_meet():
                self.run.set_status("running", **place)
            self.status_at = time.monotonic()
        if state.step < state.planned:
            if stage.validation_steps and state.step % stage.validation_steps == 0:
                self.look(whole=False)
            planned_now = stage.minutes is not None and state.step == PACE_STEPS
            if state.step % stage.checkpoint_steps == 0 or planned_now:
                self.checkpoint()
        return self.stopping()

    def stopping(self) -> bool:
        """Whether someone asked any of the processes to stop. RunError or OSError where one cannot
        write: on it; on the others an ElsewhereError."""
        word = self.world.most(2 if self.trouble is not None else int(self.stop.asked))
        if word == 2:
            with self.world.together():
                if self.trouble is not None:
                    raise self.trouble
        return word == 1

    def look(self, whole: bool, when: str | None = None) -> None:
        """Measure, and let the model write."""
        records = list(self.work.look(whole))  # always: the summary tells the last one
        if self.task_look.asks or samples_of(self.stage).prompts:
            self.state.gather()
        with self.world.together():
            if self.world.leads:
                self.tell(records, when)

    def tell(self, records: list[dict[str, Any]], when: str | None) -> None:
        """What is measured and written by the whole model, which the first process has."""
        state = self.state
        step = {"step": state.run_step}
        if not self.has_validated():
            records.append(self.task_look.look())
            merged = {key: value for record in records for key, value in record.items()}
            if merged:
                where = {"stage": state.stage, "seconds": state.seconds}
                self.note({**step, **merged, **where, **({"when": when} if when else {})})
        with state.whole_model() as model:
            for record in write_samples(model, self.tokenizer, self.stage):
                sample = {"kind": "sample", **step, **record}
                self.samples.append(sample)
                self.view.update(sample)

    def has_validated(self) -> bool:
        """Whether the log of a resumed run has this step's validation already."""
        step = self.state.run_step
        return step == self.resumed_at and any(
            record["kind"] == "validation" and record["step"] == step
            for record in read_log(self.run.log_path)
        )

    def checkpoint(self) -> None:
        state = self.state
        if state.run_step == self.saved_at:
            return
        self.log.sync()  # a checkpoint is never ahead of the log
        self.saver.save(state)
        self.saved_at = state.run_step

    def kept(self) -> list[int]:
        """The steps at which stages ended that others will ask for."""
        asked_for = {name for stage in self.recipe.stages for _, name in earlier_stages(stage)}
        return [step for name, step in self.state.ends.items() if name in asked_for]


class _Stop(StopAsked):
    """Turns the first Ctrl-C (or SIGTERM) into a wish that the loop meets between two steps; the
    second works as usual, but for one process of several: it may be told by its launcher and by
    who tells its launcher, and to make haste is the launcher's."""

    def __init__(self, world: World) -> None:
        super().__init__(1 if world.size == 1 else None)

    @property
    def asked(self) -> bool:
        return self.times > 0
