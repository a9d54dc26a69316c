"""What the tests of several files share: the tasks, and right responses."""

import random

from qiusuo.tasks.registry import OURS
from qiusuo.tasks.task import Problem, Task, problems

# Verse has tests of its own; these are the families whose answers are numbers and expressions.
TASKS = [
    task()
    for task in OURS
    if task.name in {"parity", "chains", "chains-plain", "arithmetic", "countdown", "word-problems"}
]
NAMES = [task.name for task in TASKS]


def some(task: Task, count: int, seed: int = 0) -> list[Problem]:
    return list(problems(task, "train", seed, list(task.difficulties), count))


def solved(task: Task, problem: Problem, *, thought: bool, seed: int = 0) -> str:
    return task.solution(problem, random.Random(seed), thought=thought)
