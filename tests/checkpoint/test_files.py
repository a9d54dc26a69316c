"""A folder is replaced whole or not at all, whatever happens on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qiusuo.checkpoint import files
from qiusuo.checkpoint.files import CheckpointError, replacing_folder, restore_folder

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str) -> None:
    with replacing_folder(folder) as draft:
        (draft / "file").write_text(text, encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "renames"], autouse=True)
def way(request, monkeypatch):
    if request.param == "renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return request.param


def test_new_then_replaced_with_nothing_left_beside(tmp_path):
    write(tmp_path / "deep" / "m", "one")
    assert (tmp_path / "deep" / "m" / "file").read_text() == "one"
    (tmp_path / "deep" / "m" / "other").touch()
    write(tmp_path / "deep" / "m", "two")
    assert (tmp_path / "deep" / "m" / "file").read_text() == "two"
    assert names(tmp_path / "deep") == ["m"]
    assert names(tmp_path / "deep" / "m") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_error_on_the_way_leaves_the_old_folder(error, tmp_path):
    write(tmp_path / "m", "one")
    with pytest.raises(CheckpointError if error is OSError else error):
        fill_and_raise(tmp_path / "m", error)
    assert (tmp_path / "m" / "file").read_text() == "one"
    assert names(tmp_path) == ["m"]


def fill_and_raise(folder: Path, error: type[BaseException]) -> None:
    with replacing_folder(folder) as draft:
        (draft / "file").write_text("two", encoding="utf-8")
        raise error("the disk is full")


def test_second_rename_refused_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    write(tmp_path / "m", "one")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if "draft" in path.name:
            raise OSError("refused")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="refused"):
        write(tmp_path / "m", "two")
    assert (tmp_path / "m" / "file").read_text() == "one"
    assert names(tmp_path) == ["m"]


def test_folder_that_stands_aside_is_brought_back(tmp_path):
    write(tmp_path / "m", "one")
    (tmp_path / "m").rename(tmp_path / ".m.aside")  # killed between the two renames
    restore_folder(tmp_path / "m")
    assert (tmp_path / "m" / "file").read_text() == "one"
    restore_folder(tmp_path / "none")  # nothing to bring back: nothing happens
    assert names(tmp_path) == ["m"]


def test_write_after_an_interrupted_one(tmp_path):
    """What stands aside is the old folder still: back if the write fails, gone if it succeeds."""
    write(tmp_path / "m", "one")
    (tmp_path / "m").rename(tmp_path / ".m.aside")
    with pytest.raises(ValueError, match="full"):
        fill_and_raise(tmp_path / "m", ValueError)
    assert (tmp_path / "m" / "file").read_text() == "one"
    (tmp_path / "m").rename(tmp_path / ".m.aside")
    write(tmp_path / "m", "two")
    assert (tmp_path / "m" / "file").read_text() == "two"
    assert names(tmp_path) == ["m"]


def test_drafts_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    (tmp_path / ".m.draft-1").mkdir()
    (tmp_path / ".m.draft-2").mkdir()
    (tmp_path / ".mm.draft-1").mkdir()  # of another folder
    claim = files._claim(tmp_path / ".m.draft-2")
    write(tmp_path / "m", "one")
    os.close(claim)
    assert names(tmp_path) == [".m.draft-2", ".mm.draft-1", "m"]


def test_two_writers_at_once_do_not_mix(tmp_path):
    """The second one is refused and takes nothing away from the first."""
    with replacing_folder(tmp_path / "m") as draft:
        (draft / "file").write_text("one", encoding="utf-8")
        with pytest.raises(CheckpointError, match="could not write"):
            write(tmp_path / "m", "two")
    assert (tmp_path / "m" / "file").read_text() == "one"


def test_through_a_link(tmp_path):
    write(tmp_path / "m", "one")
    (tmp_path / "link").symlink_to("m")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "m" / "file").read_text() == "two"


@pytest.mark.parametrize("way", ["exchange"], indirect=True)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
def test_folders_are_exchanged_in_one_step(tmp_path):
    (tmp_path / "a" / "of-a").mkdir(parents=True)
    (tmp_path / "b" / "of-b").mkdir(parents=True)
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["of-b"], ["of-a"])
    assert not files._exchange(tmp_path / "a", tmp_path / "none")


def test_killed_at_any_point_the_old_or_the_new_model_stands(tmp_path, way):
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.dying", tmp_path / "models" / "m", way],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    outcomes = report["outcomes"]
    assert set(outcomes) == {"old", "new"}
    assert outcomes == sorted(outcomes, reverse=True)  # once new, always new
    assert outcomes.count("old") >= 10  # it did die on the way there
    assert outcomes.count("new") >= 2  # and after
    assert report["cut"] == "old"
    assert report["left"] == ["m"]
