"""What the tests of several files share: the tasks, and right responses."""

import random

from qiusuo.tasks.registry import OURS
from qiusuo.tasks.task import Problem, Task, problems

# Verse and programs have tests of their own; here are numbers and expressions.
TASKS = [task() for task in OURS if task.name not in {"verse", "programs"}]
NAMES = [task.name for task in TASKS]


def some(task: Task, count: int, seed: int = 0) -> list[Problem]:
    return list(problems(task, "train", seed, list(task.difficulties), count))


def solved(task: Task, problem: Problem, *, thought: bool, seed: int = 0) -> str:
    return task.solution(problem, random.Random(seed), thought=thought)
