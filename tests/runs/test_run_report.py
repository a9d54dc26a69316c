"""The report: complete, self-contained, safe, and there even when the run is not."""

from __future__ import annotations

import base64
import builtins
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qiusuo.data.cache import show_bytes
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import read_log
from qiusuo.runs.plots import draw_pictures
from qiusuo.runs.report import write_report
from qiusuo.runs.series import broken_at, expert_loads, smooth, smooth_apart, spread, thin
from qiusuo.runs.style import mark_stages, new_figure, number_axis
from qiusuo.runs.summary import find_fact, read_summary, write_summary
from qiusuo.runs.words import format_bytes, format_duration, format_fact, format_large

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """What a browser would see: text by section, tags, and that every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "section":
            self._section = dict(attrs).get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data
            self.sections[self._section] = self.sections.get(self._section, "") + data


def test_a_finished_run(finished_run: Path) -> None:
    page = Page(write_report(finished_run))
    assert "Poems 27M" in page.text
    assert "finished after 200 of 200 steps" in page.text
    assert "This report is incomplete" not in page.text
    assert {"facts", "curves", "experts", "validation", "samples", "reproduce"} <= set(
        page.sections
    )
    assert "27,262,976" in page.sections["facts"]
    assert "0.9375 (95 % interval 0.91 to 0.96)" in page.sections["facts"]
    assert "qiusuo train poems.toml --run runs/poems-27m" in page.sections["reproduce"]
    assert 'name = "poems-27m"' in page.sections["reproduce"]
    assert "PyTorch" in page.sections["environment"]
    last = [r for r in read_log(finished_run / "log.jsonl") if r["kind"] == "validation"][-1]
    assert f"{last['loss']:.4f}" in page.sections["validation"]
    assert "举头望山月" in page.sections["samples"]
    titles = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    expected = ["Loss", "Learning rate", "Speed", "Other", "Expert balance"]
    expected += ["Load of every expert", "Load of one layer"]
    assert [t.startswith(e) for t, e in zip(titles, expected, strict=True) if t] == [True] * 7


def test_it_needs_nothing_but_itself(finished_run: Path) -> None:
    html = write_report(finished_run).read_text(encoding="utf-8")
    page = Page(finished_run / "report.html")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [a["src"] or "" for _, a in page.tags if "src" in a]
    assert all(re.match("data:image/(png|svg.xml);base64,", source) for source in sources)
    for source in sources:
        data = base64.b64decode(source.partition(",")[2], validate=True)
        assert data.startswith(b"\x89PNG") or b"<svg" in data[:1000]
    assert not re.findall(r"(?:url\(|@import|(?:src|href)=[\"']?https?:)", html)


def test_text_of_the_model_stays_text(finished_run: Path) -> None:
    page = Page(write_report(finished_run))
    assert "</script><script>alert(1)</script> & so" in page.sections["samples"]
    chinese = [a for tag, a in page.tags if tag == "p" and a.get("lang") == "zh"]
    assert chinese


def test_the_same_run_gives_the_same_report(finished_run: Path) -> None:
    first = write_report(finished_run).read_bytes()
    assert write_report(finished_run).read_bytes() == first


def test_an_almost_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", {}).close()
    page = Page(write_report(tmp_path / "run"))
    assert "run" in page.text
    assert "not begun to train" in page.text
    for thing in ("recipe", "no training step", "no validation", "no samples", "summary.json"):
        assert thing in page.text
    (tmp_path / "bare").mkdir()
    assert "environment.json" in Page(write_report(tmp_path / "bare")).text
    with pytest.raises(RunError, match="no run folder"):
        write_report(tmp_path / "absent")


def test_a_failed_run_shows_its_error(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {"name": "<b>bold</b>"}) as run:
        with run.open_log() as log:
            log.append({"kind": "step", "step": 1, "loss": float("nan"), "lr": 0.0})
            log.append({"kind": "validation", "step": 1, "loss": float("inf")})
            log.append({"kind": "event", "step": 1, "text": "loss is not finite & <stops>"})
        run.set_status("failed", stage="sft", step=1, steps=9, error="RunError: <loss> is nan")
        page = Page(write_report(run.path))
    assert "failed after 1 of 9 steps in stage sft" in page.text
    assert "RunError: <loss> is nan" in page.text
    assert "<b>bold</b>" in page.text
    assert "not finite in 1 of 1" in page.text
    assert "<stops>" in page.sections["events"]


def test_a_killed_run_is_not_called_running(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {"name": "x"}) as run:
        run.set_status("running", step=5, steps=10)
        assert "still training" in Page(write_report(run.path)).text
    assert "stopped from outside" in Page(write_report(run.path)).text


def test_stages_and_unknown_measures_are_drawn() -> None:
    records: list[dict[str, Any]] = [
        {"kind": "step", "step": i, "loss": 3.0, "stage": "sft" if i < 5 else "rl", "reward": i / 9}
        for i in range(10)
    ]
    assert [picture.name for picture in draw_pictures(records)] == ["loss", "others"]


def test_odd_logs_can_be_drawn() -> None:
    """One step; layers of unequal width; a field that comes and goes; 5,000 noisy steps."""
    step: dict[str, Any] = {"kind": "step", "step": 1, "loss": 3.0, "max_violation": [0.5]}
    assert len(draw_pictures([step])) == 2
    ragged = [{"kind": "step", "step": i, "expert_load": [[1.0], [0.5, 1.5]]} for i in range(4)]
    assert len(draw_pictures(ragged)) == 2
    assert expert_loads(ragged)[1].shape == (4, 2, 2)
    values = np.random.default_rng(0).normal(size=5000)
    noisy = [{"kind": "step", "step": i, "loss": v} for i, v in enumerate(values.tolist())]
    assert all(len(picture.data) < 400_000 for picture in draw_pictures(noisy))
    assert draw_pictures([]) == []


def test_without_matplotlib_the_remedy_is_named(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *words: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *words, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RunError, match=r'pip install "qiusuo\[report\]"'):
        write_report(finished_run)


def test_the_validation_table_keeps_its_best_row(make: Callable[..., Path], tmp_path: Path) -> None:
    path = make(tmp_path / "run", steps=20, layers=1, experts=4)
    with RunFolder.open(path) as run, run.open_log() as log:
        for i in range(100):
            loss = 0.1234 if i == 51 else 2.0
            log.append({"kind": "validation", "step": 100 + i, "loss": loss})
    section = Page(write_report(path)).sections["validation"]
    assert "0.1234" in section
    assert "more rows are in log.jsonl" in section


def test_a_stage_is_smoothed_by_itself() -> None:
    """A loss that jumps where a stage begins, or that others lie between, neither rises before nor
    runs on after."""
    steps = np.array([1.0, 2, 3, 4, 11, 12, 13, 14])
    values = np.array([2.0] * 4 + [8.0] * 4)
    places = [1, 5, 7, 11]  # stages that have no loss lie between
    assert np.array_equal(smooth_apart(steps, values, places), values)
    assert smooth(values)[3] > 3
    x, y = broken_at(steps, values, places)
    assert np.flatnonzero(np.isnan(y)).tolist() == [4]
    assert x.tolist() == [1, 2, 3, 4, 11, 11, 12, 13, 14]
    assert len(smooth_apart(steps[:0], values[:0], places)) == 0


def test_looks_at_a_part_are_not_held_against_looks_at_all(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    run = make(tmp_path / "run", steps=24, layers=1, experts=4)
    records = [r for r in read_log(run / "log.jsonl") if r["kind"] != "validation"]
    looks = [(6, 4.9, 4.7, 283), (12, 4.6, 4.5, 283), (18, 4.3, 4.2, 283), (24, 4.4, 4.9, 682)]
    for step, loss, bits, tokens in looks:
        look = {"kind": "validation", "step": step, "loss": loss, "tokens": tokens}
        records.append(look | {"bits_per_character": bits})
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_report(run))
    assert "4.400 nats per token (4.900 bits per character) over 682 tokens." in page.text
    assert "Over 283 tokens, which is another figure, it went from 4.900 at step 6 to" in page.text
    [best] = re.findall(r'<tr class="best">(.*?)</tr>', (run / "report.html").read_text())
    assert re.findall(r">([^<]+)<", best)[:4] == ["18", "4.3000", "4.2000", "283"]
    [loss] = [picture for picture in draw_pictures(records) if picture.name == "loss"]
    assert "cannot be compared" in loss.caption


def test_what_never_changes_is_said_and_not_drawn() -> None:
    records = [
        {"kind": "step", "step": step, "loss": 2.0, "flat": 1.0 + step * 1e-6, "lively": step}
        for step in range(1, 9)
    ]
    [others] = [picture for picture in draw_pictures(records) if picture.name == "others"]
    assert "The same in every step that has it: flat 1.000" in others.caption
    assert "lively" not in others.caption
    assert "others" not in [p.name for p in draw_pictures([r | {"lively": 1} for r in records])]


def test_names_of_short_stages_do_not_lie_on_one_another() -> None:
    figure = new_figure(9.4, 3.6)
    axes = figure.subplots()
    axes.set_xlim(0, 2400)
    mark_stages(
        axes,
        [(0, "pretrain"), (1970, "cold-start"), (2150, "rl"), (2167, "traces"), (2183, "distil")],
    )
    number_axis(axes.xaxis)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    inside = axes.get_window_extent()
    assert all(inside.x0 - 1 <= box.x0 and box.x1 <= inside.x1 + 1 for box in boxes)
    axes.set_xlim(2150, 2166)
    number_axis(axes.xaxis)
    figure.canvas.draw()
    assert {"2,150", "2,166"} & {label.get_text() for label in axes.get_xticklabels()}
    assert not any("." in label.get_text() for label in axes.get_xticklabels())


def test_smoothing_and_thinning() -> None:
    values = np.concatenate([np.full(500, 5.0), [np.nan, np.inf], np.full(500, 5.0)])
    assert np.allclose(smooth(values), 5.0)
    assert np.isnan(smooth(np.array([np.nan]))).all()
    spiky = np.zeros(10_000)
    spiky[7777] = 9.0
    steps, thinned = thin(np.arange(10_000.0), spiky, 500)
    assert len(steps) <= 500
    assert thinned.max() == 9.0
    assert spread(range(100), 3) == [0, 50, 99]


def test_summary_and_words(tmp_path: Path) -> None:
    facts = {"Parameters": np.int64(27), "Rate": {"value": 0.5, "unit": "Hz"}, "x": float("nan")}
    write_summary(tmp_path, facts)
    back = read_summary(tmp_path)
    assert back == {"Parameters": 27, "Rate": {"value": 0.5, "unit": "Hz"}, "x": "NaN"}
    assert find_fact(back, "parameters") == 27
    assert find_fact(back, "RATE") == 0.5
    assert find_fact(back, "none") is None
    assert format_fact(back["Rate"]) == "0.5000 Hz"
    assert format_fact([1234567, True, None]) == "1,234,567; yes; –"
    assert [format_duration(s) for s in (48, 725, 12000, 187200)] == [
        "48 s",
        "12 min 5 s",
        "3 h 20 min",
        "2 d 4 h",
    ]
    assert (format_large(3145728), format_large(950)) == ("3.15 M", "950")
    assert (format_bytes(12), format_bytes(1.5e9)) == ("12 bytes", "1.5 GB")
    for power in range(0, 50, 3):  # a size looks the same wherever it is shown
        assert format_bytes(2**power) == show_bytes(2**power)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_the_recipe_of_the_log_is_json_throughout(finished_run: Path) -> None:
    for name in ("environment.json", "status.json", "summary.json"):
        assert isinstance(json.loads((finished_run / name).read_text(encoding="utf-8")), dict)
