"""The view: lines without a terminal, a picture with one, and never in training's way."""

from __future__ import annotations

import io
import math
import os
import pty
import re
from typing import Any

import pytest

from qiusuo.runs.console import LiveView, sparkline


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record(step: int, **more: Any) -> dict[str, Any]:
    fields = {"loss": 4.0, "mtp_loss": 4.5, "tokens_per_second": 9400.0, "peak_share": 0.47}
    return {"kind": "step", "step": step, **fields, "max_violation": [0.1, 0.4], **more}


def watch(total: int, seconds: float, stream: Any = None) -> list[str]:
    """The lines of a training of `total` steps that take `seconds` each."""
    stream, clock = stream or io.StringIO(), Clock()
    with LiveView(total, "demo", stream=stream, clock=clock) as view:
        for step in range(1, total + 1):
            clock.now += seconds
            view.update(record(step))
    return str(stream.getvalue()).splitlines()


def test_plain_lines_tell_everything_once() -> None:
    lines = watch(3, 1.0)
    assert lines[0] == "demo: 3 steps"
    assert lines[1].startswith("step 1/3  loss 4.0000  MTP 4.5000  9,400 tokens/s  47% of peak")
    assert "MaxVio 0.40" in lines[1]
    assert lines[-1].startswith("step 3/3")
    assert len([line for line in lines if line.startswith("step 3/3")]) == 1


def test_the_loss_told_is_the_steps_own_before_and_after_a_restart() -> None:
    """What a line says stands in the log, whatever the steps before it were."""
    stream = io.StringIO()
    with LiveView(30, "demo", stream=stream, clock=Clock()) as view:
        for step, loss in ((1, 9.0), (2, 5.0), (30, 3.25)):
            view.update(record(step, loss=loss, mtp_loss=loss + 1))
    assert "loss 3.2500  MTP 4.2500" in stream.getvalue().splitlines()[-1]
    resumed = io.StringIO()
    with LiveView(30, "demo", start_step=29, stream=resumed, clock=Clock()) as view:
        view.update(record(30, loss=3.25, mtp_loss=4.25))
    assert resumed.getvalue().splitlines()[-1] == stream.getvalue().splitlines()[-1]


def test_a_stage_says_which_steps_of_the_run_are_its_own() -> None:
    stream = io.StringIO()
    with LiveView(2209, "demo: rl", start_step=2149, stream=stream, clock=Clock()):
        pass
    assert stream.getvalue().splitlines()[0] == "demo: rl: steps 2,150 to 2,209"


def test_the_time_left_is_never_more_than_the_minutes_given() -> None:
    """Until the tenth step nobody knows how many steps fit: the limit in steps is far away."""
    stream, clock = io.StringIO(), Clock()
    with LiveView(10_000, "demo", stream=stream, clock=clock) as view:
        for step in range(1, 10):
            clock.now += 2.0
            view.update(record(step, minutes=0.5))
        assert "step 6/" in stream.getvalue().splitlines()[-1]
        assert "18 s left of this stage" in stream.getvalue().splitlines()[-1]
        view.set_total(15)
        clock.now += 2.0
        view.update(record(10))
    assert "10 s left of this stage" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    ("total", "seconds", "fewest", "most"),
    [(1000, 0.01, 8, 16), (100, 0.5, 18, 24), (20, 30.0, 20, 22), (20_000, 1.0, 200, 500)],
)
def test_plain_lines_come_at_sensible_intervals(
    total: int, seconds: float, fewest: int, most: int
) -> None:
    assert fewest <= len(watch(total, seconds)) <= most


def test_every_plain_line_is_flushed() -> None:
    class Stream(io.StringIO):
        unflushed = ""

        def write(self, text: str) -> int:
            self.unflushed += text
            return super().write(text)

        def flush(self) -> None:
            self.unflushed = ""

    stream = Stream()
    with LiveView(10, "demo", stream=stream, clock=Clock()) as view:
        view.update(record(1))
        assert "step 1/10" in stream.getvalue()
        view.message("saved 检查点")
        view.update({"kind": "validation", "step": 1, "loss": 3.0, "bits_per_character": 1.5})
        view.update({"kind": "event", "text": "resumed"})
        assert stream.unflushed == ""
    lines = stream.getvalue().splitlines()
    assert "saved 检查点" in lines
    assert "resumed" in lines
    assert "step 1/10  validation 1.5000 bits/char.  loss 3.0000" in lines


def test_the_last_step_seen_is_told_even_when_interrupted() -> None:
    stream, clock = io.StringIO(), Clock()
    view = LiveView(1000, "demo", stream=stream, clock=clock)

    def train() -> None:
        with view:
            for step in range(1, 8):
                view.update(record(step))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert stream.getvalue().splitlines()[-1].startswith("step 7/1,000")


def test_a_stream_that_goes_away_does_not_stop_training() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    assert watch(3, 1.0, Broken()) == []


def test_an_ascii_stream_gets_ascii() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with LiveView(3, "求索", stream=stream, clock=Clock()) as view:
        view.update(record(1))
        view.message("举头望山月")
    stream.seek(0)
    assert stream.read().startswith("??: 3 steps")


def test_a_terminal_gets_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pseudo-terminal: few redraws, and the last picture tells all."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    clock, seen = Clock(), b""
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        with LiveView(400, "poems", stream=stream, clock=clock) as view:
            for step in range(1, 401):
                clock.now += 0.01
                view.update(
                    record(step, loss=4.0 - step / 200, lr=3e-4, grad_norm=0.8, reward=0.25)
                )
                if step == 200:
                    view.message("checkpoint written")
                    sample = {"prompt": "床前明月光，", "continuation": "疑是\n地上霜\x1b[31m。"}
                    view.update({"kind": "sample", "step": 200, **sample})
                    view.update({"kind": "validation", "step": 200, "bits_per_character": 1.76})
                os.set_blocking(master, False)
                seen += drain(master)
        seen += drain(master)
    os.close(master)
    text = seen.decode("utf-8")
    pictures = text.split("poems")[1:]
    assert 20 <= len(pictures) <= 45  # four seconds at eight a second, and the first and last
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", pictures[-1])
    assert "400/400" in last
    assert "took 4 s" in last
    for words in ("█", "▁", "MTP 4.5000", "reward 0.2500", "1.7600 bits/char.", "at step 200"):
        assert words in last
    for words in ("47% of peak", "MaxVio 0.40", "lr 3.00e-04", "床前明月光，疑是 地上霜 [31m。"):
        assert words in last
    assert "checkpoint written" in text


def drain(descriptor: int) -> bytes:
    data = b""
    while True:
        try:
            data += os.read(descriptor, 65536)
        except OSError:  # nothing more for now, or the other side is closed
            return data


def test_sparkline() -> None:
    assert sparkline([1.0, 2.0, 3.0], 10) == "▁▅█"
    assert sparkline([float(i) for i in range(100)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0], 10) == "▁▁"
    assert sparkline([1.0, math.nan, 2.0], 10) == "▁×█"
    assert sparkline([1.0, 2.0], 2, "_#") == "_#"
    assert sparkline([], 10) == sparkline([1.0], 0) == ""
