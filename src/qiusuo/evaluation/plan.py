"""Which tasks at which difficulties, as somebody types them.

chains      chains:4      chains:4-10      my_task.py:2-5
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qiusuo.tasks.registry import find_task
from qiusuo.tasks.task import Task, TaskError

DIFFICULTIES = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class AskedTask:
    """A task, and the difficulties it is measured at."""

    task: Task
    difficulties: Sequence[int]


def read_asked_task(text: str) -> AskedTask:
    """TaskError for an unknown task, and for difficulties that are none or not the task's. Without
    any, all that the task has."""
    name, colon, asked = text.rpartition(":")
    if not colon or asked.endswith(".py"):  # C:\tasks\mine.py
        task = find_task(text)
        return AskedTask(task, task.difficulties)
    match = DIFFICULTIES.fullmatch(asked)
    if match is None:
        raise TaskError(f"{text!r}: behind the colon go difficulties, such as 4 or 4-5")
    task = find_task(name)
    low, high = int(match[1]), int(match[2] or match[1])
    if low > high:
        raise TaskError(f"{text!r}: the first difficulty is above the last")
    task.check_difficulty(low)
    task.check_difficulty(high)
    return AskedTask(task, [one for one in task.difficulties if low <= one <= high])
