"""The pictures of a run: what the loss, the speed and the experts did (for reinforcement, see
`rollout_plots`).

Every picture answers one question and says in its caption how to read it. Labels are English:
the fonts that ship with matplotlib have no Chinese.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import numpy as np

from qiusuo.runs.rollout_plots import REINFORCEMENT, SHOWN, draw_rollouts
from qiusuo.runs.series import (
    Array,
    Records,
    Stages,
    broken_at,
    by_set,
    expert_loads,
    is_number,
    mean_load,
    of_kind,
    series,
    smooth_apart,
    stage_starts,
    table,
    thin,
    without_policy,
)
from qiusuo.runs.style import (
    BLUE,
    ORANGE,
    TEAL,
    Picture,
    finish,
    heat_map,
    layer_colours,
    layer_scale,
    limit,
    mark_stages,
    new_figure,
    number_axis,
)
from qiusuo.runs.words import format_number

_OWN_PANEL = {"step", "loss", "mtp_loss", "lr", "grad_norm", "tokens", "seconds"}
_OWN_PANEL |= {"tokens_per_second", "flops_per_second", "peak_share", "minutes"}
_PERCENT = {"peak_share"}


def draw_pictures(records: Records) -> list[Picture]:
    """Every picture that `records` (of `read_log`) has the numbers for, in reading order.

    Raises RunError when there is something to draw and matplotlib is not installed.
    """
    steps = of_kind(records, "step")
    validations = of_kind(records, "validation")
    rollouts = of_kind(records, "rollout")
    stages = stage_starts([r for r in records if r.get("kind") in {"step", "rollout"}])
    drawers: list[Callable[[], Picture | None]] = [
        lambda: draw_panels(
            rollouts,
            REINFORCEMENT + "others",
            "Other measures of reinforcement",
            "Faint: every step; strong: smoothed.",
            {key: key.replace("_", " ") for key in _other_keys(rollouts, SHOWN | {"step"})},
            columns=2,
        ),
        lambda: draw_loss(without_policy(steps, rollouts), validations, stages),
        lambda: draw_panels(
            steps,
            "optimizer",
            "Learning rate and gradient norm",
            "The gradient norm is taken before clipping; a spike marks an unusual batch.",
            {"lr": "learning rate", "grad_norm": "gradient norm"},
        ),
        lambda: draw_panels(
            steps,
            "speed",
            "Speed",
            "The share of peak compares the arithmetic done with the fastest matrix product "
            "measured on the same machine.",
            {"tokens_per_second": "tokens / s", "peak_share": "share of peak, %"},
        ),
        lambda: draw_violation(steps),
        lambda: draw_final_load(steps),
        lambda: draw_load_over_time(steps),
        lambda: draw_panels(
            steps,
            "others",
            "Other measures",
            "Faint: every step; strong: smoothed.",
            {key: key.replace("_", " ") for key in _other_keys(steps, _OWN_PANEL)},
            columns=2,
        ),
    ]
    return draw_rollouts(rollouts, validations, stages) + [
        picture for drawer in drawers if (picture := drawer()) is not None
    ]


def draw_loss(steps: Records, validations: Records, stages: Stages) -> Picture | None:
    """Training loss raw and smoothed, the MTP loss, and validation; nats per token."""
    x, loss = series(steps, "loss")
    looks = by_set(validations)
    if not len(x) and not looks:
        return None
    places = [step for step, _ in stages]
    figure = new_figure(9.4, 4.0)
    axes = figure.subplots()
    shown = []
    dashed = {"linestyle": (0, (5, 1.5))}
    for key, label, colour, style in (
        ("mtp_loss", "MTP", TEAL, dashed),
        ("loss", "training", BLUE, {}),
    ):
        at, values = series(steps, key)
        if not len(at):
            continue
        smoothed = smooth_apart(at, values, places)
        faint = {"color": colour, "alpha": 0.2, "linewidth": 0.6}
        axes.plot(*broken_at(*thin(at, values), places), **faint)
        strong = broken_at(*thin(at, smoothed), places)
        axes.plot(*strong, color=colour, label=f"{label}, smoothed", **style)
        shown.append(smoothed)
    for (tokens, records), marker in zip(looks.items(), itertools.cycle("oDs^"), strict=False):
        at, values = series(records, "loss")
        label = "validation" if len(looks) == 1 else f"validation, {tokens or 0:,} tokens"
        dots = {"marker": marker, "markersize": 4.2, "markeredgecolor": "white", "linewidth": 0.8}
        axes.plot(at, values, color=ORANGE, label=label, **dots)
        shown.append(values)
    limit(axes, np.concatenate(shown), share=1.0)
    mark_stages(axes, stages)
    axes.set_xlabel("step")
    number_axis(axes.xaxis)
    axes.set_ylabel("loss, nats per token")
    # Above the axes and to the left: on a narrow screen the picture scrolls, and the key shows.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0.2)
    caption = "Cross-entropy in nats per token. Faint: every step; strong: smoothed."
    if len(looks) > 1:
        caption += (
            " On the way a part of the held-out text is looked at, at a stage's end all of it: "
            "figures of the two cannot be compared."
        )
    broken = int((~np.isfinite(loss)).sum())
    if broken:
        caption += f" The loss was not finite in {broken:,} of {len(loss):,} logged steps."
    return finish(figure, "loss", "Loss", caption)


def draw_panels(
    records: Records,
    name: str,
    title: str,
    caption: str,
    labels: dict[str, str],
    columns: int = 1,
) -> Picture | None:
    """A small panel for each field in `labels` that has values, one below another.

    With two columns the picture is a wide one, and panels stand side by side. Where the records
    are of several stages, the top panels name them and no line joins two.
    """
    known = {key: series(records, key)[1] for key in labels}
    flat = {key: values[0] for key, values in known.items() if len(values) and _flat(values)}
    present = {key: labels[key] for key, values in known.items() if len(values) and key not in flat}
    stages = stage_starts(records)
    if not present:
        return None
    if flat:
        told = ", ".join(f"{labels[key]} {format_number(value)}" for key, value in flat.items())
        caption += f" The same in every step that has it: {told}."
    columns = min(columns, len(present))
    rows = -(-len(present) // columns)
    figure = new_figure(5.2 if columns == 1 else 9.4, 0.6 + 1.35 * rows)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[len(present) :]:
        axes.remove()
    for axes, (key, label) in zip(panels, present.items(), strict=False):
        x, values = series(records, key)
        if key in _PERCENT:
            values = values * 100
        places = [step for step, _ in stages]
        if key != "lr":
            faint = {"color": BLUE, "alpha": 0.22, "linewidth": 0.6}
            axes.plot(*broken_at(*thin(x, values), places), **faint)
        shown = values if key == "lr" else smooth_apart(x, values, places)
        axes.plot(*broken_at(*thin(x, shown), places), color=BLUE)
        limit(axes, values, from_zero=key in _OWN_PANEL | _PERCENT)
        mark_stages(axes, stages, named=axes in panels[:columns])
        number_axis(axes.yaxis)
        axes.set_ylabel(label)
    for axes in panels[max(len(present) - columns, 0) : len(present)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
        number_axis(axes.xaxis)
    figure.align_ylabels()
    return finish(figure, name, title, caption)


def draw_violation(steps: Records) -> Picture | None:
    """MaxVio of each MoE layer over the steps, smoothed."""
    stages = stage_starts(steps)
    x, rows = table(steps, "max_violation")
    if not rows.size:
        return None
    figure = new_figure(5.2, 3.3)
    axes = figure.subplots()
    layers = rows.shape[1]
    colours = layer_colours(layers)
    places = [step for step, _ in stages]
    smoothed = np.stack([smooth_apart(x, row, places) for row in rows.T])
    for layer, row in enumerate(smoothed):
        line = broken_at(*thin(x, row), places)
        axes.plot(*line, color=colours[layer], linewidth=1.2, label=f"MoE layer {layer + 1}")
    limit(axes, smoothed.ravel(), from_zero=True)
    axes.set_xlabel("step")
    number_axis(axes.xaxis)
    axes.set_ylabel("MaxVio")
    mark_stages(axes, stages)
    if layers <= 6:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axes.legend(ncols=3, frameon=False, **place)
    else:
        layer_scale(figure, axes, layers)
    caption = (
        "How far the busiest expert of each layer is above its even share: 0 is perfect balance, "
        "1 means twice the share. Smoothed."
    )
    return finish(figure, "balance", "Expert balance", caption)


def draw_final_load(steps: Records) -> Picture | None:
    """Load of every expert in every MoE layer, averaged over the last tenth of the records."""
    _, loads = expert_loads(steps)
    if not loads.size:
        return None
    last = max(1, len(loads) // 10)
    final = mean_load(loads[-last:])
    layers, experts = final.shape
    figure = new_figure(5.2, min(1.5 + 0.22 * layers, 4.6))
    extent = (0.5, experts + 0.5, layers + 0.5, 0.5)
    heat_map(figure, final, extent, ("expert", "MoE layer"))
    caption = (
        f"Mean of the last {last:,} records. 1 is an even share; the palest is an expert that "
        "sees no token. Layers are counted among the MoE layers."
    )
    return finish(figure, "load", "Load of every expert at the end", caption, pixels=True)


def draw_load_over_time(steps: Records) -> Picture | None:
    """Load of the experts of one MoE layer, the least balanced one at the end, over the steps."""
    x, loads = expert_loads(steps)
    if len(x) < 3:
        return None
    recent = mean_load(loads[-max(1, len(loads) // 10) :])
    layer = int(np.argmax(np.nan_to_num(recent).max(axis=1)))
    figure = new_figure(9.4, 3.4)
    extent = (float(x[0]), float(x[-1]), loads.shape[2] + 0.5, 0.5)
    heat_map(figure, loads[:, layer].T, extent, ("step", "expert"))
    caption = (
        f"MoE layer {layer + 1}, the one that is least balanced at the end. Bands are experts that "
        "stay busy or idle; an even tint means the router's bias keeps the balance."
    )
    return finish(figure, "load-over-time", "Load of one layer over time", caption, pixels=True)


def _flat(values: Array) -> bool:
    """Whether a curve would show nothing: one value, or the same again and again (to a part in a
    thousand)."""
    return len(values) < 2 or bool(np.ptp(values) <= 1e-3 * abs(values[0]))


def _other_keys(records: Records, shown: Collection[str]) -> list[str]:
    """Numeric fields beside those `shown` in pictures of their own; at most eight."""
    keys = {key: None for record in records for key, value in record.items() if is_number(value)}
    return [key for key in keys if key not in shown][:8]
