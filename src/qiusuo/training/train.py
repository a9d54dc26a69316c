"""Living a recipe: its stages one after the other in one run folder.

Whatever stops it (Ctrl-C, kill -9, a full disk, a loss that is not finite), the run folder keeps
the last whole checkpoint, and ``resume`` goes on from it as if nothing had happened.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from qiusuo.checkpoint.training_state import load_state
from qiusuo.data.cache import cache_folder
from qiusuo.data.errors import DataError
from qiusuo.data.loader import Loader
from qiusuo.data.prepare import PreparedData, prepare_corpus
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.loading import device_fault
from qiusuo.model.transformer import Transformer
from qiusuo.runs.console import LiveView
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import read_log
from qiusuo.training.finish import draw_report, finish_run, mend_papers
from qiusuo.training.optimizers import build_optimizers
from qiusuo.training.pretrain import PACE_STEPS, Pretraining, TrainingError
from qiusuo.training.recipe import PretrainStage, Recipe, RecipeError, parse_recipe
from qiusuo.training.state import StageState
from qiusuo.training.validation import Validation, validate
from qiusuo.version import __version__

STATUS_SECONDS = 1.0  # between two writings of status.json
VALIDATION_TOKENS = 8192  # of one pass: without gradients there is room for more than in training


def start_run(recipe: Recipe, path: Path) -> RunFolder:
    """A new run folder that holds the recipe as resolved. One that never took a step, because its
    recipe or its data could not work, gives way."""
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
) -> bool:
    """Live the recipe from the run's last checkpoint on. False where it was interrupted.

    Raises TrainingError, RunError, DataError or CheckpointError with the run marked as failed and
    its last checkpoint intact.
    """
    if only_stage is not None:
        recipe.stage(only_stage)
    if run.status().get("state") == "finished":
        print(f"{run.path} is finished: there is nothing left to train")
        mend_papers(run)
        return True
    life: _StageLife | None = None
    torch.set_flush_denormal(True)  # probabilities near zero make a CPU ten times slower otherwise
    try:
        if fault := device_fault(device):  # before any work is done
            raise TrainingError(fault)
        for stage in _stages_left(recipe, _last_state(run)):
            if only_stage not in (None, stage.name):
                continue
            life = _StageLife(recipe, stage, run, device)
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


def _stages_left(recipe: Recipe, checkpoint: dict[str, Any] | None) -> tuple[PretrainStage, ...]:
    if checkpoint is None:
        return recipe.stages
    current = recipe.stage(checkpoint["stage"])
    done = checkpoint["step"] >= checkpoint["planned"] and current is not recipe.stages[-1]
    return recipe.stages[recipe.stages.index(current) + done :]


def _mark(run: RunFolder, life: _StageLife | None, error: BaseException) -> None:
    """Say in the folder why the run stopped; a disk that is full may refuse even that."""
    stopped: Any = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    place = {} if life is None else life.place()
    try:
        run.set_status(stopped, **place, error=str(error) or type(error).__name__)
        draw_report(run)
    except (RunError, OSError):
        return


def _last_state(run: RunFolder) -> dict[str, Any] | None:
    latest = run.latest_checkpoint()
    return None if latest is None else load_state(latest[1])


class _StageLife:
    """One stage in its run folder: data and model made ready, then steps until it is done."""

    def __init__(
        self,
        recipe: Recipe,
        stage: PretrainStage,
        run: RunFolder,
        device: str,
    ) -> None:
        self.recipe, self.stage, self.run = recipe, stage, run
        self.data = prepare(recipe, stage, run.path / "tokenizer")
        check_prompts(recipe, stage, self.data.tokenizer)
        model = build_model(recipe, self.data.tokenizer).to(device)
        self.state = StageState(
            model,
            build_optimizers(model, stage.optimizer),
            Loader(
                self.data.train,
                batch_size=stage.batch_size,
                sequence_length=stage.sequence_length,
                lookahead=model.config.num_nextn_predict_layers,
                seed=recipe.seed,
            ),
            stage.name,
            stage.steps,
        )
        checkpoint = _last_state(run)
        if checkpoint is not None:
            self.state.take_over(checkpoint)
        self.saved_at = self.resumed_at = self.state.run_step if checkpoint is not None else -1
        self.last_validation: Validation | None = None
        self.status_at = -STATUS_SECONDS

    def place(self) -> dict[str, Any]:
        """Where the run stands, as its status says it."""
        state = self.state
        steps = state.run_step - state.step + state.planned
        return {"stage": state.stage, "step": state.run_step, "steps": steps}

    def live(self, last: bool) -> bool:
        """Train to the stage's end; false where someone stopped it."""
        run, state = self.run, self.state
        with run.open_log() as log, run.open_samples() as samples, _Stop() as stop:
            log.truncate_after(state.run_step)
            # The look at a stage's end comes after its last checkpoint, and is then done again.
            samples.truncate_after(state.run_step - (state.step >= state.planned))
            title = f"{self.recipe.name}: {self.stage.name}"
            with LiveView(self.place()["steps"], title, start_step=state.run_step) as view:
                self.log, self.samples, self.view, self.stop = log, samples, view, stop
                steps = Pretraining(self.stage, state, self.note)
                gc.collect()
                gc.freeze()  # what is loaded by now stays: no need to walk it again and again
                steps.run(self.after_step)
                finished = state.step >= state.planned
                self.checkpoint()
                if finished:
                    self.look(limit=None)
        if finished and last:
            report_missing = finish_run(
                run, self.recipe, self.stage, state, self.data.tokenizer, self.last_validation
            )
            if report_missing:
                print(f"report.html was not drawn: {report_missing}")
        elif not finished:
            run.set_status("interrupted", **self.place())
            draw_report(run)
        return finished

    def note(self, record: dict[str, Any]) -> None:
        self.log.append(record)
        self.view.update(record)

    def after_step(self) -> bool:
        """Between steps: look, save, or stop. True to stop."""
        stage, state = self.stage, self.state
        place = self.place()
        self.view.set_total(place["steps"])
        if time.monotonic() - self.status_at > STATUS_SECONDS:
            self.run.set_status("running", **place)
            self.status_at = time.monotonic()
        if state.step < state.planned:
            if stage.validation_steps and state.step % stage.validation_steps == 0:
                self.look(limit=stage.validation_tokens)
            planned_now = stage.minutes is not None and state.step == PACE_STEPS
            if state.step % stage.checkpoint_steps == 0 or planned_now:
                self.checkpoint()
        return self.stop.asked

    def look(self, limit: int | None) -> None:
        """Validate, and let the model write."""
        stage, state = self.stage, self.state
        dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
        device = state.model.lm_head.weight.device.type
        if self.data.validation:
            with torch.autocast(device, dtype, dtype != torch.float32):
                seen = validate(
                    state.model,
                    self.data.validation,
                    batch_size=max(1, VALIDATION_TOKENS // stage.sequence_length),
                    sequence_length=stage.sequence_length,
                    isolate=stage.data.isolate_documents,
                    limit_tokens=limit,
                )
            self.last_validation = seen
            record: dict[str, Any] = {
                "kind": "validation",
                "step": state.run_step,
                "loss": seen.loss,
                "bits_per_character": seen.bits_per_character,
                "tokens": seen.tokens,
                "seconds": state.seconds,
            }
            if seen.mtp_agreement:
                record["mtp_agreement"] = seen.mtp_agreement[0]
                record["mtp_loss"] = seen.mtp_loss[0]
            if not self.has_validated():
                self.note(record)
        for record in write_samples(state.model, self.data.tokenizer, stage):
            sample = {"kind": "sample", "step": state.run_step, **record}
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
        with self.run.new_checkpoint(state.run_step) as folder:
            state.save(folder)
        self.saved_at = state.run_step
        self.run.prune(keep=2)


def prepare(recipe: Recipe, stage: PretrainStage, kept: Path | None = None) -> PreparedData:
    """The stage's corpora as token shards, made once and kept in the cache.

    A run has one tokenizer: the first stage's, ``kept`` in the run folder for the others.
    """
    data = stage.data
    own = stage is recipe.stages[0] or kept is None or not kept.exists()
    prepared = prepare_corpus(
        [(entry.source, entry.weight) for entry in data.corpora],
        recipe.tokenizer.spec() if own else {"path": str(kept)},
        cache_folder() / "prepared" / f"{recipe.name}-{stage.name}-{_digest(recipe, stage)}",
        validation_fraction=data.validation_fraction,
        deduplicate=data.duplicate_threshold,
        fim_rate=data.fill_in_the_middle,
        seed=recipe.seed,
        progress=print,
    )
    if kept is None:
        return prepared
    if not kept.exists():
        prepared.tokenizer.save(kept)
    elif Tokenizer.load(kept).fingerprint != prepared.tokenizer.fingerprint:
        raise DataError(
            f"vocabulary mismatch: the text of stage {stage.name} now makes another tokenizer than "
            f"the one of this run ({kept}); restore the text, or start a new run"
        )
    return prepared


def check_prompts(recipe: Recipe, stage: PretrainStage, tokenizer: Tokenizer) -> None:
    """Before the first step, not at the first look."""
    context = recipe.model_for(tokenizer.vocab_size).max_position_embeddings
    for prompt in stage.samples.prompts:
        length = (tokenizer.bos_id is not None) + len(tokenizer.encode(prompt))
        if not 0 < length < context:
            raise RecipeError(
                f"stage {stage.name}: the sample prompt {prompt[:20]!r} has {length} tokens; "
                f"it must have from 1 to {context - 1}"
            )


def _digest(recipe: Recipe, stage: PretrainStage) -> str:
    """Tells apart the tokens of recipes that share a name."""
    settings = [recipe.seed, recipe.tokenizer.model_dump(), stage.data.model_dump()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> Transformer:
    """The recipe's model with random weights from its seed."""
    config = recipe.model_for(
        tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(recipe.seed))
    return model


def write_samples(
    model: Transformer, tokenizer: Tokenizer, stage: PretrainStage
) -> Iterator[dict[str, str]]:
    """What the model writes after each prompt of the stage."""
    settings = stage.samples
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


class _Stop:
    """Turns the first Ctrl-C (or SIGTERM) into a wish that the loop meets between two steps; the
    second works as usual."""

    asked = False

    def __enter__(self) -> _Stop:
        self.former = {
            number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.restore()

    def restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def __exit__(self, *details: object) -> None:
        self.restore()
