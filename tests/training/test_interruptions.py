"""Whatever stops a run, going on gives the run that nothing stopped, to the last bit.

The processes here are real ones, killed, interrupted and starved of disk from outside.
"""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.summary import read_summary
from qiusuo.training.train import resume_run
from tests.training import dying, lives

pytestmark = pytest.mark.usefixtures("no_pictures")


def start(home: Path, *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        lives.command(*words),
        env=lives.environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Return as soon as the log has the step; fail if the process ends before."""
    log, sign = run / "log.jsonl", f'"step": {step}, "loss"'
    while not (log.exists() and sign in log.read_text(encoding="utf-8")):
        try:
            process.wait(0.005)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"ended with {process.returncode} before step {step}: {process.stderr.read()}")


@pytest.mark.parametrize("step", [2, 8, 13])
def test_killed_at_any_moment(
    home: Path, recipe_file: Path, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    with start(home, "train", recipe_file, "--run", run) as process:
        wait_for_step(process, run, step)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert lives.state_of(run) == "running"  # it had no time to say otherwise
    assert step <= lives.steps_done(run)[-1] < lives.STEPS
    assert lives.go_on(run)
    lives.assert_same_life(run, undisturbed)


@pytest.fixture(scope="module")
def dead(home: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that died while they wrote a checkpoint, by the way of dying, and a "whole" one."""
    folder = tmp_path_factory.mktemp("dead")
    program = [sys.executable, "-m", "tests.training.dying", corpus, folder]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        program, env=lives.environment(home), cwd=root, capture_output=True, text=True, check=True
    )
    ends = dict(line.split() for line in done.stdout.splitlines() if line.split()[0] in dying.WAYS)
    assert ends.pop("half-written") == str(-signal.SIGXFSZ)
    assert set(ends.values()) == {str(-signal.SIGKILL)}
    assert len(ends) == len(dying.WAYS) - 1
    return folder


@pytest.mark.parametrize("way", dying.WAYS)
def test_killed_while_a_checkpoint_is_written(dead: Path, way: str) -> None:
    run = dead / way
    last = lives.last_checkpoint(run)
    done = way == "while-the-oldest-goes"
    assert last.name == ("step-00000016" if done else "step-00000012")
    draft = run / "checkpoints" / dying.DRAFT
    assert draft.exists() != done
    if way == "half-written":
        assert (draft / "state.pt").stat().st_size == 100_000
    assert torch.load(last / "state.pt")["step"] == (16 if done else 12)
    assert lives.go_on(run)
    lives.assert_same_life(run, dead / "whole")
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_from_the_command_line(
    home: Path, recipe_file: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    with start(home, "train", recipe_file, "--run", run) as process:
        wait_for_step(process, run, 5)
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 130
    assert err == ""
    assert f"Stopped and saved. Go on with: qiusuo train --resume --run {run}" in out
    last = lives.steps_done(run)[-1]
    assert 5 <= last < lives.STEPS
    status = RunFolder.open(run, lock=False).status()
    assert (status["state"], status["step"], status["steps"]) == ("interrupted", last, lives.STEPS)
    assert lives.last_checkpoint(run).name == f"step-{last:08d}"
    assert (run / "report.html").is_file()
    if number == signal.SIGINT:
        done = lives.run_command(home, "train", "--resume", "--run", run)
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert lives.go_on(run)
    lives.assert_same_life(run, undisturbed)


def test_interrupted_in_every_step_of_a_row(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Again and again, also on steps that validate and save."""
    run = tmp_path / "run"
    lives.live_until(lives.recipe_for(corpus), run, 7)
    for step in (8, 16, 23, 24):
        with pytest.MonkeyPatch.context() as patch:
            lives.interrupt_at(patch, step)
            assert lives.go_on(run) == (step == 24)  # the last step is the end all the same
        if step < 24:
            assert lives.last_checkpoint(run).name == f"step-{step:08d}"
    lives.assert_same_life(run, undisturbed)


def test_interrupted_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qiusuo.training.vocabulary.prepare", refuse)
        with pytest.raises(KeyboardInterrupt):
            lives.live(lives.recipe_for(corpus, steps=2), tmp_path / "run")
    assert lives.state_of(tmp_path / "run") == "interrupted"
    assert lives.go_on(tmp_path / "run")


def test_killed_between_the_last_checkpoint_and_the_end(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    def die(*args: object) -> None:
        raise SystemExit  # nothing in the way catches it, as with a kill

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qiusuo.training.life.write_model", die)
        with pytest.raises(SystemExit):
            lives.live(lives.recipe_for(corpus), tmp_path / "run")
    assert lives.go_on(tmp_path / "run")
    lives.assert_same_life(tmp_path / "run", undisturbed)
    told, expected = read_summary(tmp_path / "run"), read_summary(undisturbed)
    assert told["Validation loss"] == expected["Validation loss"]  # seen before the kill, or again
    assert told.keys() == expected.keys()


# Disks


@pytest.fixture
def stopped(corpus: Path, tmp_path: Path) -> Path:
    """A run interrupted at step 10."""
    lives.live_until(lives.recipe_for(corpus), tmp_path / "run", 10)
    return tmp_path / "run"


def test_a_state_that_cannot_be_written(home: Path, stopped: Path, undisturbed: Path) -> None:
    good = (lives.last_checkpoint(stopped) / "state.pt").read_bytes()
    small = len(good) // 2

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, small))

    done = lives.run_command(home, "train", "--resume", "--run", stopped, preexec_fn=no_large_files)
    assert done.returncode == 1
    assert done.stderr.startswith("qiusuo: ")
    assert "Traceback" not in done.stderr
    assert "step-00000016" in done.stderr
    assert lives.state_of(stopped) == "failed"
    names = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000010"]
    assert (lives.last_checkpoint(stopped) / "state.pt").read_bytes() == good
    assert lives.go_on(stopped)
    lives.assert_same_life(stopped, undisturbed)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    mount, path = shutil.which("mount"), tmp_path / "disk"
    path.mkdir()
    words = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if mount is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs here; see the limit on files above")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk(home: Path, corpus: Path, undisturbed: Path, tiny_disk: Path) -> None:
    run, ballast = tiny_disk / "run", tiny_disk / "ballast"
    lives.live_until(lives.recipe_for(corpus), run, 10)
    good = (lives.last_checkpoint(run) / "state.pt").read_bytes()
    free = shutil.disk_usage(tiny_disk).free
    ballast.write_bytes(bytes(free - len(good) // 2))
    done = lives.run_command(home, "train", "--resume", "--run", run)
    assert done.returncode == 1
    assert done.stderr.startswith("qiusuo: the disk is full: could not write")
    assert "the last good checkpoint, step-00000010, is intact" in done.stderr
    assert done.stderr.count("\n") == 1
    assert lives.state_of(run) == "failed"
    assert (lives.last_checkpoint(run) / "state.pt").read_bytes() == good
    ballast.unlink()
    assert lives.go_on(run)
    lives.assert_same_life(run, undisturbed)


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_checkpoint_cut_short_is_named(stopped: Path, size: int) -> None:
    file = lives.last_checkpoint(stopped) / "state.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=r"step-00000010/state\.pt cannot be read"):
        lives.go_on(stopped)
    assert lives.state_of(stopped) == "failed"
    file.write_bytes(b"not a state at all")
    with pytest.raises(CheckpointError, match=r"step-00000010/state\.pt cannot be read"):
        lives.go_on(stopped)
    file.write_bytes(whole)
    assert lives.go_on(stopped)


# One writer, and an end


def test_a_second_process_is_refused(home: Path, stopped: Path, corpus: Path) -> None:
    before = (stopped / "log.jsonl").read_bytes()
    _, run = resume_run(stopped)
    with run:
        done = lives.run_command(home, "train", "--resume", "--run", stopped)
        assert done.returncode == 1
        assert done.stderr.startswith(f"qiusuo: {stopped} is in use by process ")
        assert done.stderr.count("\n") == 1
        with pytest.raises(RunError, match="is in use by process"):
            lives.live(lives.recipe_for(corpus), stopped)
    assert (stopped / "log.jsonl").read_bytes() == before


def test_a_new_run_does_not_replace_an_old_one(corpus: Path, stopped: Path) -> None:
    with pytest.raises(RunError, match="already holds a run; resume it or choose another folder"):
        lives.live(lives.recipe_for(corpus), stopped)
    assert lives.state_of(stopped) == "interrupted"


def test_resuming_a_finished_run_changes_nothing(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    lasting = [p for p in run.rglob("*") if p.is_file() and p.name != "environment.json"]
    before = {path: path.read_bytes() for path in lasting}
    assert lives.go_on(run)
    assert "is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    # Even one whose checkpoints were thrown away, to save room, is not trained anew.
    shutil.rmtree(run / "checkpoints")
    assert lives.go_on(run)
    assert (run / "log.jsonl").read_bytes() == before[run / "log.jsonl"]


def test_a_changed_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    """The loader's place in other text would mean nothing."""
    mine = tmp_path / "mine.jsonl"
    shutil.copy(corpus, mine)
    table = lives.recipe_table(mine) | {"name": "mine"}
    recipe = lives.parse_recipe(table)
    lives.live_until(recipe, tmp_path / "run", 10)
    lives.write_corpus(mine, 200)
    with pytest.raises(Exception, match=r"resume with the same data|size mismatch"):
        lives.go_on(tmp_path / "run")
    assert lives.state_of(tmp_path / "run") == "failed"
    shutil.copy(corpus, mine)
    assert lives.go_on(tmp_path / "run")
