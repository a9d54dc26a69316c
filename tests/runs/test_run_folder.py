"""A run folder keeps what is whole through kills, full disks and second writers."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import RunFolder, default_run_path
from qiusuo.runs.lock import writer_of

RECIPE = {"name": "测试", "model": {"layers": 2}}


def start(script: str, *words: str) -> subprocess.Popen[str]:
    """A real process running `script`, with pipes to talk through."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def fill(folder: RunFolder, step: int, text: str = "weights") -> None:
    with folder.new_checkpoint(step) as path:
        (path / "part").mkdir()
        (path / "part" / "model.bin").write_text(text)


def fail_halfway(folder: RunFolder, step: int, error: BaseException) -> None:
    with folder.new_checkpoint(step) as path:
        (path / "half").write_text("")
        raise error


def test_create_and_reopen(tmp_path: Path) -> None:
    with RunFolder.create(
        tmp_path / "a" / "run", RECIPE, version="9.9", command=["x", "y z"]
    ) as run:
        assert run.status() == {}
        run.set_status("running", stage="pretrain", step=3, steps=10)
        assert run.latest_checkpoint() is None
    environment = run.environment
    assert (environment["qiusuo"], environment["command"]) == ("9.9", "x 'y z'")
    assert environment["torch"] == torch.__version__
    assert environment["cores"] >= 1
    with RunFolder.open(run.path) as again:
        assert again.recipe == RECIPE
        status = again.status()
        assert status.pop("updated")
        expected = {"stage": "pretrain", "step": 3, "steps": 10, "state": "running", "error": None}
        assert status == expected
        again.record_resumption("9.9.1")
        assert [e["qiusuo"] for e in again.environment["resumed"]] == ["9.9.1"]
        with pytest.raises(RunError, match="finishing"):
            again.set_status("finishing")  # type: ignore[arg-type]


def test_create_refuses_what_is_there(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", RECIPE).close()
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder.create(tmp_path / "run", RECIPE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="not empty"):
        RunFolder.create(tmp_path / "mine", RECIPE)
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder.open(tmp_path / "mine")
    with pytest.raises(RunError, match="model"):
        RunFolder.create(tmp_path / "bad", {"model": object()})
    assert not (tmp_path / "bad").exists()


def test_default_run_path(tmp_path: Path) -> None:
    assert default_run_path("poems") == Path("runs/poems")
    for expected in ("poems", "poems-2", "poems-3"):
        path = default_run_path("poems", tmp_path)
        assert path == tmp_path / expected
        path.mkdir()
    for bad in ("", "..", "a/b", "a\\b"):
        with pytest.raises(RunError, match="cannot name a run"):
            default_run_path(bad)


def test_checkpoints_are_sorted_and_pruned(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", RECIPE) as run:
        for step in (100, 5, 1234, 123456789):
            fill(run, step)
        (run.checkpoints_path / "step-12").mkdir()  # not a name of ours
        (run.checkpoints_path / "notes.txt").write_text("")
        assert [step for step, _ in run.checkpoints()] == [5, 100, 1234, 123456789]
        latest = run.latest_checkpoint()
        assert latest == (123456789, run.checkpoints_path / "step-123456789")
        assert run.prune(keep=1, protect={5}) == [100, 1234]
        assert run.prune(keep=0) == [5]  # the latest stays whatever is asked
        assert [step for step, _ in run.checkpoints()] == [123456789]


def test_a_failed_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", RECIPE) as run:
        fill(run, 7, "first")
        for error in (ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")):
            with pytest.raises(type(error)):
                fail_halfway(run, 7, error)
        assert [p.name for p in run.checkpoints_path.iterdir()] == ["step-00000007"]
        assert (run.checkpoints()[0][1] / "part" / "model.bin").read_text() == "first"
        fill(run, 7, "second")
        assert [p.name for p in run.checkpoints_path.iterdir()] == ["step-00000007"]
        assert (run.checkpoints()[0][1] / "part" / "model.bin").read_text() == "second"


def test_readers_need_no_lock_and_may_not_write(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", RECIPE) as run:
        fill(run, 1)
        reader = RunFolder.open(run.path, lock=False)
        assert len(reader.checkpoints()) == 1
        for act in (
            reader.prune,
            reader.open_log,
            reader.open_samples,
            lambda: reader.set_status("running"),
            lambda: fill(reader, 2),
        ):
            with pytest.raises(RunError, match="without its lock"):
                act()
        with pytest.raises(RunError, match=str(os.getpid())):
            RunFolder.open(run.path)
    with pytest.raises(RunError, match="closed"):
        fill(run, 2)


def test_kill_in_the_middle_of_a_checkpoint(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", RECIPE).close()
    child = start(
        """
        import sys
        from qiusuo.runs.folder import RunFolder
        run = RunFolder.open(sys.argv[1])
        with run.new_checkpoint(10) as path:
            (path / "model.bin").write_bytes(b"x" * 1000)
        with run.new_checkpoint(20) as path:
            (path / "model.bin").write_bytes(b"x" * 500)
            print("half", flush=True)
            sys.stdin.read()
        """,
        str(tmp_path / "run"),
    )
    assert said(child) == "half"
    kill(child)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list(checkpoints.iterdir())) == 2  # the leftover is there, under no real name
    with RunFolder.open(tmp_path / "run") as run:
        assert [step for step, _ in run.checkpoints()] == [10]
        assert [p.name for p in checkpoints.iterdir()] == ["step-00000010"]
        assert (checkpoints / "step-00000010" / "model.bin").stat().st_size == 1000


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """Checkpoints come and go, of the same steps too, until the process is shot."""
    RunFolder.create(tmp_path / "run", RECIPE).close()
    script = """
        import itertools, sys
        from qiusuo.runs.folder import RunFolder
        run = RunFolder.open(sys.argv[1])
        print("ready", flush=True)
        for i in itertools.count(1):
            with run.new_checkpoint(i % 5) as path:
                for name in "abc":
                    (path / name).write_text(str(i) * 5000)
            run.prune(keep=3)
            print(i, flush=True)
        """
    for lines in (2, 7, 12):
        child = start(script, str(tmp_path / "run"))
        for _ in range(lines):
            said(child)
        kill(child)
        with RunFolder.open(tmp_path / "run") as run:
            found = run.checkpoints()
            assert found
            for _, path in found:
                texts = [(path / name).read_text() for name in "abc"]
                assert texts[0] == texts[1] == texts[2] != ""
            assert not list(run.checkpoints_path.glob(".*"))


def test_a_checkpoint_set_aside_comes_back(tmp_path: Path) -> None:
    """A kill between the two renames of a replacement."""
    with RunFolder.create(tmp_path / "run", RECIPE) as run:
        fill(run, 3, "old")
        path = run.checkpoints()[0][1]
        path.rename(path.with_name(".partial-replaced-step-00000003"))
        (run.path / ".partial-77-status.json").write_text("{")
    with RunFolder.open(run.path) as again:
        assert (again.checkpoints()[0][1] / "part" / "model.bin").read_text() == "old"
    assert not list(run.path.rglob(".partial*"))


def test_two_processes_never_train_in_one_folder(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", RECIPE).close()
    child = start(
        """
        import sys
        from qiusuo.runs.folder import RunFolder
        run = RunFolder.open(sys.argv[1])
        print("locked", flush=True)
        sys.stdin.read()
        """,
        str(tmp_path / "run"),
    )
    assert said(child) == "locked"
    assert writer_of(tmp_path / "run") == child.pid
    with pytest.raises(RunError, match=f"in use by process {child.pid}"):
        RunFolder.open(tmp_path / "run")
    kill(child)
    assert writer_of(tmp_path / "run") is None
    with RunFolder.open(tmp_path / "run"):
        assert writer_of(tmp_path / "run") == os.getpid()
    assert writer_of(tmp_path / "run") is None


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 3 MiB, where this machine lets us mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = shutil.which("mount")
    words = [mount or "mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if mount is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs here; the simulated full disk is tested below")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def save_plain(path: Path) -> None:
    (path / "model.bin").write_bytes(bytes(4 << 20))


def save_torch(path: Path) -> None:
    torch.save({"w": torch.zeros(1 << 20)}, path / "model.pt")


def save_safetensors(path: Path) -> None:
    save_file({"w": torch.zeros(1 << 20)}, path / "model.safetensors")


def save_checkpoint(folder: RunFolder, step: int, save: Callable[[Path], None]) -> None:
    with folder.new_checkpoint(step) as path:
        save(path)


@pytest.mark.parametrize("save", [save_plain, save_torch, save_safetensors])
def test_a_really_full_disk(tiny_disk: Path, save: Callable[[Path], None]) -> None:
    with RunFolder.create(tiny_disk / "run", RECIPE) as run:
        fill(run, 10)
        with pytest.raises(RunError, match="disk is full") as caught:
            save_checkpoint(run, 20, save)
        message = str(caught.value)
        assert str(run.path) in message
        assert "MB free" in message
        assert "last good checkpoint, step-00000010, is intact" in message
        assert [p.name for p in run.checkpoints_path.iterdir()] == ["step-00000010"]
        fill(run, 20)


def test_a_log_on_a_full_disk_stays_whole(tiny_disk: Path) -> None:
    with RunFolder.create(tiny_disk / "run", RECIPE) as run, run.open_log() as log:
        log.append({"kind": "step", "step": 1})
        with pytest.raises(RunError, match="disk is full"):
            log.append({"kind": "event", "text": "x" * (4 << 20)})
        log.append({"kind": "step", "step": 2})
        lines = run.log_path.read_text().splitlines()
    assert lines == ['{"kind": "step", "step": 1}', '{"kind": "step", "step": 2}']


def test_a_simulated_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For machines without the right to mount: the error comes from the sync."""
    with RunFolder.create(tmp_path / "run", RECIPE) as run:

        def full(_: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("qiusuo.runs.checkpoints.sync_tree", full)
        with pytest.raises(RunError, match="no earlier checkpoint"):
            fill(run, 1)
        assert not list(run.checkpoints_path.iterdir())
