"""Before and after: what each stage of a run did to the accuracy on held-out problems.

The looks that count are the one before the first stage that was measured and the last one of each
stage. A cell is a task at one difficulty after one stage: how often the model's surest (greedy)
answer is right, with a 95% interval, how often a sampled one is (pass@1, pass@k), and whatever else
the look measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qiusuo.runs.series import Records, is_number
from qiusuo.runs.words import format_number

Measures = Mapping[str, Any]
_INTERVAL = {"accuracy", "accuracy_low", "accuracy_high"}
# Measures that are no share, with their units.
_COUNTS = {"length": "tokens", "sampled_length": "tokens sampled", "problems": "problems"}
_NAMES = {"trace_valid": "valid traces", "thought": "with a thought"}


@dataclass(frozen=True)
class Outcomes:
    """A table: a column for each look, named and with its step, and a row for each task."""

    columns: list[tuple[str, int]]
    rows: list[tuple[str, list[Measures | None]]]

    @property
    def intervals(self) -> bool:
        """Whether any accuracy comes with its interval."""
        return any("accuracy_low" in cell for _, cells in self.rows for cell in cells if cell)

    def mean_accuracy(self) -> tuple[float, float, int] | None:
        """The first and the last mean accuracy, and over how many tasks: those that both looks
        have. None without two looks that share one."""
        pairs = [
            (cells[0]["accuracy"], cells[-1]["accuracy"])
            for _, cells in self.rows
            if cells[0] and cells[-1] and "accuracy" in cells[0] and "accuracy" in cells[-1]
        ]
        if not pairs or len(self.columns) < 2:
            return None
        first, last = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        return first, last, len(pairs)


def find_outcomes(records: Records) -> Outcomes | None:
    """The table of `records` (of `read_log`); None where no look was at problems."""
    looks = [r for r in records if r.get("kind") == "validation" and r.get("tasks")]
    stages: dict[str, list[dict[str, Any]]] = {}
    for look in looks:
        stages.setdefault(str(look.get("stage", "")), []).append(look)
    chosen: list[tuple[str, dict[str, Any]]] = []
    for stage, own in stages.items():
        before = next((look for look in own if look.get("when") == "before"), None)
        if before is not None and not chosen:
            chosen.append((f"before {stage}".strip(), before))
        later = [look for look in own if look.get("when") != "before"]
        if later:
            done = later[-1].get("when") == "after"
            words = f"after {stage}".strip() if stage else "after"
            chosen.append((words if done else f"{stage or 'run'}, so far", later[-1]))
    if not chosen:
        return None
    names = list(dict.fromkeys(name for _, look in chosen for name in look["tasks"]))
    rows = [(name, [look["tasks"].get(name) for _, look in chosen]) for name in in_order(names)]
    return Outcomes([(words, int(look["step"])) for words, look in chosen], rows)


def in_order(names: list[str]) -> list[str]:
    """Tasks in the order of their first mention, each one's difficulties from low to high."""
    tasks = list(dict.fromkeys(name.partition("/")[0] for name in names))

    def place(name: str) -> tuple[int, list[tuple[int, int, str]]]:
        task, _, difficulty = name.partition("/")
        parts = re.findall(r"\d+|\D+", difficulty)
        told = [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]
        return tasks.index(task), told

    return sorted(names, key=place)


def accuracy_words(cell: Measures) -> tuple[str, str]:
    """A cell's accuracy and its interval: ("97.3%", "96.1–98.2"); "" what it has not."""
    accuracy = share(cell["accuracy"]) if is_number(cell.get("accuracy")) else ""
    if is_number(cell.get("accuracy_low")) and is_number(cell.get("accuracy_high")):
        return accuracy, f"{100 * cell['accuracy_low']:.1f}–{100 * cell['accuracy_high']:.1f}"
    return accuracy, ""


def other_words(cell: Measures) -> list[str]:
    """A cell's other measures: ["pass@1 88.0%", "pass@8 99.1%", "31.2 tokens", ...]."""
    words = []
    for key, value in cell.items():
        if key in _INTERVAL or not is_number(value):
            continue
        if key in _COUNTS:
            whole = isinstance(value, int)
            words.append(f"{value:,} {_COUNTS[key]}" if whole else f"{value:.1f} {_COUNTS[key]}")
        else:
            shown = share(value) if 0 <= value <= 1 else format_number(value, 3)
            words.append(f"{measure_name(key)} {shown}")
    return words


def measure_name(key: str) -> str:
    """A measure's name for people: "pass_at_8" → "pass@8", "trace_valid" → "valid traces"."""
    passed = re.fullmatch(r"pass_at_(\d+|k)", key)
    return f"pass@{passed[1]}" if passed else _NAMES.get(key, key.replace("_", " "))


def share(value: float) -> str:
    """0.973 → "97.3%"."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else "–"
