"""The tables of benchmarks/ablations.py: means over seeds, spreads, and what can be told apart.

Every variant of a seed reads the same text in the same order (but for MTP, whose windows are one
token longer), so differences are taken seed by seed. Their interval is Student's t of 95%; with two
or three seeds it is wide, and where it holds zero the table says that nothing was told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ablation_readings import Reading
from ablation_variants import variants

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # by seeds - 1
MARKS = (3, 5, 6)  # looks, of eight, at which the dense model's loss is the mark to reach
GROUPS = {
    "cost": ("moe", "bias-fast", "dense-active", "dense-total"),
    "attention": ("dense-active", "mla-rope", "mha", "gqa", "mqa"),
    "mtp": ("moe", "mtp", "mtp-flops"),
    "balance": ("moe", "bias-fast", "aux-0.001", "aux-0.01", "unbalanced"),
}
Drafts = dict[tuple[str, int], float]
Column = tuple[str, Callable[[list[Reading]], str]]


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def markdown(table: Table) -> str:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"## {table.title}", table.note, "", *lines, ""])


def label(name: str) -> str:
    return variants()[name].words


def tables(readings: Sequence[Reading], drafts: Drafts) -> list[Table]:
    """Every table that the runs so far have the numbers for."""
    by_name: dict[str, list[Reading]] = {}
    for reading in readings:
        by_name.setdefault(reading.variant, []).append(reading)
    cache: Column = ("cache, bytes a token", lambda runs: f"{runs[0].cache_bytes:,}")
    agreement: Column = ("MTP agrees", lambda runs: _share([r.mtp_agreement for r in runs]))
    accepted: Column = (
        "drafts accepted",
        lambda runs: _share([drafts.get((r.variant, r.seed)) for r in runs]),
    )
    violation: Column = ("MaxVio of a step", lambda runs: _spread([r.violation for r in runs], 2))
    pooled: Column = ("MaxVio pooled", lambda runs: _spread([r.pooled_violation for r in runs], 2))
    found = [
        _summary(by_name, "cost", "1. MoE against dense", "dense-active", []),
        _marks(by_name),
        _summary(by_name, "attention", "2. MLA against MHA, GQA, MQA", "dense-active", [cache]),
        _summary(by_name, "mtp", "3. Multi-token prediction", "moe", [agreement, accepted]),
        _before_decay(by_name),
        _summary(by_name, "balance", "4. Balancing the experts", "moe", [violation, pooled]),
    ]
    return [table for table in found if table is not None]


Runs = dict[str, list[Reading]]


def _summary(
    by_name: Runs, group: str, title: str, base: str, extra: Sequence[Column]
) -> Table | None:
    """Final losses, and what the runs cost."""
    names = [name for name in GROUPS[group] if name in by_name]
    if not names:
        return None
    header = ["", "seeds", "parameters", "active", "MFLOPs a token", "tokens/s", "CPU seconds"]
    against = f"against {label(base)}"
    table = Table(
        title,
        "Validation loss of the main model at the end, nats a token: mean ± standard deviation "
        f"over seeds; the difference seed by seed {against}, with its 95% interval.",
        [*header, *(name for name, _ in extra), "final loss", "difference", "verdict"],
    )
    for name in names:
        runs = by_name[name]
        rates, spent = [r.tokens_per_second for r in runs], [r.cpu_seconds for r in runs]
        difference, verdict = _difference(runs, by_name.get(base, []))
        table.rows.append(
            [
                label(name),
                str(len(runs)),
                f"{runs[0].parameters:,}",
                f"{runs[0].active:,}",
                f"{runs[0].flops_per_token / 1e6:.2f}",
                f"{statistics.median(rates):,.0f}",
                _spread(spent, 0),
                *(form(runs) for _, form in extra),
                _spread([r.final_loss for r in runs], 4),
                *(("", "") if name == base else (difference, verdict)),
            ]
        )
    return table


def _difference(runs: list[Reading], base: list[Reading]) -> tuple[str, str]:
    """Mean paired difference with its interval, and what it tells."""
    of_seed = {reading.seed: reading.final_loss for reading in base}
    pairs = [r.final_loss - of_seed[r.seed] for r in runs if r.seed in of_seed]
    if not pairs:
        return "–", "–"
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return f"{mean:+.4f}", "one seed"
    reach = T_95.get(len(pairs) - 1, 2.306) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    verdict = "not told apart" if abs(mean) <= reach else "better" if mean < 0 else "worse"
    return f"{mean:+.4f} ± {reach:.4f}", verdict


def marks(runs: Runs) -> list[float]:
    """The losses to be reached: the dense model's own, means over seeds, on its way. All lie
    before the schedule's decay."""
    dense = runs.get("dense-active", [])
    return [statistics.fmean(run.loss[look - 1] for run in dense) for look in MARKS if dense]


def _marks(by_name: Runs) -> Table | None:
    """What reaching a loss cost, absolute and as a share of the dense model's."""
    wanted = marks(by_name)
    names = [name for name in GROUPS["cost"] if name in by_name]
    if not wanted or len(names) < 2:
        return None
    table = Table(
        "Cost to reach equal loss",
        f"The marks are what the model of {label('dense-active')} has after "
        f"{', '.join(str(look) for look in MARKS)} eighths of its steps, before the learning rate "
        "falls. FLOPs in 10¹² and seconds of processor time (of the whole process, spread evenly "
        "over its tokens), with the ratio to that model's, mean ± standard deviation over seeds.",
        ["", *(f"to {mark:.3f}: {unit}" for mark in wanted for unit in ("FLOPs", "CPU seconds"))],
    )
    dense = {run.seed: run for run in by_name["dense-active"]}
    for name in names:
        row = [label(name)]
        for mark in wanted:
            for spent, scale in (("flops", 1e12), ("cpu", 1.0)):
                pairs = [(run, dense[run.seed]) for run in by_name[name] if run.seed in dense]
                costs = [run.at_loss(mark, spent) for run, _ in pairs]
                ratios = [
                    run.at_loss(mark, spent) / base.at_loss(mark, spent) for run, base in pairs
                ]
                row.append(_cost_cell([cost / scale for cost in costs], ratios))
        table.rows.append(row)
    return table


def _cost_cell(costs: list[float], ratios: list[float]) -> str:
    reached = [cost for cost in costs if math.isfinite(cost)]
    if not reached:
        return "not reached"
    some = "" if len(reached) == len(costs) else f" ({len(reached)} of {len(costs)} seeds)"
    return f"{_spread(reached, 2)} (× {_spread(ratios, 2)}){some}"


def _before_decay(by_name: Runs) -> Table | None:
    """Main losses with and without MTP after equal tokens, FLOPs and processor time."""
    plain = {run.seed: run for run in by_name.get("moe", [])}
    pairs = [(run, plain[run.seed]) for run in by_name.get("mtp", []) if run.seed in plain]
    if not pairs:
        return None
    look = MARKS[-1] - 1
    rows = []
    for title, spent in (("tokens", "tokens"), ("FLOPs", "flops"), ("CPU seconds", "cpu")):
        without = [base.loss[look] for _, base in pairs]
        with_mtp = [run.loss_at(spent, getattr(base, spent)[look]) for run, base in pairs]
        both = [b - a for a, b in zip(without, with_mtp, strict=True)]
        rows.append(
            [f"equal {title}", _spread(without, 4), _spread(with_mtp, 4), _spread(both, 4, "+")]
        )
    note = (
        f"Main loss after {MARKS[-1]} eighths of the steps of the model without MTP, before the "
        "learning rate falls, and of the model with MTP when it had spent as much."
    )
    header = ["", "without MTP", "with MTP", "difference"]
    return Table("MTP before the decay", note, header, rows)


def _spread(values: Sequence[float | None], places: int, sign: str = "") -> str:
    """Mean ± standard deviation of what is known."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):{sign},.{places}f}"
    return mean if len(known) < 2 else f"{mean} ± {statistics.stdev(known):,.{places}f}"


def _share(values: Sequence[float | None]) -> str:
    percent = _spread([None if value is None else 100 * value for value in values], 1)
    return percent if percent == "–" else f"{percent} %"
