"""The training watched live in a terminal, or told in plain lines where there is none.

Watching must cost next to nothing and must never stop the training: the picture is redrawn at
most eight times a second, only when a step was reported, and a terminal that goes away silences
the view instead of raising.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from qiusuo.runs.progress import Progress
from qiusuo.runs.words import format_duration, format_number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_REDRAW_SECONDS = 1 / 8
_PLAIN_SECONDS = 10.0
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"


class LiveView:
    """Shows log records while a stage of `total_steps` steps trains; a context manager.

    `update` takes the records of the log as they are written; `message` says something in
    between. `start_step` is the step resumed from. `stream` (default: standard output) decides
    between a live picture and plain lines; `clock` gives seconds.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._progress = Progress(total_steps, title, start_step, clock())
        self._live: Live | None = None
        self._console: Console | None = None
        self._drawn = -math.inf
        self._told_at, self._told_step = -math.inf, -1
        self._silent = False

    def __enter__(self) -> LiveView:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=self._stream)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self._picture(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
        else:
            self._tell(f"{self._progress.title}: {self._progress.plan()}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            self._guard(lambda: live.update(self._picture(), refresh=True))
            self._guard(live.stop)
        elif self._progress.step > self._told_step:
            self._tell_step()

    def update(self, record: Mapping[str, Any]) -> None:
        """Take in one log record: a step, rollouts, a validation, a sample or an event."""
        self._progress.add(record, self._clock())
        kind = record.get("kind", "step")
        if kind == "event":
            self.message(str(record.get("text", "")))
        elif self._live is not None:
            self._redraw()
        elif kind == "validation":
            self._tell(f"{self._progress.place()}  validation {self._progress.validation_words()}")
        elif kind in {"step", "rollout"} and self._is_time_to_tell():
            self._tell_step()

    def set_total(self, total_steps: int) -> None:
        """Change how many steps there are: a plan may be made while it trains."""
        self._progress.total = total_steps

    def message(self, text: str) -> None:
        """Say `text` once, above the live picture or on a line of its own."""
        clean = _printable(text)
        if self._live is not None and self._console is not None:
            from rich.text import Text

            console = self._console
            self._guard(lambda: console.print(Text(clean)))
        else:
            self._tell(clean)

    # The live picture

    def _redraw(self) -> None:
        now = self._clock()
        live = self._live
        if live is not None and now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            self._guard(lambda: live.update(self._picture(), refresh=True))

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        p = self._progress
        width = self._console.width if self._console else 80
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        left = p.seconds_left(self._clock())
        ahead = f"{format_duration(left)} left of this stage" if left is not None else "…"
        if p.step >= p.total:
            ahead = f"took {format_duration(p.elapsed(self._clock()))}"
        head.add_row(
            Text(p.title, style="bold"),
            ProgressBar(total=max(p.total, 1), completed=p.step),
            Text(f"{p.step:,}/{p.total:,}  {ahead}"),
        )
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim", no_wrap=True)
        body.add_column(no_wrap=True, overflow="ellipsis")
        for label, value in self._rows(width):
            body.add_row(label, value)
        parts: list[RenderableType] = [head, body]
        if p.sample:
            parts.append(self._sample(width))
        return Group(*parts)

    def _rows(self, width: int) -> list[tuple[str, Any]]:
        from rich.text import Text

        p, rows = self._progress, []
        reward = p.rollout.get("reward")
        for name, value in (("reward", reward), ("loss", p.loss)):
            if isinstance(value, int | float):
                line = Text(f"{value:.4f}", style="bold")
                room = min(max(width - 34, 0), 72)
                line.append("  " + sparkline(p.history, room, self._blocks()), style="cyan")
                rows.append((name, line))
        if p.rollout_words():
            rows.append(("rollouts", Text(p.rollout_words())))
        more = []
        if p.mtp_loss is not None:
            more.append(f"MTP {p.mtp_loss:.4f}")
        more += [f"{name} {format_number(value)}" for name, value in p.others.items()]
        if more:
            rows.append(("", Text("   ".join(more))))
        if p.validation:
            rows.append(("validation", Text(p.validation_words())))
        if p.speed_words():
            rows.append(("speed", Text(p.speed_words())))
        if p.balance_words():
            rows.append(("experts", Text(p.balance_words())))
        if p.lr_words():
            rows.append(("optimizer", Text(p.lr_words())))
        return rows

    def _sample(self, width: int) -> RenderableType:
        from rich.text import Text

        prompt, continuation = (_printable(part) for part in self._progress.sample)
        text = Text(prompt, style="dim")
        text.append(continuation, style="not dim")
        lines = text.wrap(self._console, max(width - 2, 20))[:3] if self._console else [text]
        return Text("\n").join([Text(), *lines])

    # Plain lines

    def _is_time_to_tell(self) -> bool:
        p, now = self._progress, self._clock()
        if p.step == self._told_step:
            return False  # of a step of reinforcement there are two records
        if self._told_step < 0 or p.step >= p.total:
            return True
        since = now - self._told_at
        twentieth = max(p.total // 20, 1)
        if p.step // twentieth > self._told_step // twentieth and since >= 1:
            return True
        # Ten seconds at first; after hours, ten seconds would fill the log with sameness.
        return since >= max(_PLAIN_SECONDS, p.elapsed(now) / 60)

    def _tell_step(self) -> None:
        self._told_step, self._told_at = self._progress.step, self._clock()
        self._tell(self._progress.line(self._told_at))

    def _tell(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        safe = text.encode(encoding, "replace").decode(encoding)
        self._guard(lambda: print(safe, file=self._stream, flush=True))

    def _blocks(self) -> str:
        encoding = (getattr(self._stream, "encoding", None) or "utf-8").lower()
        return _BLOCKS if encoding.startswith("utf") else _ASCII_BLOCKS

    def _guard(self, show: Callable[[], Any]) -> None:
        if self._silent:
            return
        try:
            show()
        except (OSError, ValueError):  # the terminal went away, or the stream was closed
            self._silent = True


def sparkline(values: list[float], width: int, blocks: str = _BLOCKS) -> str:
    """`values` as at most `width` characters, the lowest value the lowest block.

    Neighbours are averaged when there are too many; what is not finite shows as "×" (or "x").
    """
    if not values or width <= 0:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    cells = []
    for a, b in itertools.pairwise(edges):
        cells.append(sum(values[a:b]) / (b - a))
    finite = [cell for cell in cells if math.isfinite(cell)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    broken = "×" if blocks == _BLOCKS else "x"
    return "".join(
        blocks[round((cell - low) * scale)] if math.isfinite(cell) else broken for cell in cells
    )


def _printable(text: str) -> str:
    """One line without control characters: a model may write escape codes."""
    return "".join(char if char.isprintable() else " " for char in " ".join(text.split()))
