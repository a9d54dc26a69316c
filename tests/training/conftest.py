"""One cache, one corpus and one undisturbed run for all tests of the room."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qiusuo.training.rl.reinforce import Reinforcement
from tests.training import lives, tasks


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache: prepared data is made once for all runs."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QIUSUO_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lives.write_corpus(tmp_path_factory.mktemp("corpus") / "road.jsonl")


@pytest.fixture(scope="session")
def recipe_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return lives.write_recipe(folder / "tiny.toml", lives.recipe_table(corpus))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports take longer to draw than these runs to train; other processes draw theirs."""
    monkeypatch.setattr("qiusuo.training.finish.write_report", lambda path: path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run of the tiny recipe, in this process."""
    path = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert lives.live(lives.recipe_for(corpus), path)
    return path


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt the form of an answer, and guesses: so groups differ."""
    path = tmp_path_factory.mktemp("runs") / "taught"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qiusuo.training.finish.write_report", lambda path: path)
        assert lives.live(tasks.recipe(tasks.sft(steps=80)), path)
    return path / "model"


@pytest.fixture
def trying(taught: Path, tmp_path: Path) -> tasks.Make:
    """Makes the steps of the tiny reinforcement with some keys of its stage (``top``: of its
    recipe) changed, each in a folder of its own."""
    numbers = itertools.count()

    def make(*, top: dict[str, Any] | None = None, **stage: Any) -> Reinforcement:
        recipe = tasks.recipe(tasks.rl(**stage), base=taught, **(top or {}))
        return Reinforcement(lives.scene_of(recipe, tmp_path / f"made-{next(numbers)}"))

    return make
