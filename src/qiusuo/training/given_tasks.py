"""The tasks that a recipe names, and their problems as training asks for them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from qiusuo.data.corpora import open_corpus
from qiusuo.evaluation.asking import Ask
from qiusuo.tasks.registry import find_task
from qiusuo.tasks.task import Problem, SplitName, Task, problems
from qiusuo.training.sections import TaskEntry
from qiusuo.training.stages import Stage

Stream = list[Problem]


def task_of(entry: TaskEntry) -> Task:
    """The entry's task, made from its corpus where it has one. TaskError or DataError where there
    is none."""
    return _made(entry.task, entry.corpus, json.dumps(entry.options, sort_keys=True))


@lru_cache(maxsize=16)  # a corpus of poems takes seconds to read
def _made(name: str, corpus: str | None, options: str) -> Task:
    more: dict[str, Any] = json.loads(options)
    if corpus is not None:
        more["poems"] = tuple(open_corpus(corpus).documents())
    return find_task(name, **more)


def problem_at(entry: TaskEntry, split: SplitName, seed: int, index: int) -> Problem:
    """Problem ``index`` of the entry's stream."""
    stream = problems(task_of(entry), split, seed, entry.difficulties, 1, start=index)
    return next(stream)


def stage_tasks(stage: Stage) -> list[TaskEntry]:
    """Every entry that a stage draws problems from."""
    sources = getattr(stage, "sources", ())
    learnt = [getattr(source, "task", None) for source in sources]
    return [*getattr(stage, "tasks", ()), *(entry for entry in learnt if entry is not None)]


def check_task(entry: TaskEntry) -> None:
    """TaskError or DataError for a task that cannot be had, or not with these difficulties."""
    task = task_of(entry)
    for difficulty in entry.difficulties:
        task.check_difficulty(difficulty)


def vocabulary_texts(entries: Sequence[TaskEntry], ask: Ask) -> Iterator[str]:
    """Texts with every character that the entries' problems and solutions use: a task's alphabet
    where it names one, and unless ``ask`` is "prompt" (which that covers) many problems of it.
    Solutions that come out of a corpus are left out: its texts are read elsewhere."""
    for entry in entries:
        task = task_of(entry)
        if task.alphabet is not None:
            yield task.alphabet
            if ask == "prompt":
                continue
        for index in range(500):
            problem = problem_at(entry, "train", 0, index)
            yield problem.prompt
            yield problem.question
            if entry.corpus is None:
                yield task.solution(problem, random.Random(index), thought=True)
