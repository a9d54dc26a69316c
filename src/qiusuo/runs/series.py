"""From log records to arrays: what the pictures draw and the report counts.

Everything here is numpy and knows nothing of drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Records = Sequence[dict[str, Any]]
Stages = Sequence[tuple[int, str]]  # (first step, name)


def of_kind(records: Records, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, in order."""
    return [record for record in records if record.get("kind") == kind]


def without_policy(steps: Records, rollouts: Records) -> list[dict[str, Any]]:
    """The steps that are none of reinforcement, whose loss is in no unit."""
    stages = policy_stages(rollouts)
    return [record for record in steps if record.get("stage") not in stages]


def policy_stages(rollouts: Records) -> set[Any]:
    """The stages of reinforcement."""
    return {record.get("stage") for record in rollouts}


def stage_starts(records: Records) -> list[tuple[int, str]]:
    """Where the stages of a run begin: (step, name); [] when there is only one."""
    starts: list[tuple[int, str]] = []
    for record in records:
        if "stage" in record and "step" in record:
            stage = str(record["stage"])
            if not starts or starts[-1][1] != stage:
                starts.append((record["step"], stage))
    return starts if len(starts) > 1 else []


def broken_at(steps: Array, values: Array, places: Sequence[float]) -> tuple[Array, Array]:
    """The curve with a gap (NaN) before each of `places`: no line joins two stages."""
    cuts = _cuts(steps, places)
    gaps = np.full(len(cuts), np.nan)
    return np.insert(steps, cuts, steps[cuts] if cuts else gaps), np.insert(values, cuts, gaps)


def _cuts(steps: Array, places: Sequence[float]) -> list[int]:
    """The points before which the curve is cut: those that another stage's beginning divides from
    the point before."""
    found = {int(i) for i in np.searchsorted(steps, np.array(places))}
    return sorted(i for i in found if 0 < i < len(steps))


def smooth_apart(steps: Array, values: Array, places: Sequence[float]) -> Array:
    """`smooth`, each stage by itself: the mean of one must not foretell the next."""
    parts = np.split(values, _cuts(steps, places))
    return np.concatenate([smooth(part) for part in parts]) if len(values) else values


def by_set(validations: Records) -> dict[int | None, list[dict[str, Any]]]:
    """The looks at text, by how many tokens they were over: on the way it is a part of the held-out
    text and at a stage's end all of it, and a figure of one cannot be held against the other's."""
    sets: dict[int | None, list[dict[str, Any]]] = {}
    for record in validations:
        if is_number(record.get("loss")):
            sets.setdefault(record.get("tokens"), []).append(record)
    return sets


def series(records: Records, key: str) -> tuple[Array, Array]:
    """Steps and values of the numeric field `key`, two arrays of one length; NaN is kept."""
    pairs = [(r["step"], r[key]) for r in records if "step" in r and is_number(r.get(key))]
    both = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def is_number(value: Any) -> bool:
    """Whether `value` is a number (a truth value is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def smooth(values: Array, width: float | None = None) -> Array:
    """A centred Gaussian mean, `width` points wide (default: half a percent, at least 2).

    Centred, so that a falling curve does not lag behind its points as a running mean would.
    Values that are not finite are passed over.
    """
    if not len(values):
        return values
    width = width or max(2.0, len(values) / 200)
    reach = min(int(3 * width), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    good = np.isfinite(values)
    inside = slice(reach, reach + len(values))
    total = np.convolve(np.where(good, values, 0.0), kernel)[inside]
    weight = np.convolve(good.astype(np.float64), kernel)[inside]
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Array = total / weight
    return means


def thin(steps: Array, values: Array, most: int = 1200) -> tuple[Array, Array]:
    """At most about `most` points, keeping each stretch's lowest and highest: spikes survive."""
    if len(steps) <= most:
        return steps, values
    kept: list[int] = []
    for part in np.array_split(np.arange(len(steps)), most // 2):
        here = values[part]
        if np.isfinite(here).any():
            kept += sorted({int(part[np.nanargmin(here)]), int(part[np.nanargmax(here)])})
    return steps[kept], values[kept]


def table(records: Records, key: str) -> tuple[Array, Array]:
    """Steps [N] and the rows [N, width] of a field that is a list of numbers.

    Rows shorter than the longest are filled with NaN.
    """
    found = [(r["step"], r[key]) for r in records if "step" in r and r.get(key)]
    width = max((len(row) for _, row in found), default=0)
    rows = np.full((len(found), width), np.nan)
    for i, (_, row) in enumerate(found):
        rows[i, : len(row)] = row
    return np.array([step for step, _ in found], dtype=np.float64), rows


def expert_loads(records: Records) -> tuple[Array, Array]:
    """Steps [N] and loads [N, layers, experts], 1.0 being an even share.

    Absent entries (layers with fewer experts) are NaN.
    """
    found = [(r["step"], r["expert_load"]) for r in records if "step" in r and r.get("expert_load")]
    layers = max((len(load) for _, load in found), default=0)
    experts = max((len(row) for _, load in found for row in load), default=0)
    loads = np.full((len(found), layers, experts), np.nan)
    for i, (_, load) in enumerate(found):
        for j, row in enumerate(load):
            loads[i, j, : len(row)] = row
    return np.array([step for step, _ in found], dtype=np.float64), loads


def mean_load(loads: Array) -> Array:
    """The mean [layers, experts] of `loads` [N, layers, experts]; NaN where nothing is known."""
    known = np.isfinite(loads)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, loads, 0.0).sum(axis=0) / known.sum(axis=0)
    return mean


def typical(records: Records, key: str) -> float | None:
    """The median of a numeric field over the later nine tenths (the start warms up), or None."""
    values = series(records, key)[1]
    values = values[len(values) // 10 :]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of `items`, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]
