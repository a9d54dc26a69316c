"""`rollouts.jsonl`: what a policy answered on the way, one answer a line, and how to page through.

    step, stage    of the run            task, difficulty, prompt    what was asked
    response       all it wrote, `<think>` and `</think>` among it   tokens   how many they are
    reward         what it was paid      right    whether it counts as right (absent: reward > 0)
    answer         what was taken as the answer, null if nothing was
    reason         the verifier's words  measures    what else it saw, such as trace_valid
    advantage      against its group     version    of the weights that wrote it

How many a step are kept is for the stage to say; 500 steps of reinforcement may still be 50 MB.
The lines stand in the order of their steps, so a step is found by halving the file: a few dozen
seeks, and no more of it is read than is shown.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qiusuo.runs.durable import TEMPORARY, RunError, disk_full, is_disk_full, sync_directory
from qiusuo.runs.log import RunLog, to_line

MOST_PAGE_BYTES = 2 << 20  # of the lines of one page
MOST_SCAN_BYTES = 16 << 20  # read for one page, however few of the lines are asked for
_NEAR = 4096  # bytes; so little is read in order rather than halved
_BLOCK = 1 << 16  # bytes read at once from the end

Rollout = dict[str, Any]


@dataclass(frozen=True)
class RolloutPage:
    """`next`: the byte to go on at, None when no more are to come; a page may be short, or even
    empty, with more to come, when few of many answers are asked for."""

    rollouts: list[Rollout]
    next: int | None


class RolloutLog(RunLog):
    """Appends answers to the file `path`; steps may come again but never go back, other than by
    `truncate_after`."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        bounds = rollout_steps(self.path)
        self._last = bounds[1] if bounds else None

    def truncate_after(self, step: int) -> int:
        """Drop every answer of a step later than `step`, returns how many; the file is replaced
        in one go, and never wholly in memory."""
        with self.path.open("rb") as file:
            place = _place_of(file, step + 1)
            file.seek(place)
            dropped = sum(1 for _ in file)
            if dropped:
                self._keep(file, place)
        bounds = rollout_steps(self.path)
        self._last = bounds[1] if bounds else None
        return dropped

    def _keep(self, file: BinaryIO, size: int) -> None:
        """Replace the file by its first `size` bytes."""
        temporary = self.path.with_name(f"{TEMPORARY}{os.getpid()}-{self.path.name}")
        try:
            file.seek(0)
            with temporary.open("wb") as kept:
                shutil.copyfileobj(file, kept)
                kept.truncate(size)
                kept.flush()
                os.fsync(kept.fileno())
            temporary.replace(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if is_disk_full(error, self.path.parent):
                raise disk_full(self.path, "the file's earlier version is intact") from error
            raise
        self._reopen()

    def _encode(self, record: Mapping[str, Any]) -> bytes:
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise RunError(f'a rollout needs a whole-number "step", not {step!r}')
        if self._last is not None and step < self._last:
            raise RunError(
                f"{self.path} already holds rollouts of step {self._last}, after step {step}: "
                "drop them with truncate_after before these steps happen again"
            )
        line = to_line(record, f"{self.path} cannot hold this rollout")
        self._last = step
        return line


def read_rollouts(
    path: str | Path,
    first: int = 0,
    last: int | None = None,
    *,
    right: bool | None = None,
    task: str | None = None,
    start: int | None = None,
    most: int = 50,
) -> RolloutPage:
    """A page of the answers of steps `first` to `last` (both included), in the file's order.

    `right` keeps only those that are (or are not), `task` those of one "task" or
    "task/difficulty". `start` is the `next` of the page before. Without a file the page is empty;
    a line that is no rollout raises RunError with its place. A torn last line is passed over.
    """
    path = Path(path)
    if not path.is_file():
        return RolloutPage([], None)
    found: list[Rollout] = []
    room = MOST_PAGE_BYTES
    with path.open("rb") as file:
        begin = _place_of(file, first) if start is None else _line_start(file, start)
        for place, line, rollout in _rollouts_from(file, begin):
            if last is not None and rollout["step"] > last:
                break
            wanted = (right is None or is_right(rollout) == right) and is_of(rollout, task)
            room -= len(line) if wanted else 0
            full = len(found) >= most or (room < 0 and bool(found))
            if (wanted and full) or (not wanted and place - begin > MOST_SCAN_BYTES):
                return RolloutPage(found, place)
            if wanted:
                found.append(rollout)
    return RolloutPage(found, None)


def rollout_steps(path: str | Path) -> tuple[int, int] | None:
    """The first and the last step of which there are answers; None where there are none."""
    path = Path(path)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = next(_rollouts_from(file, 0), None)
        if first is None:
            return None
        latest = next(_rollouts_from(file, _last_line_start(file)))
    return first[2]["step"], latest[2]["step"]


def is_right(rollout: Mapping[str, Any]) -> bool:
    """Whether an answer counts as right."""
    if "right" in rollout:
        return bool(rollout["right"])
    reward = rollout.get("reward")
    return isinstance(reward, int | float) and reward > 0


def is_of(rollout: Mapping[str, Any], task: str | None) -> bool:
    """Whether an answer is one to `task`, a name alone or with a difficulty; None: to any."""
    name = str(rollout.get("task", ""))
    return task is None or task in {name, f"{name}/{rollout.get('difficulty')}"}


def split_response(response: str) -> tuple[str | None, str]:
    """The thought, without its marks, and what stands after it; the thought is None where there is
    no place for one, and all of the text where it was never closed."""
    text = response.lstrip()
    opened = text.startswith("<think>")
    thought, closed, rest = text.removeprefix("<think>").partition("</think>")
    if closed:
        return thought, rest
    return (thought, "") if opened else (None, response)


def _place_of(file: BinaryIO, step: int) -> int:
    """The byte at which the first line of `step`, or of a later one, begins."""
    low, high = 0, file.seek(0, os.SEEK_END)
    while high - low > _NEAR:
        middle = (low + high) // 2
        one = next(_rollouts_from(file, _line_start(file, middle)), None)
        if one is None or one[2]["step"] >= step:
            high = middle
        else:
            low = one[0] + len(one[1])
    place = low = _line_start(file, low)
    for place, line, rollout in _rollouts_from(file, low):
        if rollout["step"] >= step:
            return place
        low = place + len(line)
    return low


def _line_start(file: BinaryIO, place: int) -> int:
    """`place`, or where the next line begins if it is in the midst of one."""
    if place <= 0:
        return 0
    file.seek(place - 1)
    file.readline()
    return file.tell()


def _last_line_start(file: BinaryIO) -> int:
    """Where the last whole line begins; there must be one."""
    start, tail = file.seek(0, os.SEEK_END), b""
    while start and tail[: tail.rfind(b"\n") + 1].count(b"\n") < 2:
        size = min(_BLOCK, start)
        start -= size
        file.seek(start)
        tail = file.read(size) + tail
    return start + tail.rfind(b"\n", 0, tail.rfind(b"\n")) + 1


def _rollouts_from(file: BinaryIO, place: int) -> Iterator[tuple[int, bytes, Rollout]]:
    """(place, line, rollout) of each whole line from the byte `place` on."""
    while True:
        file.seek(place)  # whoever reads on may have looked elsewhere meanwhile
        line = file.readline()
        if not line.endswith(b"\n"):  # the end, or a line that is being written
            return
        try:
            rollout = json.loads(line)
            step = rollout["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(file, place) from error
        if not isinstance(step, int):
            raise _damaged(file, place)
        yield place, line, rollout
        place += len(line)


def _damaged(file: BinaryIO, place: int) -> RunError:
    return RunError(
        f"{getattr(file, 'name', 'rollouts.jsonl')}: the line at byte {place} is no rollout; it "
        'must be a JSON object with a whole-number "step"'
    )
