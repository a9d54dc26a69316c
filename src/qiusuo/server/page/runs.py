"""The runs on this machine: what their folders say, read again only where it has changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from qiusuo.runs.durable import RunError, read_json, to_json
from qiusuo.runs.facts import RunFacts
from qiusuo.runs.folder import RunFolder, read_recipe, read_status
from qiusuo.runs.lock import writer_of
from qiusuo.runs.progress import Progress
from qiusuo.runs.rollouts import is_right, read_rollouts, rollout_steps, split_response
from qiusuo.runs.series import is_number
from qiusuo.runs.summary import read_summary
from qiusuo.server.api.errors import ApiError
from qiusuo.server.page.run_log import Glance, LogIndex, Record

MOST_RUNS = 1000  # listed, the latest first
MOST_INDEXES = 16  # logs whose places are kept in memory
LONGEST_NAME = 200  # bytes; file systems take 255, and a console's name is a little longer
CONSOLE_BYTES = 8 << 10  # of what a training printed last

T = TypeVar("T")


class Runs:
    """The runs in the folder ``root``, by the names of their folders. Use from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._order = threading.RLock()
        self._files: dict[Path, tuple[tuple[int, int], Any]] = {}
        self._glances: dict[str, Glance] = {}
        self._indexes: dict[tuple[str, str], LogIndex] = {}

    def summaries(self) -> list[dict[str, Any]]:
        """A summary of each run, the latest first."""
        if not self.root.is_dir():
            return []
        names = [path.name for path in self.root.iterdir() if self._is_run(path)]
        told = sorted((self.summary(name) for name in names), key=lambda run: -run["started"])
        return told[:MOST_RUNS]

    def path(self, name: str) -> Path:
        """The folder of a run; ApiError 404 where there is none of this name."""
        if is_plain(name) and self._is_run(self.root / name):
            return self.root / name
        raise ApiError(404, f"there is no run {name[:80]!r} in {self.root}")

    def summary(self, name: str) -> dict[str, Any]:
        """What the list of runs shows of one."""
        path = self.path(name)
        with self._order:
            recipe = self._kept(path / "recipe.toml", lambda: read_recipe(path))
            status = self._kept(path / "status.json", lambda: read_status(path))
            environment = self._environment(path)
            glance = self._glance(name)
        first, last = glance.first or {}, glance.last or {}
        rollout = glance.rollout or {}
        if _whole(rollout.get("step")) < _whole(last.get("step")):
            rollout = {}  # a later stage learns otherwise
        state = _state(path, status)
        step = max(_whole(told.get("step")) for told in (status, last, rollout))
        steps = max(_whole(status.get("steps")), step) or _planned(recipe)
        return to_json(
            {
                "id": name,
                "name": recipe.get("title") or name,
                "recipe": recipe.get("name", ""),
                "state": state,
                "started": _seconds(environment.get("started")) or path.stat().st_mtime,
                "step": step,
                "steps": steps,
                "stage": status.get("stage") or (rollout or last).get("stage") or "",
                "progress": 1.0 if state == "finished" else step / steps if steps else 0.0,
                "eta_seconds": self._seconds_left(path, state, steps, first, last),
                "loss": None if rollout else last.get("loss"),
                "reward": rollout.get("reward"),
                "best": glance.best,
                "model": (path / "model" / "config.json").is_file(),
                "error": status.get("error") if state in {"failed", "interrupted"} else None,
                "report": (path / "report.html").is_file(),
            }
        )

    def details(self, name: str) -> dict[str, Any]:
        """All that is small: recipe, environment, table of facts, the end of what it printed."""
        path = self.path(name)
        summary = self.summary(name)
        with self._order:
            recipe = self._kept(path / "recipe.toml", lambda: read_recipe(path))
            environment = self._environment(path)
            facts = self._kept(path / "summary.json", lambda: read_summary(path))
        stages = recipe.get("stages")
        return to_json(
            summary
            | {
                "recipe": recipe,
                "environment": environment,
                "summary": facts,
                "stages": [
                    {key: stage.get(key) for key in ("name", "kind", "steps", "minutes")}
                    for stage in (stages if isinstance(stages, list) else [])
                    if isinstance(stage, dict)
                ],
                "console": tail(console_of(path)),
            }
        )

    def index(self, name: str, kind: str | None) -> LogIndex:
        """The index of the file in which a run's records of this kind stand."""
        file = "samples.jsonl" if kind == "sample" else "log.jsonl"
        path = self.path(name) / file
        with self._order:
            found = self._indexes.pop((name, file), None) or LogIndex(path)
            self._indexes[name, file] = found  # as the latest used
            while len(self._indexes) > MOST_INDEXES:
                self._indexes.pop(next(iter(self._indexes)))
        return found

    def rollouts(
        self,
        name: str,
        first: int | None,
        last: int | None,
        right: bool | None,
        task: str | None,
        start: int | None,
        most: int,
    ) -> dict[str, Any]:
        """A page of a run's answers, from the last step that has any where no ``first`` is given,
        and the first and last step of which there are any."""
        path = RunFolder.open(self.path(name), lock=False).rollouts_path
        try:
            bounds = rollout_steps(path)
            begin = first if first is not None else bounds[1] if bounds else 0
            page = read_rollouts(path, begin, last, right=right, task=task, start=start, most=most)
        except RunError as error:
            raise ApiError(409, str(error)) from error
        shown = [_shown(rollout) for rollout in page.rollouts]
        return to_json({"rollouts": shown, "next": page.next, "steps": bounds})

    def logs(self, name: str) -> tuple[Path, Path]:
        """The run's log and its samples."""
        run = RunFolder.open(self.path(name), lock=False)
        return run.log_path, run.samples_path

    # -- inside -----------------------------------------------------------------------------

    @staticmethod
    def _is_run(path: Path) -> bool:
        return not path.name.startswith(".") and (path / "recipe.toml").is_file()

    def _environment(self, path: Path) -> dict[str, Any]:
        file = path / "environment.json"
        return self._kept(file, lambda: read_json(file) if file.is_file() else {})

    def _glance(self, name: str) -> Glance:
        glance = self._glances.setdefault(name, Glance(self.root / name / "log.jsonl"))
        glance.refresh()
        return glance

    def _kept(self, file: Path, read: Callable[[], T]) -> T | dict[str, Any]:
        """What ``read`` said when the file was last changed; {} where it is damaged: one bad run
        must not hide the others."""
        try:
            status = file.stat()
            mark = (status.st_mtime_ns, status.st_ino)
        except OSError:
            mark = (0, 0)
        if self._files.get(file, (None,))[0] != mark:
            try:
                value: Any = read()
            except (RunError, OSError):
                value = {}
            self._files[file] = (mark, value)
        return self._files[file][1]

    @staticmethod
    def _seconds_left(
        path: Path, state: str, steps: int, first: Record, last: Record
    ) -> float | None:
        """As the terminal's live view has it: the rest at the pace so far."""
        spent, began = _number(last.get("seconds")), _number(first.get("seconds"))
        if state != "running" or spent is None or began is None:
            return None
        progress = Progress(steps, "", _whole(first.get("step")), began)
        limit = {"minutes": last["minutes"]} if "minutes" in last else {}
        progress.add({"step": _whole(last.get("step")), **limit}, spent)
        since = time.time() - (path / "log.jsonl").stat().st_mtime
        return progress.seconds_left(spent + max(since, 0.0))


def _shown(rollout: dict[str, Any]) -> dict[str, Any]:
    """An answer with its thought apart, and whether it counts as right."""
    thought, text = split_response(str(rollout.pop("response", "")))
    return rollout | {"thought": thought, "text": text, "right": is_right(rollout)}


def is_plain(name: str) -> bool:
    """Whether this can name an entry of a folder, and nothing outside of it."""
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        return False
    return len(name.encode("utf-8", "replace")) <= LONGEST_NAME


def console_of(path: Path) -> Path:
    """Where what a training of this run prints goes."""
    return path / "console.txt"


def tail(file: Path, most: int = CONSOLE_BYTES) -> str:
    """The last lines of a text file, "" where there is none."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - most))
            return stream.read().decode("utf-8", "replace")
    except OSError:
        return ""


def sample_prompts(recipe: dict[str, Any]) -> list[str]:
    """Of a resolved recipe: what its last stage lets the model go on with."""
    try:
        return [str(prompt) for prompt in recipe["stages"][-1]["samples"]["prompts"]]
    except (KeyError, IndexError, TypeError):
        return []


def _state(path: Path, status: dict[str, Any]) -> str:
    """The state last set; "killed" where it says running and no process is, "starting" while a
    process makes ready that has not yet said anything."""
    told = RunFacts(path, {}, {}, status, {}, [], []).state
    if told in {"unknown", "interrupted", "failed"} and writer_of(path) is not None:
        # The lock is written when it is taken. After a run has failed it is held a little longer,
        # while the report is drawn: that is no new beginning.
        taken = (path / ".lock").stat().st_mtime
        if int(taken) > (_seconds(status.get("updated")) or 0.0):
            return "starting"
    return "killed" if told == "unknown" else told


def _seconds(moment: Any) -> float | None:
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError):
        return None


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _whole(value: Any) -> int:
    return int(value) if is_number(value) and abs(value) < 1 << 53 else 0


def _planned(recipe: dict[str, Any]) -> int:
    try:
        return _whole(recipe["stages"][0]["steps"])
    except (KeyError, IndexError, TypeError):
        return 0
