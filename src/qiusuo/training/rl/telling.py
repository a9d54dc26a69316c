"""What a step of reinforcement learning says of itself in the log (fields: runs/log.py)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from qiusuo.tasks.task import Problem, Verdict
from qiusuo.training.rl.policy_loss import PolicyMeasures
from qiusuo.training.rl.questions import Questions
from qiusuo.training.rl.rollouts import Group, Rollout


def told_of(asked: Sequence[Group], group_size: int) -> dict[str, Any]:
    """Of all groups asked, those without variance too: they are a fair draw of the problems."""
    rollouts = [one for group in asked for one in group.rollouts]
    right = [one for one in rollouts if one.verdict.reward == 1]
    wrong = [one for one in rollouts if one.verdict.reward != 1]
    told: dict[str, Any] = {
        "pass_at_1": len(right) / len(rollouts),
        "pass_at_k": fmean(group.passed > 0 for group in asked),
        "k": group_size,
        "length": fmean(len(one.answer) for one in rollouts),
        "overlong_share": fmean(not one.finished for one in rollouts),
        "by_task": _by_task(asked),
    }
    lengths = {"length_right": right, "length_wrong": wrong}
    told |= {key: fmean(len(one.answer) for one in of) for key, of in lengths.items() if of}
    return told | _mean_measures(rollouts)


def told_of_update(measures: PolicyMeasures, entropy: float, exact: bool) -> dict[str, float]:
    """``exact``: the sampler's log-probabilities are at the temperature that is learnt at; else
    nothing is known of how far they are from the trainer's."""
    told = {
        "entropy": entropy,
        "clip_share": measures.clip_low + measures.clip_high + measures.clip_dual,
        "kl": measures.kl,
    }
    if exact:
        told |= {
            "mismatch_kl": measures.mismatch_k3,
            "mismatch_max": measures.mismatch_max,
            "importance_weight": measures.weight,
        }
    return told


def _by_task(asked: Sequence[Group]) -> dict[str, float]:
    rates: dict[str, list[float]] = defaultdict(list)
    for group in asked:
        problem = group.question.problem
        rates[f"{problem.task}/{problem.difficulty}"].append(group.passed)
    return {name: fmean(passed) for name, passed in sorted(rates.items())}


def told_together(asked: Sequence[Group], questions: Questions) -> dict[str, float]:
    """What each task tells of all its answers side by side; that may take long."""
    answers: dict[int, list[tuple[Problem, Verdict]]] = defaultdict(list)
    for group in asked:
        question = group.question
        answers[question.entry] += [(question.problem, one.verdict) for one in group.rollouts]
    tasks = {group.question.entry: group.question.task for group in asked}
    return {
        f"{name}{questions.mark(entry)}": value
        for entry, of in sorted(answers.items())
        for name, value in tasks[entry].together(of).items()
    }


def _mean_measures(rollouts: Iterable[Rollout]) -> dict[str, float]:
    """Means of the verifiers' measures, over the answers that have them."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in rollouts:
        for name, value in one.verdict.measures.items():
            found[name].append(value)
    return {name: fmean(values) for name, values in sorted(found.items())}
