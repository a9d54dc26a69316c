"""`make run` as a process: the page first, the training watched there, then what was trained."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.training import lives

WORDS = "-m qiusuo quickstart --recipe tiny.toml --run runs/tiny --port 0"
PATIENCE = 120.0  # seconds, for a machine that does much else


class Quickstart:
    def __init__(self, folder: Path, corpus: Path, steps: int) -> None:
        recipe = lives.recipe_table(corpus)
        recipe["stages"][0]["steps"] = steps
        lives.write_recipe(folder / "tiny.toml", recipe)
        self.said = folder / "said.txt"
        empty = {"QIUSUO_HOME": str(folder / "home")}
        with self.said.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *WORDS.split()],
                cwd=folder,
                env=os.environ | empty | {"OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        found = self.until(lambda: re.search(r"http://localhost:(\d+)", self.words))
        self.url = found[0]

    @property
    def words(self) -> str:
        return self.said.read_text(encoding="utf-8")

    def until(self, look: Callable[[], object]) -> object:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self.process.poll() is None, self.words
            if seen := look():
                return seen
            time.sleep(0.05)
        raise AssertionError(self.words)

    def get(self, path: str) -> object:
        return httpx.get(self.url + path, timeout=30).raise_for_status().json()

    def stop(self) -> int:
        """As Ctrl-C in a terminal does: all of its foreground group hear it."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(PATIENCE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], Quickstart]]:
    corpus = lives.write_corpus(tmp_path / "corpus.jsonl")
    under_way: list[Quickstart] = []

    def run(steps: int) -> Quickstart:
        under_way.append(Quickstart(tmp_path, corpus, steps))
        return under_way[-1]

    yield run
    for one in under_way:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()


def test_from_the_first_step_to_a_model_and_again(start):
    first = start(4)
    assert "<title>" in httpx.get(first.url).text
    first.until(lambda: first.get("/api/runs"))
    first.until(lambda: [model["id"] for model in first.get("/api/models")] == ["tiny"])
    [run] = first.get("/api/runs")
    assert (run["state"], run["step"], run["served_as"]) == ("finished", 4, "tiny")
    # A companion is offered, with its size, and not fetched.
    offer = "`qiusuo pull smollm2` fetches a small model to talk with (92.9 MB)"
    first.until(lambda: offer in first.words)
    assert not (first.said.parent / "home/models").exists()
    assert not (first.said.parent / "home/archives").exists()
    question = {"model": "tiny", "prompt": "一", "max_tokens": 3}
    answer = httpx.post(first.url + "/v1/completions", json=question, timeout=60).json()
    assert answer["usage"]["completion_tokens"] <= 3
    assert first.stop() == 0

    again = start(4)
    again.until(lambda: [model["id"] for model in again.get("/api/models")] == ["tiny"])
    assert "step 1/4" not in again.words
    assert again.stop() == 0


def test_stopped_while_it_trains_it_saves_and_goes_on(start):
    first = start(2000)
    first.until(lambda: "step 1/" in first.words)
    assert first.stop() == 130
    assert "Stopped and saved" in first.words
    done = len(lives.steps_done(first.said.parent / "runs/tiny"))
    assert 0 < done < 2000
    again = start(2000)
    again.until(lambda: "Going on with the unfinished run" in again.words)
    again.until(lambda: len(lives.steps_done(first.said.parent / "runs/tiny")) > done)
    assert again.stop() == 130


def test_ended_by_the_system_it_ends_the_training_too(start):
    first = start(2000)
    first.until(lambda: "step 1/" in first.words)
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(PATIENCE) == 130
    assert "Stopped and saved" in first.words


def test_a_folder_that_is_no_run_is_refused_before_anything(tmp_path):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/thesis.txt").write_text("years of work")
    command = [sys.executable, "-m", "qiusuo", "quickstart", "--recipe", "seconds"]
    told = subprocess.run(
        [*command, "--run", "runs/tiny", "--port", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert told.returncode == 1
    assert "is not a run folder" in told.stderr
    assert (tmp_path / "runs/tiny/thesis.txt").read_text() == "years of work"
