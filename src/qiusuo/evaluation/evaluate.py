"""A task's held-out problems put to a model: what share it answers right, and how surely.

Problems come from the test split, so none was trained on whatever the seeds, and none comes twice.
Each is answered once greedily, and ``samples`` times at a temperature: the first is how good the
model is as people use it, the second what it can reach (pass@k), and so what reinforcement may
still bring to the surface.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from qiusuo.evaluation.answers import Answered, Answerer, EvaluationError, Reply
from qiusuo.evaluation.statistics import Estimate, mean_share, pass_at, wilson
from qiusuo.tasks.task import Problem, Task, TaskError, Verdict, problems

MOST_SAMPLES = 1024
MOST_SHOWN = 3  # wrong answers kept with a score


@dataclass(frozen=True)
class Graded:
    """A reply and what the verifier says of it."""

    reply: Reply
    verdict: Verdict


@dataclass(frozen=True)
class Judged:
    """A problem with its greedy answer and its samples."""

    problem: Problem
    greedy: Graded
    samples: tuple[Graded, ...]


@dataclass(frozen=True)
class Replies:
    """What one way of answering gave. ``rates``: "accuracy", or "pass@1" and "pass@k".
    ``length``: mean tokens of an answer, None where unknown; ``cut``: the share that ended at the
    limit. ``measures``: their means, over the ``measured`` answers that have them; ``reasons``: how
    often the verifier gave which; ``together``: what the task tells of answers side by side."""

    count: int
    rates: dict[str, Estimate]
    length: float | None
    cut: float
    measures: dict[str, float]
    measured: dict[str, int]
    reasons: dict[str, int]
    tokens: int
    seconds: float
    together: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return vars(self) | {"rates": {name: rate.record() for name, rate in self.rates.items()}}


@dataclass(frozen=True)
class Score:
    """The result for a task at one difficulty; at all of them together if that is None. ``wrong``:
    a few greedy answers that were, to look at."""

    task: str
    difficulty: int | None
    problems: int
    greedy: Replies
    sampled: Replies | None
    wrong: tuple[dict[str, Any], ...]

    def record(self) -> dict[str, Any]:
        sampled = None if self.sampled is None else self.sampled.record()
        return vars(self) | {"greedy": self.greedy.record(), "sampled": sampled}


def evaluate(
    answerer: Answerer,
    task: Task,
    difficulties: Sequence[int],
    *,
    count: int = 500,
    samples: int = 8,
    temperature: float = 1.0,
    max_tokens: int = 1024,
    seed: int = 0,
    progress: Answered | None = None,
) -> Iterator[Score]:
    """The score of each difficulty when it is done, and in the end over all if there are several.

    ``count`` problems in all, spread evenly; where the test split of a difficulty has fewer, those.
    ``samples`` 0: greedy answers only. TaskError or EvaluationError, at once, for what cannot be
    asked."""
    check_settings(count, samples, temperature, max_tokens, seed)
    chosen = held_out(task, difficulties, count, seed)
    limits = {"max_tokens": max_tokens, "seed": seed}

    def answers(asked: Sequence[Problem], samples: int, temperature: float) -> list[list[Reply]]:
        return answerer.answers(
            asked, samples=samples, temperature=temperature, progress=progress, **limits
        )

    return _scores(
        task,
        chosen,
        partial(answers, samples=1, temperature=0.0),
        partial(answers, samples=samples, temperature=temperature) if samples else None,
        seed,
    )


def _scores(
    task: Task,
    chosen: Mapping[int, Sequence[Problem]],
    greedily: Callable[[Sequence[Problem]], list[list[Reply]]],
    sampled: Callable[[Sequence[Problem]], list[list[Reply]]] | None,
    seed: int,
) -> Iterator[Score]:
    everything: list[Judged] = []
    spent = [0.0, 0.0]
    for difficulty, asked in chosen.items():
        began = time.perf_counter()
        firsts = greedily(asked)
        between = time.perf_counter()
        others = sampled(asked) if sampled else [[] for _ in asked]
        seconds = (between - began, time.perf_counter() - between)
        judged = [
            Judged(one, grade(task, one, first), tuple(grade(task, one, reply) for reply in more))
            for one, [first], more in zip(asked, firsts, others, strict=True)
        ]
        yield _with_together(
            task, score(task.name, difficulty, judged, *seconds, seed=seed), judged
        )
        everything += judged
        spent = [a + b for a, b in zip(spent, seconds, strict=True)]
    if len(chosen) > 1:
        yield score(task.name, None, everything, *spent, seed=seed)


def _with_together(task: Task, told: Score, judged: Sequence[Judged]) -> Score:
    """The score with what the task sees in the answers side by side."""
    firsts = [(one.problem, one.greedy.verdict) for one in judged]
    greedy = replace(told.greedy, together=dict(task.together(firsts)))
    if told.sampled is None:
        return replace(told, greedy=greedy)
    others = [(one.problem, graded.verdict) for one in judged for graded in one.samples]
    sampled = replace(told.sampled, together=dict(task.together(others)))
    return replace(told, greedy=greedy, sampled=sampled)


def check_settings(
    count: int, samples: int, temperature: float, max_tokens: int, seed: int
) -> None:
    """EvaluationError for settings that make no sense."""
    for name, value, least in (("count", count, 1), ("max_tokens", max_tokens, 1)):
        if value < least:
            raise EvaluationError(f"{name} must be at least {least}, not {value}")
    if not 0 <= samples <= MOST_SAMPLES:
        raise EvaluationError(f"samples must be in 0..{MOST_SAMPLES}, not {samples}")
    if samples and not 0 < temperature < float("inf"):
        raise EvaluationError(
            f"samples at temperature {temperature} would all be the same: give a temperature "
            "above 0, or --samples 0 for greedy answers alone"
        )
    if seed < 0:
        raise EvaluationError(f"seed must not be negative, not {seed}")


def held_out(
    task: Task, difficulties: Sequence[int], count: int, seed: int
) -> dict[int, list[Problem]]:
    """The test problems, no key twice, ``count`` in all; TaskError where a difficulty has none."""
    levels = sorted(set(difficulties))
    chosen: dict[int, list[Problem]] = {}
    for place, difficulty in enumerate(levels):
        share = count // len(levels) + (place < count % len(levels))
        found: list[Problem] = []
        try:
            for problem in problems(task, "test", seed, [difficulty], share, unique=True):
                found.append(problem)
        except TaskError:
            if not found:
                raise
        if found:
            chosen[difficulty] = found
    return chosen


def grade(task: Task, problem: Problem, reply: Reply) -> Graded:
    """The verifier's word; a reply that failed is none, and its reason says why."""
    if reply.finish == "error":
        return Graded(reply, Verdict(0.0, None, f"no reply: {reply.error or 'unknown'}"))
    return Graded(reply, task.verify(problem, reply.response))


def score(
    name: str,
    difficulty: int | None,
    judged: Sequence[Judged],
    greedy_seconds: float,
    sampled_seconds: float,
    *,
    seed: int,
) -> Score:
    """What the judged problems amount to."""
    greedy = [one.greedy for one in judged]
    right = sum(one.verdict.reward == 1 for one in greedy)
    accuracy = {"accuracy": wilson(right, len(greedy))}
    sampled = None
    n = len(judged[0].samples)
    if n:
        rights = [sum(one.verdict.reward == 1 for one in row.samples) for row in judged]
        rates = {
            f"pass@{k}": mean_share([pass_at(k, c, n) for c in rights], seed)
            for k in sorted({1, n})
        }
        everything = [one for row in judged for one in row.samples]
        sampled = _replies(everything, rates, sampled_seconds)
    told = _replies(greedy, accuracy, greedy_seconds)
    return Score(name, difficulty, len(judged), told, sampled, _wrong(judged))


def _wrong(judged: Sequence[Judged]) -> tuple[dict[str, Any], ...]:
    faults = [one for one in judged if one.greedy.verdict.reward != 1]
    return tuple(
        {
            "prompt": one.problem.prompt,
            "response": one.greedy.reply.response,
            "answer": one.greedy.verdict.answer,
            "reason": one.greedy.verdict.reason,
        }
        for one in faults[:MOST_SHOWN]
    )


def _replies(graded: Sequence[Graded], rates: dict[str, Estimate], seconds: float) -> Replies:
    lengths = [one.reply.tokens for one in graded if one.reply.tokens is not None]
    values: dict[str, list[float]] = defaultdict(list)
    for one in graded:
        for name, value in one.verdict.measures.items():
            values[name].append(value)
    return Replies(
        count=len(graded),
        rates=rates,
        length=sum(lengths) / len(lengths) if lengths else None,
        cut=sum(one.reply.finish == "length" for one in graded) / len(graded),
        measures={name: sum(told) / len(told) for name, told in sorted(values.items())},
        measured={name: len(told) for name, told in sorted(values.items())},
        reasons=dict(Counter(one.verdict.reason for one in graded).most_common()),
        tokens=sum(lengths),
        seconds=seconds,
    )
