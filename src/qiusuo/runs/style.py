"""How the pictures look: one restrained style for all, and the rendering.

Colours differ in lightness as well as hue, so they survive a grey print and most colour
blindness; a heat map goes from light to dark. Figures are matplotlib objects without pyplot, so
nothing global is touched and a server may draw from several threads.

matplotlib is the optional extra "report" and is imported only when something is drawn.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qiusuo.runs.durable import RunError
from qiusuo.runs.series import Array

BLUE, ORANGE, TEAL, GREY = "#1f4e79", "#d9730d", "#3b9c8f", "#6b7280"
INK, FAINT = "#24292f", "#d9dde3"
_LABEL_SIZE = 7.5  # points
_POINTS = 0.72  # of a point in a pixel of matplotlib's, which has 100 to the inch
_LARGEST_SVG = 200_000  # bytes; beyond, a picture of pixels is smaller and quicker to show


@dataclass(frozen=True)
class Picture:
    """One picture, ready to embed: `data` holds the SVG or PNG file."""

    name: str
    title: str
    caption: str
    media_type: str
    data: bytes
    wide: bool  # takes the whole width of a page rather than half

    @property
    def uri(self) -> str:
        """The whole picture as a data URI."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of `width` by `height` inches; RunError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError(
            'the pictures of a report need matplotlib: pip install "qiusuo[report]"'
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def finish(figure: Any, name: str, title: str, caption: str, *, pixels: bool = False) -> Picture:
    """Style every axes alike and render: SVG, or PNG at twice the screen's density."""
    import matplotlib as mpl

    wide = figure.get_figwidth() > 6
    for axes in figure.axes:
        axes.tick_params(colors=INK, labelsize=8, width=0.6, length=3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(color=INK, fontsize=8.5)
            axis.get_offset_text().set(color=INK, fontsize=7.5)
        for side, spine in axes.spines.items():
            spine.set(color=GREY, linewidth=0.6)
            if side in {"top", "right"} and not axes.images and axes.get_label() != "<colorbar>":
                spine.set_visible(False)
        if not axes.images and axes.get_label() != "<colorbar>":
            axes.grid(axis="y", color=FAINT, linewidth=0.5)
            axes.set_axisbelow(True)
        legend = axes.get_legend()
        for text in legend.get_texts() if legend else ():
            text.set(color=INK, fontsize=8)
    # Text as outlines looks the same everywhere; a fixed salt and no date, so that one log
    # gives one file.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "qiusuo"}):
        if not pixels:
            svg = _render(figure, "svg", metadata={"Date": None})
            if len(svg) <= _LARGEST_SVG:
                return Picture(name, title, caption, "image/svg+xml", svg, wide)
        png = _render(figure, "png", dpi=200)
        return Picture(name, title, caption, "image/png", png, wide)


def _render(figure: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, **options)
    return buffer.getvalue()


def limit(axes: Any, values: Array, *, from_zero: bool = False, share: float = 0.995) -> None:
    """Fit the y axis to the lower `share` of the values: one spike must not flatten the rest."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    low, high = float(finite.min()), float(np.quantile(finite, share))
    low = min(low, 0.0) if from_zero else low
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    axes.set_ylim(low if from_zero and low == 0 else low - margin, high + margin)


def mark_stages(axes: Any, starts: Sequence[tuple[int, str]], *, named: bool = True) -> None:
    """A thin line with a name where a stage of the recipe begins, and the name of the stage in
    which the axes begin, if there is room for it. Names that would lie on one another stand one
    below another."""
    low, high = axes.get_xlim()
    room = (high - low) / 12
    character = (high - low) * _LABEL_SIZE * 0.62 / (axes.get_window_extent().width * _POINTS)
    ends = [*(step for step, _ in starts[1:]), high][: len(starts)]
    rows: list[float] = []  # where the last name of each row ends
    for (step, name), end in zip(starts, ends, strict=True):
        if step >= high or end - max(step, low) < (0 if step > low else room):
            continue
        if step > low:
            axes.axvline(step, color=GREY, linewidth=0.6, linestyle=(0, (2, 2)))
        if not named:
            continue
        width, at = character * (len(name) + 2), max(step, low)
        left = at if at + width <= high else at - width
        row = next((i for i, last in enumerate(rows) if last <= left), len(rows))
        rows[row : row + 1] = [left + width]
        label = axes.text(
            at,
            1 - (_LABEL_SIZE * 1.4 * (row + 1)) / (axes.get_window_extent().height * _POINTS),
            f" {name} ",
            transform=axes.get_xaxis_transform(),
            fontsize=_LABEL_SIZE,
            color=GREY,
            ha="left" if left == at else "right",
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.2},
        )
        label.set_in_layout(False)
    axes.set_xlim(low, high)


def number_axis(axis: Any) -> None:
    """Short tick labels: 12,000 as 12k, 0.0003 as 3 with ×10⁻⁴ at the end of the axis. Steps, along
    x, are whole."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    low, high = axis.get_view_interval()
    size, steps = max(abs(low), abs(high)), axis.axis_name == "x"
    nice = {"steps": [1, 2, 2.5, 5, 10], "integer": steps, "min_n_ticks": 1 if steps else 2}
    axis.set_major_locator(MaxNLocator(8 if steps else 5, **nice))
    if size >= 1e4 and not (steps and high - low < 1e4):
        letter, scale = ("M", 1e6) if size >= 4e6 else ("k", 1e3)
        text = FuncFormatter(lambda v, _: f"{v / scale:g}{letter}" if v else "0")
        axis.set_major_formatter(text)
    elif steps:
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    elif size < 1e-2:
        axis.set_major_formatter(ScalarFormatter(useMathText=True))
        axis.get_major_formatter().set_powerlimits((-2, 4))


def layer_colours(count: int) -> list[Any]:
    """One colour for each layer, the first the darkest."""
    import matplotlib as mpl

    # Dark to light, short of the yellow end, which is too pale for a line on white.
    return list(mpl.colormaps["viridis"](np.linspace(0.0, 0.82, count)))


def layer_scale(figure: Any, axes: Any, layers: int) -> None:
    """A scale of the layers' colours, for more layers than a legend can name."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm(np.arange(0.5, layers + 1), layers)
    scale = ScalarMappable(norm, ListedColormap(layer_colours(layers)))
    ticks = sorted({1, (layers + 1) // 2, layers})
    bar = figure.colorbar(scale, ax=axes, label="MoE layer", ticks=ticks, aspect=28, pad=0.02)
    bar.outline.set_visible(False)


def heat_map(
    figure: Any,
    values: Array,
    extent: tuple[float, float, float, float],
    labels: tuple[str, str],
) -> None:
    """Draw `values` [rows, columns] of expert loads; `labels` are those of x and y."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    # Twice the even share fills the scale unless much is above; a few outliers may saturate.
    top = max(2.0, float(np.nanquantile(values, 0.99)))
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap="YlGnBu",
        vmin=0,
        vmax=top,
        aspect="auto",
        interpolation="nearest",
        extent=extent,
    )
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    bar = figure.colorbar(
        image, ax=axes, label="load (1 = even share)", extend="max", aspect=20, pad=0.02
    )
    bar.outline.set_visible(False)
