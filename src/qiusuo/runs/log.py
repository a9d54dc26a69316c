"""The log: one JSON object a line, so that anything can read it and a kill loses one line.

Each record has a `kind`. A "step" tells of one optimizer step, a "rollout" of one step of
reinforcement (all answers of a batch, in sum; the answers themselves are in `rollouts`), a
"validation" of one look at held-out text or problems, a "sample" of what the model wrote, an
"event" of anything else. All but events carry the `step` they belong to; other fields are
optional and may be new. `stage` is the name of the stage of the recipe.

    step        loss, mtp_loss (nats/token), balance_loss, grad_norm, lr, tokens (so far),
                tokens_per_second, flops_per_second, peak_share (0..1 of the machine's measured
                matmul peak), max_violation (one MaxVio per MoE layer), expert_load (per MoE
                layer a list per expert, 1.0 being its even share), seconds (of training), stage;
                of several processes communication_bytes (what all of them sent in the step) and
                communication_bytes_modelled (what the shapes foretell); minutes (that the stage
                may take, until it is planned how many steps these are).
                The loss of a step of reinforcement is that of its policy, in no unit.
    rollout     reward (mean), pass_at_1, pass_at_k (0..1), k (answers a problem), entropy
                (nats/token), length, length_right, length_wrong (mean tokens of a response),
                zero_variance_share (0..1 of the groups: all answers paid alike, nothing to
                learn), clip_share (0..1 of the tokens), kl (to the reference), mismatch_kl,
                mismatch_max (engine against trainer, nats/token; known at temperature 1),
                importance_weight (mean), trace_valid (0..1 of the thoughts), thought (0..1 of the
                responses that have one), by_task {"task/difficulty": pass rate},
                rollout_seconds, update_seconds, refills (rounds of further problems),
                curriculum (how hard it is now), stage. It comes before the
                step records of its step; a stage that only samples has none.
    validation  loss (nats/token), bits_per_character, seconds, stage, when ("before" or "after"
                the stage; absent: in its course), tasks {"task/difficulty": {accuracy (greedy),
                accuracy_low, accuracy_high (95% interval), problems (how many), pass_at_1,
                pass_at_8, ... (sampled), length, sampled_length (tokens), any other measure}}.
                A look at text has the former, a look at problems `tasks`; one may have both.
    sample      prompt, continuation
    event       text

JSON knows no NaN or infinity, and a loss that became one is the very line to keep: they are
written as the strings "NaN", "Infinity", "-Infinity", and `read_log` turns them back into
numbers in step, rollout and validation records.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from qiusuo.runs.durable import RunError, disk_full, is_disk_full, to_json, write_text

KINDS = ("step", "rollout", "validation", "sample", "event")

_NUMERIC = {"step", "rollout", "validation"}
_BLOCK = 1 << 16  # bytes read at once from a file's end
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunLog:
    """Appends records to the file `path`, making it if need be; a context manager.

    A last line torn by a kill is cut off on opening, so that the next one starts clean.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._mend()
        self._file = self.path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record and hand it to the system at once.

        Tensors and arrays become lists. Raises RunError for an unknown kind, a missing step, a
        value that JSON cannot hold, a closed log, or a full disk (the log stays whole).
        """
        line = self._encode(record)
        if self._file.closed:
            raise RunError(f"{self.path} is closed; open the log again to write to it")
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):  # a disk filling up takes part of a line, then fails
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(start)
            if is_disk_full(error, self.path.parent):
                raise disk_full(self.path, "all earlier lines are intact") from error
            raise

    def truncate_after(self, step: int) -> int:
        """Drop every record of a step later than `step`; returns how many.

        For resuming from an earlier checkpoint: those steps are about to happen again. The
        file is replaced in one go. Records without a step stay.
        """
        lines = list(_lines(self.path))
        kept = [line for line, record in lines if record.get("step", step) <= step]
        if len(kept) < len(lines):
            write_text(self.path, "".join(line + "\n" for line in kept))
            self._reopen()
        return len(lines) - len(kept)

    def sync(self) -> None:
        """Return when every line is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Put everything on the disk and close; harmless when done twice."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, record: Mapping[str, Any]) -> bytes:
        """The record's line."""
        return _encode(record)

    def _reopen(self) -> None:
        """Write on to the file that now has the name."""
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def _mend(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            start, tail = _unfinished(file)
            if tail and _is_record(tail):  # only its newline was lost
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            elif tail:
                file.truncate(start)


class NoLog(RunLog):
    """Keeps nothing: for a process beside the one that writes."""

    def __init__(self) -> None:
        return

    def append(self, record: Mapping[str, Any]) -> None:
        return

    def truncate_after(self, step: int) -> int:
        return 0

    def sync(self) -> None:
        return

    def close(self) -> None:
        return


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """All records of the log at `path`, in order; [] when there is no file yet.

    A torn last line (no newline, not JSON) is what a kill leaves, and is passed over. Any
    other bad line raises RunError with its number.
    """
    records = (record for _, record in _lines(Path(path)))
    return [_restore_all(record) if record["kind"] in _NUMERIC else record for record in records]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line with the object in it."""
    if not path.exists():
        return
    data = path.read_bytes()
    start, tail = _last_line(data)
    if tail and not _is_record(tail):
        data = data[:start]
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else (), 1):
        try:
            text = line.decode("utf-8")
            record = json.loads(text)
        except ValueError as error:
            raise RunError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(record, dict) or record.get("kind") not in KINDS:
            raise RunError(
                f"{path}, line {number} is not a log record: "
                f'it needs a "kind" among {", ".join(KINDS)}'
            )
        yield text, record


def _last_line(data: bytes) -> tuple[int, bytes]:
    """Where the bytes after the last newline begin, and those bytes."""
    start = data.rfind(b"\n") + 1
    return start, data[start:]


def _unfinished(file: BinaryIO) -> tuple[int, bytes]:
    """As `_last_line`, for a file of any size."""
    start, tail = file.seek(0, os.SEEK_END), b""
    while start and b"\n" not in tail:
        size = min(_BLOCK, start)
        start -= size
        file.seek(start)
        tail = file.read(size) + tail
    cut, tail = _last_line(tail)
    return start + cut, tail


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _encode(record: Mapping[str, Any]) -> bytes:
    kind = record.get("kind")
    if kind not in KINDS:
        raise RunError(f'a log record needs a "kind" among {", ".join(KINDS)}, not {kind!r}')
    step = record.get("step")
    if kind != "event" and (not isinstance(step, int) or isinstance(step, bool)):
        raise RunError(f'a log record of kind "{kind}" needs a whole-number "step", not {step!r}')
    return to_line(record, f"the log cannot hold this record of kind {kind}")


def to_line(record: Mapping[str, Any], refusal: str) -> bytes:
    """The record as one line of JSON; RunError beginning with `refusal` where JSON cannot."""
    try:
        return (json.dumps(to_json(record), ensure_ascii=False) + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise RunError(f"{refusal}: {error}") from error


def _restore_all(record: dict[str, Any]) -> dict[str, Any]:
    return {key: _restore(value) for key, value in record.items()}


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(item) for item in value]
    if isinstance(value, dict):
        return _restore_all(value)
    return _SPECIAL.get(value, value) if isinstance(value, str) else value
