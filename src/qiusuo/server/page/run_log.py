"""A run's log for the page: no more is parsed than is new, and no more is sent than can be drawn.

A night's log is tens of megabytes. So two things are kept of each file: a *glance* (its first and
latest step, its best validation), for which no line but those is parsed, and an *index* (where
each record stands, and its numbers as columns), from which the lines worth sending are chosen;
only they are read again.
"""

from __future__ import annotations

import json
import math
import threading
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qiusuo.runs.series import is_number, spread, thin
from qiusuo.server.page.growing import GrowingFile

MOST_POINTS = 2000  # of a curve: a screen has no more
MOST_TEXTS = 500  # samples, events and the like: the latest
MOST_TEXT_BYTES = 4 << 20
MOST_LOADS = 200  # rows of a heat map
MOST_CELLS = 400_000  # numbers of all its rows
NUMERIC = {"step", "rollout", "validation"}
LEADING = ("reward", "loss")  # the first that is there keeps its every spike
SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
STEP, ROLLOUT = b'"kind": "step"', b'"kind": "rollout"'
VALIDATION = b'"kind": "validation"'

Record = dict[str, Any]


class Glance(GrowingFile):
    """The first and last step of a log, its last rollouts and its lowest validation loss. Not for
    several threads."""

    first: Record | None = None
    last: Record | None = None
    rollout: Record | None = None
    best: float | None = None

    def refresh(self) -> None:
        while (new := self.chunk()) is not None:
            data = new[1]
            if self.first is None:
                self.first = _record_at(data, data.find(STEP))
            self.last = _record_at(data, data.rfind(STEP)) or self.last
            self.rollout = _record_at(data, data.rfind(ROLLOUT)) or self.rollout
            place = data.find(VALIDATION)
            while place >= 0:
                loss = (_record_at(data, place) or {}).get("loss")
                if isinstance(loss, int | float) and math.isfinite(loss):
                    self.best = loss if self.best is None else min(self.best, loss)
                place = data.find(VALIDATION, place + 1)

    def forget(self) -> None:
        self.first = self.last = self.rollout = self.best = None


class _Table:
    """The records of one kind: where they stand, their numbers, and which hold a heat map's row."""

    def __init__(self) -> None:
        self.starts, self.ends = array("Q"), array("Q")
        self.columns: dict[str, array[float]] = {}
        self.loads: list[int] = []
        self.cells = 1

    def add(self, start: int, end: int, record: Record) -> None:
        row = len(self.starts)
        self.starts.append(start)
        self.ends.append(end)
        if record["kind"] not in NUMERIC:
            return
        for key, value in record.items():
            number = SPECIAL.get(value) if isinstance(value, str) else value
            if number is not None and is_number(number):
                column = self.columns.setdefault(key, array("d"))
                column.extend([math.nan] * (row - len(column)))
                column.append(number)
            elif _is_heat(value):
                self.loads.append(row)
                self.cells = max(self.cells, sum(len(part) for part in value))

    def column(self, key: str) -> NDArray[np.float64]:
        """One value a record, NaN where a record has none."""
        values = np.full(len(self.starts), np.nan)
        known = self.columns[key]
        values[: len(known)] = known
        return values

    def chosen(self, begin: int, every: int) -> set[int]:
        """Rows from ``begin`` on that carry the curves: all if they are few; else the lowest and
        the highest of each stretch of the leading one, and of each other one in all."""
        rows = np.arange(begin, len(self.starts))
        if not len(rows):
            return set()
        kept = {int(rows[0]), int(rows[-1])}
        rows = rows[::every]
        if len(rows) <= MOST_POINTS:
            return kept | set(rows.tolist())
        leading = next((key for key in LEADING if key in self.columns), None)
        values = np.zeros(len(rows)) if leading is None else self.column(leading)[rows]
        kept |= {int(row) for row in thin(rows.astype(np.float64), values, MOST_POINTS)[0]}
        # A loss that is not finite is what one looks for.
        kept |= set(spread(rows[~np.isfinite(values)].tolist(), 50))
        for key in self.columns:
            values = self.column(key)[rows]
            if np.isfinite(values).any():
                finite = np.where(np.isfinite(values), values, np.nan)
                kept |= {int(rows[np.nanargmin(finite)]), int(rows[np.nanargmax(finite)])}
        return kept

    def chosen_loads(self, begin: int) -> set[int]:
        most = min(MOST_LOADS, max(2, MOST_CELLS // self.cells))
        return set(spread(self.loads[bisect_left(self.loads, begin) :], most))

    def latest(self, begin: int) -> set[int]:
        """The last rows, as many as may be sent."""
        kept: set[int] = set()
        room = MOST_TEXT_BYTES
        for row in range(len(self.starts) - 1, begin - 1, -1):
            room -= self.ends[row] - self.starts[row]
            if len(kept) >= MOST_TEXTS or (room < 0 and kept):
                break
            kept.add(row)
        return kept


class LogIndex(GrowingFile):
    """Where the records of a log stand. Its calls may come from several threads."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._tables: dict[str, _Table] = {}
        self._order = threading.Lock()

    def records(
        self, kind: str | None = None, every: int = 1, after: int = 0
    ) -> tuple[list[Record], int]:
        """Records that begin at byte ``after`` or later, in the file's order, and the byte at which
        the next ones will. Those of a kind with curves are thinned, first to each ``every``-th
        and then to about MOST_POINTS; of the others the latest are given."""
        with self._order:
            self._refresh()
            places: list[tuple[int, int, bool]] = []
            for name, table in self._tables.items():
                if kind in (None, name):
                    places += self._places(name, table, every, after)
            return self._read(sorted(places)), self.end

    def forget(self) -> None:
        self._tables.clear()

    def _refresh(self) -> None:
        while (new := self.chunk()) is not None:
            start, data = new
            for line in data.splitlines(keepends=True):
                end = start + len(line)
                record = _record(line)
                if record is not None:
                    self._tables.setdefault(record["kind"], _Table()).add(start, end, record)
                start = end

    @staticmethod
    def _places(kind: str, table: _Table, every: int, after: int) -> list[tuple[int, int, bool]]:
        """(start, end, whether with the heat map's row) of the records to give."""
        begin = bisect_left(table.starts, after)
        if kind in NUMERIC:
            loads = table.chosen_loads(begin)
            rows = table.chosen(begin, every) | loads
        else:
            rows, loads = table.latest(begin), set()
        return [(table.starts[row], table.ends[row], row in loads) for row in rows]

    def _read(self, places: Sequence[tuple[int, int, bool]]) -> list[Record]:
        records: list[Record] = []
        if not places:
            return records
        with self.path.open("rb") as file:
            for start, end, with_load in places:
                file.seek(start)
                record = _record(file.read(end - start))
                if record is None:  # the file was replaced in this very moment
                    continue
                if not with_load:
                    record = {key: value for key, value in record.items() if not _is_heat(value)}
                records.append(record)
        return records


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_one = isinstance(record, dict) and isinstance(record.get("kind"), str)
    return record if is_one else None


def _record_at(data: bytes, place: int) -> Record | None:
    """The record of the line around ``place``."""
    if place < 0:
        return None
    return _record(data[data.rfind(b"\n", 0, place) + 1 : data.find(b"\n", place)])


def _is_heat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)
