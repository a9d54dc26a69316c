"""What a person names: which of several models in one place is meant, and what a pull leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from qiusuo.checkpoint import open as opening
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.gguf.file import write_gguf
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.checkpoint.load import checkpoint_of
from qiusuo.checkpoint.open import find_model, open_checkpoint, pull_model
from qiusuo.data.cache import only_one
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from tests.model.shapes import tiny_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QIUSUO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_model_that_holds_another_is_itself(tmp_path: Path) -> None:
    outer = save_huggingface(tiny_model(), tmp_path / "m")
    save_huggingface(tiny_model(hidden_size=64), outer / "model")
    assert find_model(outer) == outer
    assert open_checkpoint(outer).config.hidden_size == 48
    assert find_model(outer / "model") == outer / "model"


def test_a_run_is_its_finished_model(tmp_path: Path) -> None:
    """Whatever else lies in its folder."""
    run = save_huggingface(tiny_model(), tmp_path / "run")
    save_huggingface(tiny_model(), run / "model")
    (run / "recipe.toml").write_text("")
    assert find_model(run) == run / "model"


def test_a_folder_around_a_model(tmp_path: Path) -> None:
    save_huggingface(tiny_model(), tmp_path / "around" / "model")
    assert find_model(tmp_path / "around") == tmp_path / "around" / "model"
    (tmp_path / "around" / "model" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"around holds no config\.json"):
        find_model(tmp_path / "around")


# -- a pull that converts ---------------------------------------------------------------------


@pytest.fixture
def fetches(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were fetched, each time as a small file in the cache."""
    fetched: list[str] = []
    tokenizer = Tokenizer.train_bpe(["the road is long"], 280)
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=77)

    def fetch(name: str, progress: object) -> Path:
        fetched.append(name)
        return write_gguf(checkpoint_of(model, tokenizer), home / "archives" / "small.gguf")

    monkeypatch.setattr(opening, "pull_member", fetch)
    return fetched


def test_a_pulled_model_is_its_folder_and_nothing_else(home: Path, fetches: list[str]) -> None:
    folder = pull_model("smollm2")
    assert folder == home / "models" / "smollm2"
    assert find_model("smollm2") == folder
    assert open_checkpoint("smollm2").config.max_position_embeddings == 77
    assert [path.name for path in (home / "archives").iterdir()] == []
    assert pull_model("smollm2") == folder
    assert fetches == ["smollm2"]  # once


def test_a_model_that_another_process_converts(home: Path, fetches: list[str]) -> None:
    words = "model-smollm2 is being fetched or converted by another process"
    with only_one("model-smollm2"), pytest.raises(DataError, match=words):
        pull_model("smollm2")
    assert fetches == []


def test_a_model_that_another_process_has_just_finished(
    home: Path, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the lock."""

    def late(name: str) -> object:
        save_huggingface(tiny_model(), home / "models" / "smollm2")
        return only_one(name)

    monkeypatch.setattr(opening, "only_one", late)
    assert pull_model("smollm2") == home / "models" / "smollm2"
    assert fetches == []
