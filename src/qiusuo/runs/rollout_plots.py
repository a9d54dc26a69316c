"""The pictures of reinforcement: whether the answers got better, and whether the run is healthy.

A reward alone can be had by cheating or by luck, so what stands beside it is what goes wrong first:
lengths of right and wrong answers apart (long is not good), entropy (a policy that no longer
explores cannot improve), groups that teach nothing, and how far engine and trainer disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qiusuo.runs.outcomes import in_order
from qiusuo.runs.series import (
    Array,
    Records,
    Stages,
    broken_at,
    is_number,
    series,
    smooth_apart,
    spread,
    thin,
)
from qiusuo.runs.style import (
    BLUE,
    GREY,
    ORANGE,
    TEAL,
    Picture,
    finish,
    layer_colours,
    limit,
    mark_stages,
    new_figure,
    number_axis,
)

REINFORCEMENT = "rl-"  # every picture's name begins with it
_MOST_TASKS = 12  # lines that can be told apart
_NAMED = {"accuracy", "tasks"}  # pictures whose one line may be any task's
Lines = dict[str, tuple[Array, Array, str]]  # label: steps, values, colour


@dataclass(frozen=True)
class _Kind:
    """One picture: `fields` are (field, label, colour), `factor` 100 for shares."""

    name: str
    title: str
    caption: str
    unit: str
    fields: tuple[tuple[str, str, str], ...]
    factor: float = 1
    wide: bool = False
    log: bool = False


_REWARD = _Kind(
    "reward",
    "Reward and problems solved",
    "Mean reward of each step's answers; pass@1: the share that is right; pass@k: the share of "
    "problems with a right one among k. Faint: every step; strong: smoothed.",
    "reward, share",
    (("reward", "reward", BLUE), ("pass_at_1", "pass@1", TEAL), ("pass_at_k", "pass@k", ORANGE)),
    wide=True,
)
_HEALTH = (
    _Kind(
        "length",
        "Length of responses",
        "Right and wrong answers apart: a growth of the wrong ones alone is a loss that favours "
        "length, not thought.",
        "tokens",
        (
            ("length", "all", GREY),
            ("length_right", "right", TEAL),
            ("length_wrong", "wrong", ORANGE),
        ),
    ),
    _Kind(
        "entropy",
        "Entropy",
        "How undecided the policy is at a token. Near zero it tries nothing new any more.",
        "nats per token",
        (("entropy", "entropy", BLUE),),
    ),
    _Kind(
        "groups",
        "Groups that teach nothing, and clipping",
        "Groups whose answers were all paid alike have no advantage; clipped tokens have no "
        "gradient.",
        "%",
        (
            ("zero_variance_share", "groups without variance", BLUE),
            ("clip_share", "clipped tokens", ORANGE),
        ),
        factor=100,
    ),
    _Kind(
        "distance",
        "Distances",
        "KL to the reference: how far the policy has moved. Mismatch: how far the engine that "
        "writes and the trainer that learns disagree. On a log scale.",
        "nats per token",
        (
            ("kl", "to the reference", BLUE),
            ("mismatch_kl", "mismatch, mean", TEAL),
            ("mismatch_max", "mismatch, largest", ORANGE),
        ),
        log=True,
    ),
    _Kind(
        "traces",
        "Thoughts",
        "The share of responses with a thought, and of those the share whose every step is right.",
        "%",
        (("thought", "with a thought", BLUE), ("trace_valid", "valid", TEAL)),
        factor=100,
    ),
)
SHOWN = {field for kind in (_REWARD, *_HEALTH) for field, _, _ in kind.fields} | {"k"}


def draw_rollouts(rollouts: Records, validations: Records, stages: Stages) -> list[Picture]:
    """Every picture that the records of steps of reinforcement, and looks at held-out problems,
    have the numbers for. `stages` are those of the whole run."""
    pictures = [
        _draw_kind(_REWARD, rollouts, stages),
        draw_accuracy(validations, stages),
        *(_draw_kind(kind, rollouts, stages) for kind in _HEALTH),
        draw_tasks(rollouts, stages),
    ]
    return [picture for picture in pictures if picture is not None]


def draw_accuracy(validations: Records, stages: Stages) -> Picture | None:
    """Greedy accuracy on held-out problems, a line a task, with 95% intervals."""
    looks = [record for record in validations if record.get("tasks")]
    mentioned = dict.fromkeys(name for look in looks for name in look["tasks"])
    names = spread(in_order(list(mentioned)), _MOST_TASKS)
    if not names:
        return None
    figure = new_figure(9.4, 3.6)
    axes = figure.subplots()
    for name, colour in zip(names, layer_colours(len(names)), strict=True):
        found = [
            (look["step"], 100 * task["accuracy"], *_reach(task))
            for look in looks
            if is_number((task := look["tasks"].get(name, {})).get("accuracy"))
        ]
        if not found:
            continue
        x, y, below, above = np.array(found, dtype=np.float64).T
        style = {"marker": "o", "markersize": 3.6, "linewidth": 1.0, "capsize": 2}
        axes.errorbar(x, y, yerr=[below, above], color=colour, label=name, **style)
    if not axes.get_legend_handles_labels()[0]:
        return None
    axes.set_ylim(-3, 103)
    caption = "Greedy answers to problems that were never trained on; bars are 95% intervals."
    return _finish(figure, axes, "accuracy", "Held-out accuracy", caption, "%", stages)


def draw_tasks(rollouts: Records, stages: Stages) -> Picture | None:
    """The pass rate of each task and difficulty over the steps, smoothed."""
    by_task = [
        {"step": record["step"]} | dict(record["by_task"])
        for record in rollouts
        if isinstance(record.get("by_task"), Mapping)
    ]
    mentioned = dict.fromkeys(key for rates in by_task for key in rates if key != "step")
    names = spread(in_order(list(mentioned)), _MOST_TASKS)
    if not names:
        return None
    colours = layer_colours(len(names))
    lines = _lines(by_task, {n: (n, c) for n, c in zip(names, colours, strict=True)}, 100)
    caption = "The share of sampled answers that are right, by task and difficulty. Smoothed."
    figure = new_figure(9.4, 3.6)
    axes = figure.subplots()
    _plot(axes, lines, stages, faint=len(names) < 4)
    return _finish(figure, axes, "tasks", "Pass rate by task", caption, "%", stages)


def _lines(records: Records, fields: Mapping[str, tuple[str, Any]], factor: float = 1) -> Lines:
    """The curves that there are, by their labels."""
    lines: Lines = {}
    for key, (label, colour) in fields.items():
        x, values = series(records, key)
        if len(x):
            lines[label] = (x, values * factor, colour)
    return lines


def _draw_kind(kind: _Kind, rollouts: Records, stages: Stages) -> Picture | None:
    fields = {field: (label, colour) for field, label, colour in kind.fields}
    lines = _lines(rollouts, fields, kind.factor)
    if not lines:
        return None
    figure = new_figure(*((9.4, 3.8) if kind.wide else (5.2, 3.3)))
    axes = figure.subplots()
    if kind.log and any((values > 0).any() for _, values, _ in lines.values()):
        axes.set_yscale("log", nonpositive="mask")
    _plot(axes, lines, stages, faint=True)
    return _finish(figure, axes, kind.name, kind.title, kind.caption, kind.unit, stages)


def _plot(axes: Any, lines: Lines, stages: Stages, *, faint: bool) -> None:
    places = [step for step, _ in stages]
    shown = []
    for label, (x, values, colour) in lines.items():
        smoothed = smooth_apart(x, values, places)
        if faint:
            axes.plot(*broken_at(*thin(x, values), places), color=colour, alpha=0.2, linewidth=0.6)
        # Often the reward is pass@1: both are to be seen.
        dash = {"linestyle": (0, (4, 2))} if label == "pass@1" else {}
        axes.plot(*broken_at(*thin(x, smoothed), places), color=colour, label=label, **dash)
        shown.append(values if faint else smoothed)
    if axes.get_yscale() == "linear":
        limit(axes, np.concatenate(shown), from_zero=True, share=1.0)


def _finish(
    figure: Any, axes: Any, name: str, title: str, caption: str, unit: str, stages: Stages
) -> Picture:
    mark_stages(axes, stages)
    axes.set_xlabel("step")
    number_axis(axes.xaxis)
    axes.set_ylabel(unit)
    columns = 6 if figure.get_figwidth() > 6 else 3
    if len(axes.get_legend_handles_labels()[0]) > 1 or name in _NAMED:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axes.legend(ncols=columns, frameon=False, **place)
    return finish(figure, REINFORCEMENT + name, title, caption)


def _reach(task: Mapping[str, Any]) -> tuple[float, float]:
    """How far the interval reaches below and above the accuracy, in percent."""
    accuracy = task["accuracy"]
    low, high = task.get("accuracy_low", accuracy), task.get("accuracy_high", accuracy)
    return max(100 * (accuracy - low), 0.0), max(100 * (high - accuracy), 0.0)
