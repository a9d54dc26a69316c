"""Which problems come next: streams of tasks, and a curriculum that follows what the policy can do.

A problem is a function of its place in its stream, so the whole state is a few numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qiusuo.tasks.task import Problem, Task
from qiusuo.training.given_tasks import problem_at, task_of
from qiusuo.training.sections import TaskEntry
from qiusuo.training.seeds import seed_of
from qiusuo.training.stages import CurriculumSection


@dataclass(frozen=True)
class Question:
    """A problem, the task that judges it, and which of the stage's entries it came from."""

    problem: Problem
    task: Task
    entry: int


@dataclass
class _Stream:
    """One entry's place. ``hardest`` and ``rate`` are the curriculum's."""

    entry: TaskEntry
    task: Task
    asked: int = 0
    hardest: int = 0
    rate: float = 0.0


class Questions:
    """Problems of several tasks, drawn by weight."""

    def __init__(
        self, entries: Sequence[TaskEntry], curriculum: CurriculumSection | None, seed: int
    ) -> None:
        self.curriculum, self.seed, self.drawn = curriculum, seed, 0
        self.streams = [_Stream(entry, task_of(entry)) for entry in entries]
        if curriculum is not None:
            for stream in self.streams:
                known = [d for d in stream.entry.difficulties if d <= curriculum.start]
                stream.hardest = max(known, default=min(stream.entry.difficulties))

    def take(self, count: int) -> list[Question]:
        """The next ones; every one moves its entry's place on."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Question:
        chance = random.Random(f"question/{self.seed}/{self.drawn}")
        self.drawn += 1
        weights = [stream.entry.weight for stream in self.streams]
        number = chance.choices(range(len(weights)), weights)[0]
        stream = self.streams[number]
        entry = stream.entry.model_copy(update={"difficulties": self.difficulties(number)})
        # A task that stands here twice is asked for different problems.
        seed = seed_of(f"{self.seed}/{number}") if number else self.seed
        problem = problem_at(entry, "train", seed, stream.asked)
        stream.asked += 1
        return Question(problem, stream.task, number)

    def difficulties(self, number: int) -> tuple[int, ...]:
        """Those that an entry's problems are drawn from now; one that is listed twice comes twice
        as often."""
        stream = self.streams[number]
        if self.curriculum is None:
            return stream.entry.difficulties
        known = sorted({d for d in stream.entry.difficulties if d <= stream.hardest})
        *easier, hardest = known[-self.curriculum.width :]
        return (*easier, *[hardest] * max(1, len(easier)))

    def heard(self, question: Question, pass_rate: float) -> None:
        """Tell how a group did; the curriculum may go on."""
        stream = self.streams[question.entry]
        if self.curriculum is None or question.problem.difficulty != stream.hardest:
            return
        stream.rate += (pass_rate - stream.rate) / self.curriculum.memory
        harder = [d for d in stream.entry.difficulties if d > stream.hardest]
        if stream.rate > self.curriculum.rise and harder:
            stream.hardest, stream.rate = min(harder), 0.0

    def hardest(self) -> dict[str, int]:
        """Where the curriculum stands, by task (and ``mark``); empty without one."""
        if self.curriculum is None:
            return {}
        return {
            f"{stream.entry.task}{self.mark(number)}": stream.hardest
            for number, stream in enumerate(self.streams)
        }

    def mark(self, number: int) -> str:
        """What tells an entry from others of its task behind a name: "_2" for the second entry of
        all, nothing where no other has its task."""
        tasks = [stream.entry.task for stream in self.streams]
        return f"_{number + 1}" if tasks.count(tasks[number]) > 1 else ""

    def state_dict(self) -> dict[str, Any]:
        places = [[stream.asked, stream.hardest, stream.rate] for stream in self.streams]
        return {"drawn": self.drawn, "streams": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
        for stream, (asked, hardest, rate) in zip(self.streams, state["streams"], strict=True):
            stream.asked, stream.hardest, stream.rate = asked, hardest, rate
