"""Tasks by name: ours, reasoning-gym's as `gym/…`, those of packages, and one file of a user's.

    [project.entry-points."qiusuo.tasks"]     # in the pyproject.toml of a package
    clock = "my_package.clock:Clock"

A file, `my_task.py`, holds one class that derives from `Task`. It is the user's own Python and is
run as such, only when its path was given; a name never loads a file.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import random
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from qiusuo.tasks.arithmetic import Arithmetic
from qiusuo.tasks.chains import Chains, PlainChains
from qiusuo.tasks.countdown import Countdown
from qiusuo.tasks.gym import PREFIX, gym_task
from qiusuo.tasks.parity import Parity
from qiusuo.tasks.programs import Programs
from qiusuo.tasks.sums import Sums
from qiusuo.tasks.task import Task, TaskError
from qiusuo.tasks.verse import Verse
from qiusuo.tasks.word_problems import WordProblems

GROUP = "qiusuo.tasks"
OURS: tuple[type[Task], ...] = (
    Parity,
    Chains,
    PlainChains,
    Sums,
    Arithmetic,
    Countdown,
    WordProblems,
    Programs,
    Verse,
)


def known_tasks() -> dict[str, type[Task] | EntryPoint]:
    """Every task's name and its class, or where a package says its class is; ours come first and
    are not replaced. Nothing of a package is imported for this."""
    known: dict[str, type[Task] | EntryPoint] = {task.name: task for task in OURS}
    for point in entry_points(group=GROUP):
        known.setdefault(point.name, point)
    return known


def find_task(name: str, **options: Any) -> Task:
    """The task of this name, or of this file, which ends in `.py`. `options` are those of its
    class: `find_task("verse", poems=poems)`.

    `TaskError` for an unknown name, with the nearest ones, for an option that the task does not
    have, and for a file or a package that does not give one task that works.
    """
    if name.endswith(".py"):
        return _checked(_task_of(_module_of(Path(name)), name), name, options)
    if name.startswith(PREFIX):
        return _made(gym_task(name), name, options)
    known = known_tasks()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "known are "
        raise TaskError(f"unknown task {name!r}: {hint if near else hint + ', '.join(known)}")
    found = known[name]
    if isinstance(found, EntryPoint):
        try:
            return _checked(found.load(), f"{name} ({found.value})", options)
        except (ImportError, AttributeError) as error:
            raise TaskError(
                f"task {name!r} could not be loaded from {found.value}: {error}"
            ) from error
    return _made(found, name, options)


def _made(task_class: type[Task], name: str, options: Mapping[str, Any]) -> Task:
    signature = inspect.signature(task_class)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "none"
        raise TaskError(f"task {name!r}: {error}; its options are: {known}") from error
    return task_class(**options)


def _module_of(path: Path) -> ModuleType:
    if not path.is_file():
        raise TaskError(f"there is no task file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(f"qiusuo_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"the task file {str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TaskError(
            f"the task file {str(path)!r} fails: {type(error).__name__}: {error}"
        ) from error
    return module


def _task_of(module: ModuleType, name: str) -> type[Task]:
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Task)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        names = ", ".join(value.__name__ for value in own) or "none"
        raise TaskError(f"{name!r} must define one class that derives from Task, found {names}")
    return own[0]


def _checked(task_class: object, name: str, options: Mapping[str, Any]) -> Task:
    """The task, after its easiest problem was made, solved and verified."""
    if not (inspect.isclass(task_class) and issubclass(task_class, Task)):
        raise TaskError(f"task {name!r} is no class that derives from qiusuo.tasks.task.Task")
    try:
        task = _made(task_class, name, options)
        chance = random.Random(0)
        problem = task.problem(task.difficulties[0], chance)
        verdicts = [
            task.verify(problem, task.solution(problem, chance, thought=thought))
            for thought in (True, False)
        ]
        garbage = task.verify(problem, "")
    except TaskError:  # says what to do
        raise
    except Exception as error:
        raise TaskError(f"task {name!r} fails: {type(error).__name__}: {error}") from error
    if any(verdict.reward != 1 for verdict in verdicts):
        reason = next(verdict.reason for verdict in verdicts if verdict.reward != 1)
        raise TaskError(f"task {name!r} does not accept its own solution: {reason}")
    if garbage.reward != 0:
        raise TaskError(f"task {name!r} pays for an empty response: verify must give it 0")
    return task
