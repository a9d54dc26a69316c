"""The run folder: everything that a training result needs, and what one publishes.

    recipe.toml        the recipe as resolved: every default written out
    environment.json   versions, machine, command
    status.json        where it stands: running, interrupted, failed or finished
    log.jsonl          one line a step; samples.jsonl: what the model wrote on the way
    rollouts.jsonl     answers of reinforcement, one a line, as many a step as the stage keeps
    traces/            verified answers that rejection sampling kept, for a later stage to learn
    checkpoints/step-00001234/   resumable training states
    tokenizer/         the one tokenizer of all stages
    model/             the finished model in Hugging Face layout
    summary.json       the facts worth a table; report.html and README.md are made from all this

A name is the promise here: a checkpoint gets its name only when every byte is on the disk, so
whoever sees `step-00001234` may trust it, whatever killed the process before or after.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from qiusuo.runs.checkpoints import (
    clean_leftovers,
    list_checkpoints,
    prune_checkpoints,
    write_checkpoint,
)
from qiusuo.runs.durable import RunError, read_json, write_json, write_text
from qiusuo.runs.environment import describe_environment, now
from qiusuo.runs.lock import RunLock
from qiusuo.runs.log import NoLog, RunLog
from qiusuo.runs.rollouts import RolloutLog
from qiusuo.runs.toml import dump_toml

State = Literal["running", "interrupted", "failed", "finished"]
STATES: tuple[State, ...] = ("running", "interrupted", "failed", "finished")


def default_run_path(name: str, root: str | Path = "runs") -> Path:
    """`root/name`, or the first free of `root/name-2`, `root/name-3`, ...; creates nothing."""
    if not name or name in {".", ".."} or "/" in name or "\\" in name or "\0" in name:
        raise RunError(f"{name!r} cannot name a run: give a plain name without slashes")
    path, number = Path(root, name), 1
    while path.exists():
        number += 1
        path = Path(root, f"{name}-{number}")
    return path


class RunFolder:
    """One run on disk. Made by `create` or `open`; a context manager that gives up the lock.

    Paths: `path`, `log_path`, `samples_path`, `rollouts_path`, `traces_path`,
    `checkpoints_path`, `model_path`, `report_path`, `card_path`. What writes needs the
    lock and raises RunError without it.
    """

    def __init__(self, path: Path, lock: RunLock | None) -> None:
        self.path = path
        self.log_path = path / "log.jsonl"
        self.samples_path = path / "samples.jsonl"
        self.rollouts_path = path / "rollouts.jsonl"
        self.traces_path = path / "traces"
        self.checkpoints_path = path / "checkpoints"
        self.model_path = path / "model"
        self.report_path = path / "report.html"
        self.card_path = path / "README.md"
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: str | Path,
        recipe: Mapping[str, Any],
        *,
        version: str = "unknown",
        command: Sequence[str] | None = None,
    ) -> RunFolder:
        """Make a new run at `path` (absent or empty) and lock it.

        `version` is qiusuo's, `command` the words typed (default: this process's). Raises
        RunError when something is there already, or when the recipe cannot be written.
        """
        path = Path(path)
        text = dump_toml(recipe)  # before anything is made: a bad recipe leaves no folder
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path)
        try:
            if (path / "recipe.toml").exists():
                raise RunError(f"{path} already holds a run; resume it or choose another folder")
            if any(entry.name != ".lock" for entry in path.iterdir()):
                raise RunError(f"{path} is not empty and holds no run; choose another folder")
            (path / "checkpoints").mkdir()
            write_json(path / "environment.json", describe_environment(version, command))
            write_text(path / "recipe.toml", text)  # last: with it, the folder is a run
        except BaseException:
            lock.release()
            raise
        return cls(path, lock)

    @classmethod
    def open(cls, path: str | Path, *, lock: bool = True) -> RunFolder:
        """Open the run at `path`; with `lock=False` only to read, even while it trains.

        With the lock, what a killed process left half written is cleaned away.
        """
        path = Path(path)
        if not (path / "recipe.toml").is_file():
            raise RunError(f"{path} is not a run folder: it has no recipe.toml")
        if not lock:
            return cls(path, None)
        folder = cls(path, RunLock(path))
        folder.checkpoints_path.mkdir(exist_ok=True)
        clean_leftovers(folder.path)
        clean_leftovers(folder.checkpoints_path)
        return folder

    def close(self) -> None:
        """Give up the lock; harmless when done twice."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as resolved."""
        return read_recipe(self.path)

    @property
    def environment(self) -> dict[str, Any]:
        """What `describe_environment` saw when the run began, and `resumed`, a list of later."""
        return dict(read_json(self.path / "environment.json"))

    def record_resumption(self, version: str, command: Sequence[str] | None = None) -> None:
        """Add this process's environment: a run may go on elsewhere, and its speed with it."""
        self._need_lock("record a resumption")
        known = self.environment
        known.setdefault("resumed", []).append(describe_environment(version, command))
        write_json(self.path / "environment.json", known)

    def open_log(self) -> RunLog:
        """The log of steps, validations and events, for appending."""
        self._need_lock("write the log")
        return RunLog(self.log_path)

    def open_samples(self) -> RunLog:
        """The log of samples: records of kind "sample" with `prompt` and `continuation`."""
        self._need_lock("write samples")
        return RunLog(self.samples_path)

    def open_rollouts(self) -> RolloutLog:
        """The answers of reinforcement, for appending; `read_rollouts` pages through them."""
        self._need_lock("write rollouts")
        return RolloutLog(self.rollouts_path)

    def set_status(
        self,
        state: State,
        *,
        stage: str = "",
        step: int = 0,
        steps: int = 0,
        error: str | None = None,
    ) -> None:
        """Say where the run stands: `step` of `steps` in `stage`; cheap, once a step is fine."""
        self._need_lock("set the status")
        if state not in STATES:
            raise RunError(f"unknown run state {state!r}; it is one of {', '.join(STATES)}")
        status = {"stage": stage, "step": step, "steps": steps, "state": state}
        write_json(
            self.path / "status.json",
            {**status, "error": error, "updated": now()},
            sync=state != "running",
        )

    def status(self) -> dict[str, Any]:
        """The last status set, {} when none was."""
        return read_status(self.path)

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """Fill the folder that this yields; on success it becomes the checkpoint of `step`.

        Everything in it is synced to disk and then renamed in one go. On any error, an
        interrupt too, nothing of it remains, and a full disk becomes a RunError. A checkpoint
        of the same step is replaced.
        """
        self._need_lock("write a checkpoint")
        with write_checkpoint(self.checkpoints_path, step) as folder:
            yield folder

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Every whole checkpoint as (step, path), the earliest first."""
        return list_checkpoints(self.checkpoints_path)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """The last whole checkpoint as (step, path), or None."""
        return next(reversed(self.checkpoints()), None)

    def prune(self, keep: int = 2, protect: Collection[int] = ()) -> list[int]:
        """Delete all but the last `keep` checkpoints and the steps in `protect`.

        Returns the steps deleted. The latest always stays: without it a run cannot go on.
        """
        self._need_lock("delete checkpoints")
        return prune_checkpoints(self.checkpoints_path, keep, protect)

    def _need_lock(self, what: str) -> None:
        if self._lock is None or not self._lock.held:
            raise RunError(f"cannot {what}: {self.path} was opened without its lock, or closed")


class FollowedRun(RunFolder):
    """A run that another process writes while this one works on it too: what is read is read, and
    what would be written is not."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, None)

    def record_resumption(self, version: str, command: Sequence[str] | None = None) -> None:
        return

    def open_log(self) -> RunLog:
        return NoLog()

    open_samples = open_log

    def set_status(self, state: State, **facts: Any) -> None:
        return

    def prune(self, keep: int = 2, protect: Collection[int] = ()) -> list[int]:
        return []


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The resolved recipe of the run folder `path`; {} when it has none."""
    file = Path(path, "recipe.toml")
    if not file.is_file():
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is not valid TOML: {error}") from error


def read_status(path: str | Path) -> dict[str, Any]:
    """The status of the run folder `path`; {} when none was ever set."""
    file = Path(path, "status.json")
    return dict(read_json(file)) if file.is_file() else {}
