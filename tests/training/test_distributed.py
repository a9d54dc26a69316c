"""One training in several processes is the training of one: the same losses, whatever stops it.

The processes are real ones, on one machine, and here two, so that it takes seconds;
``test_distributed_long.py`` has more of them, and machines.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qiusuo
from qiusuo.checkpoint.training_state import SHARDS, load_state
from qiusuo.runs.folder import RunFolder
from tests.training import lives, processes

SAVED_EVERY = 8  # steps, of the tiny recipe


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def bereaved(home: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two processes, one of which was killed on the way."""
    run = tmp_path_factory.mktemp("runs") / "bereaved"
    process = processes.train(home, 2, recipe_file, "--run", run)
    processes.wait_for_step(process, run, 13)
    before = lives.steps_done(run)[-1]
    os.kill(processes.workers(process)[1], signal.SIGKILL)
    code, out, err = processes.ended(process)
    assert (code, err) == (0, "")
    assert out.count("process 1 of 2 died (signal 9, Killed); all go on from ") == 1
    assert out.count(" (restart 1 of 3)") == 1
    assert out.count(f"Run folder   {run}") == 1
    [event] = processes.told(run, "event")
    assert event["text"] == "a process died; all were started again (restart 1)"
    log = (run / "log.jsonl").read_text(encoding="utf-8")
    at = log[: log.index("a process died")].count('"kind": "step"')
    assert before - SAVED_EVERY < at + 1  # what was lost: the log was cut back to what was saved
    return run


def test_a_killed_process_costs_a_few_steps_and_no_digit(bereaved: Path, undisturbed: Path) -> None:
    processes.assert_parity(bereaved, undisturbed)
    assert lives.steps_done(bereaved) == list(range(1, lives.STEPS + 1))
    assert lives.state_of(bereaved) == "finished"


def test_the_model_is_laid_out_as_that_of_one_process(bereaved: Path, undisturbed: Path) -> None:
    for folder in ("model", "tokenizer"):
        mine, theirs = (
            {p.name for p in (run / folder).iterdir()} for run in (bereaved, undisturbed)
        )
        assert mine == theirs
    mine, theirs = (load_file(run / "model/model.safetensors") for run in (bereaved, undisturbed))
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-4, msg=name)
    assert lives.samples(bereaved) == lives.samples(undisturbed)
    assert qiusuo.load(str(bereaved)).generate(["the"], max_tokens=3)
    for name in ("summary.json", "README.md", "report.html", "status.json"):
        assert (bereaved / name).is_file()


def test_what_goes_over_the_wire_is_what_the_shapes_foretell(bereaved: Path) -> None:
    for record in processes.told(bereaved, "step"):
        assert record["communication_bytes"] == record["communication_bytes_modelled"]
    # Weights gathered twice and gradients scattered once a pass, in four bytes: of two processes
    # each sends half, two micro-batches are two passes; the root's weights are gathered once.
    weights = sum(t.numel() for t in load_file(bereaved / "model/model.safetensors").values())
    sent = processes.told(bereaved, "step")[0]["communication_bytes"]
    assert 2 * weights * 4 < sent / 1 < 3.5 * weights * 4


def test_a_checkpoint_of_several_is_that_of_one(bereaved: Path, undisturbed: Path) -> None:
    mine, theirs = (lives.last_checkpoint(run) for run in (bereaved, undisturbed))
    assert mine.name == theirs.name
    assert len(list((mine / SHARDS).glob("*.distcp"))) == 2
    assert_alike(load_state(mine), load_state(theirs), "")


def assert_alike(mine: Any, theirs: Any, place: str) -> None:
    """Trees of the same form, and tensors the same but for rounding."""
    assert type(mine) is type(theirs), place
    if isinstance(mine, torch.Tensor):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=place)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), place
        for key in mine.keys() - {"seconds"}:
            assert_alike(mine[key], theirs[key], f"{place}/{key}")
    elif isinstance(mine, list):
        for number, pair in enumerate(zip(mine, theirs, strict=True)):
            assert_alike(*pair, f"{place}/{number}")
    else:
        assert mine == theirs, place


def test_ctrl_c_while_all_are_started_again(home: Path, recipe_file: Path, tmp_path: Path) -> None:
    """They import what they need, and listen to nobody yet."""
    run = tmp_path / "run"
    process = processes.train(home, 2, recipe_file, "--run", run)
    processes.wait_for_step(process, run, 9)
    os.kill(processes.workers(process)[0], signal.SIGKILL)
    assert process.stdout is not None
    assert any("(restart 1 of 3)" in line for line in process.stdout)
    while len(processes.workers(process)) < 2:
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    code, out, err = processes.ended(process)
    assert (code, err) == (130, "")
    assert out.splitlines()[-1] == f"Stopped. Go on with: qiusuo train --resume --run {run}"
    status = RunFolder.open(run).status()  # the lock is free
    assert (status["state"], status["error"]) == ("interrupted", None)


@pytest.mark.long
def test_one_then_two_then_one(home: Path, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Each goes on from the other's checkpoint, after a Ctrl-C."""
    run = tmp_path / "run"
    lives.live_until(lives.recipe_for(corpus), run, 5)
    process = processes.train(home, 2, "--resume", "--run", run)
    processes.wait_for_step(process, run, 11)
    process.send_signal(signal.SIGINT)
    code, out, err = processes.ended(process)
    assert (code, err) == (130, "")
    assert f"Stopped and saved. Go on with: qiusuo train --resume --run {run}" in out
    last = lives.steps_done(run)[-1]
    status = RunFolder.open(run, lock=False).status()
    assert (status["state"], status["step"]) == ("interrupted", last)
    assert lives.last_checkpoint(run).name == f"step-{last:08d}"
    assert not list((run / "checkpoints").glob(".*"))
    assert lives.go_on(run)
    processes.assert_parity(run, undisturbed)


def test_what_cannot_work_is_refused_before_processes_are_started(
    home: Path, corpus: Path, tmp_path: Path
) -> None:
    table = lives.recipe_table(corpus, batch_size=7, micro_batch_size=7)
    recipe = lives.write_recipe(tmp_path / "odd.toml", table)
    done = lives.run_command(home, "train", recipe, "--run", tmp_path / "run", "--nproc", "2")
    assert done.returncode == 1
    assert done.stderr == (
        "qiusuo: stage pretrain: 2 processes cannot share batch_size 7 evenly: make it a multiple "
        "of 2\n"
    )
    assert not (tmp_path / "run").exists()
