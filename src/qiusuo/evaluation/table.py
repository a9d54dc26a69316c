"""Results for people: one row a task and difficulty, intervals beside the figures."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from qiusuo.evaluation.bits import Bits
from qiusuo.evaluation.evaluate import Replies, Score
from qiusuo.evaluation.statistics import Estimate

RIGHT = "right"  # the verifiers' reason where nothing is wrong
MOST_FAULTS = 4


def score_table(scores: Sequence[Score]) -> Table:
    """Of several tasks; of the samples' columns none where there are no samples."""
    rates = list(dict.fromkeys(name for one in scores if one.sampled for name in one.sampled.rates))
    measures = sorted({name for one in scores for name in one.greedy.measures} - {"thought"})
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task")
    table.add_column("difficulty", justify="right")
    table.add_column("problems", justify="right")
    for name in ("greedy", *rates):
        table.add_column(f"{name}\n95%", justify="right", overflow="fold")
    for name in ("tokens", "thought", *measures):
        table.add_column(name.replace("_", "\n"), justify="right")
    for one in scores:
        total = one.difficulty is None
        greedy = one.greedy
        table.add_row(
            escape(one.task),
            "all" if total else str(one.difficulty),
            f"{one.problems:,}",
            percent(greedy.rates["accuracy"]),
            *(percent(one.sampled.rates[rate]) if one.sampled else "" for rate in rates),
            "?" if greedy.length is None else f"{greedy.length:.1f}",
            *(_measure(greedy, name) for name in ("thought", *measures)),
            style="bold" if total else None,
        )
    return table


def faults_line(score: Score) -> str:
    """Why greedy answers were wrong, the most common first; nothing where none was."""
    faults = {name: times for name, times in score.greedy.reasons.items() if name != RIGHT}
    told = ", ".join(f"{name} ({times:,})" for name, times in list(faults.items())[:MOST_FAULTS])
    level = "" if score.difficulty is None else f" {score.difficulty}"
    return f"{score.task}{level}, wrong greedy answers: {told}" if told else ""


def bits_line(name: str, bits: Bits) -> str:
    """One text's result."""
    told = bits.per_character
    interval = "" if told.low is None else f" (95%: {told.low:.4f} to {told.high:.4f})"
    line = (
        f"{name}: {told.value:.4f} bits per character{interval}, {bits.characters:,} characters "
        f"in {bits.documents:,} document{'s' * (bits.documents != 1)}"
    )
    if bits.unknown:
        line += f"; {bits.unknown:.1%} of the tokens are unknown characters"
    return line


def percent(estimate: Estimate) -> str:
    """`97.4 (95.6-98.5)`, in percent."""
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.1f}"
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.1f} ({low:.1f}-{high:.1f})"


def _measure(replies: Replies, name: str) -> str:
    return f"{replies.measures[name]:.1%}" if name in replies.measures else ""
