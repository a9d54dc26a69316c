"""The page of benchmarks/ablations.py: its curves and tables in one file, in the house's style."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ablation_readings import Reading
from ablation_tables import GROUPS, Table, label
from qiusuo.runs.durable import write_text
from qiusuo.runs.environment import describe_environment
from qiusuo.runs.series import smooth
from qiusuo.runs.style import (
    BLUE,
    GREY,
    ORANGE,
    TEAL,
    Picture,
    finish,
    limit,
    new_figure,
    number_axis,
)
from qiusuo.version import __version__

COLOURS = (BLUE, ORANGE, TEAL, GREY, "#8e5ea2")
TITLES = {
    "cost": "MoE against dense",
    "attention": "MLA against MHA, GQA, MQA",
    "mtp": "Multi-token prediction",
    "balance": "Balancing the experts",
}
SPENT = {
    "tokens": ("tokens", 1.0),
    "flops": ("FLOPs, 10¹²", 1e12),
    "cpu": ("seconds of processor time", 1.0),
}
CAPTION = "Validation loss of the main model. Faint: each seed; strong: their mean."
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="qiusuo"><title>Ablations</title><style>{{ css }}</style></head>
<body><main><header><p class="kicker">Ablation report</p><h1>What each part is worth here</h1>
<p class="lead">{{ lead }}</p>
{%- if missing %}
<div class="note"><p>{{ missing }} runs are not finished: the tables tell of the others.</p></div>
{%- endif %}
</header>
{%- for title, pictures in groups %}
<section><h2>{{ title }}</h2><div class="pictures">
{%- for picture in pictures %}
<figure class="wide"><h3>{{ picture.title }}</h3>
<div class="plate"><img alt="{{ picture.title }}. {{ picture.caption }}" src="{{ picture.uri }}">
</div><figcaption><p>{{ picture.caption }}</p></figcaption></figure>
{%- endfor %}
</div></section>
{%- endfor %}
{%- for table in tables %}
<section><h2>{{ table.title }}</h2><p class="soft">{{ table.note }}</p>
<div class="scroll"><table><thead><tr>
{%- for cell in table.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{%- for row in table.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div></section>
{%- endfor %}
<footer>Made by benchmarks/ablations.py on {{ machine }}. It needs no network.</footer>
</main></body></html>
"""


def write_page(
    folder: Path, readings: Sequence[Reading], tables: Sequence[Table], missing: int
) -> Path:
    """Write report.html into the folder; returns its path."""
    by_name = {
        name: list(runs)
        for name, runs in groupby(
            sorted(readings, key=lambda r: (r.variant, r.seed)), lambda r: r.variant
        )
    }
    seeds = ", ".join(str(seed) for seed in sorted({reading.seed for reading in readings}))
    groups = [
        (TITLES[group], pictures)
        for group, names in GROUPS.items()
        if (pictures := _pictures(group, [name for name in names if name in by_name], by_name))
    ]
    environment = describe_environment(__version__, None)
    context: dict[str, Any] = {
        "css": Markup((files("qiusuo.runs") / "report.css").read_text(encoding="utf-8")),
        "lead": (
            f"{len(readings)} runs with seeds {seeds} on the characters of tinyshakespeare, up to "
            f"{max(reading.tokens[-1] for reading in readings):,} tokens each. Seconds hold for "
            "this machine, FLOPs anywhere; what holds at this size need not hold at another."
        ),
        "missing": missing,
        "groups": groups,
        "tables": tables,
        "machine": f"{environment.get('cpu')}, PyTorch {environment.get('torch')}",
    }
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return write_text(folder / "report.html", engine.from_string(PAGE).render(context))


def _pictures(group: str, names: list[str], by_name: dict[str, list[Reading]]) -> list[Picture]:
    if not names:
        return []
    drawn = [_draw_losses(group, names, by_name)]
    if group == "balance":
        drawn.append(_draw_violations(names, by_name))
    return drawn


def _draw_losses(group: str, names: list[str], by_name: dict[str, list[Reading]]) -> Picture:
    """Loss against tokens, FLOPs and seconds, side by side. The first looks are left out of the
    scale: everything falls alike there."""
    figure = new_figure(9.4, 3.6)
    panels = figure.subplots(1, len(SPENT), sharey=True)
    shown = np.concatenate([run.loss[2:] for name in names for run in by_name[name]])
    for axes, (key, (words, unit)) in zip(panels, SPENT.items(), strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            runs = by_name[name]
            spent = np.array([getattr(run, key) for run in runs]) / unit
            loss = np.array([run.loss for run in runs])
            for one, its_loss in zip(spent, loss, strict=True):
                axes.plot(one, its_loss, color=colour, alpha=0.25, linewidth=0.7)
            mean = {"marker": "o", "markersize": 2.5, "label": label(name)}
            axes.plot(spent.mean(0), loss.mean(0), color=colour, **mean)
        axes.set_xlabel(words)
        number_axis(axes.xaxis)
    limit(panels[0], shown, share=1.0)
    panels[0].set_ylabel("validation loss, nats a token")
    _legend(figure, panels[0])
    return finish(figure, f"{group}-loss", "Loss against what was spent", CAPTION)


def _draw_violations(names: list[str], by_name: dict[str, list[Reading]]) -> Picture:
    figure = new_figure(9.4, 3.4)
    axes = figure.subplots()
    for name, colour in zip(names, COLOURS, strict=False):
        curves = [np.array(run.violations).T for run in by_name[name]]
        steps, mean = curves[0][0], smooth(np.mean([values for _, values in curves], 0))
        axes.plot(steps, mean, color=colour, label=label(name))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("MaxVio, mean of layers")
    _legend(figure, axes)
    caption = (
        "How far the busiest expert of a layer is above its even share in one step's batch; means "
        "over layers and seeds, smoothed. 0 is perfect balance."
    )
    return finish(figure, "balance-violation", "Balance", caption)


def _legend(figure: Any, axes: Any) -> None:
    lines, words = axes.get_legend_handles_labels()
    key = figure.legend(lines, words, loc="outside upper left", ncols=2, frameon=False)
    for text in key.get_texts():
        text.set(fontsize=8)
