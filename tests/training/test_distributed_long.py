"""More processes, more machines, and more ways to stop them than ``test_distributed.py`` has time
for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training import lives, processes, tasks

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("no_pictures")]


def finish(process: subprocess.Popen[str], *codes: int) -> str:
    code, out, err = processes.ended(process)
    assert code in (codes or (0,)), err
    return out


def test_four_then_two_then_four(
    home: Path, recipe_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = processes.train(home, 4, recipe_file, "--run", run)
    for step, count in ((6, 2), (14, 4)):
        processes.wait_for_step(process, run, step)
        process.send_signal(signal.SIGTERM)
        finish(process, 130)
        process = processes.train(home, count, "--resume", "--run", run)
    finish(process)
    processes.assert_parity(run, undisturbed)


def test_the_first_process_is_killed_twice(
    home: Path, recipe_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = processes.train(home, 2, recipe_file, "--run", run)
    for step in (3, 20):
        processes.wait_for_step(process, run, step)
        os.kill(processes.workers(process)[0], signal.SIGKILL)
    finish(process)
    assert len(processes.told(run, "event")) == 2
    processes.assert_parity(run, undisturbed)


def test_torchrun_is_stopped_and_goes_on(
    home: Path, recipe_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, two = tmp_path / "run", ["--nproc-per-node", "2"]
    process = processes.torchrun(home, two, recipe_file, "--run", run)
    processes.wait_for_step(process, run, 5)
    process.send_signal(signal.SIGTERM)
    processes.ended(process)
    assert lives.state_of(run) == "interrupted"
    out = finish(processes.torchrun(home, two, "--resume", "--run", run))
    assert out.count("Run folder") == 1
    processes.assert_parity(run, undisturbed)


def test_fine_tuning_with_gaps_and_odd_micro_batches(home: Path, tmp_path: Path) -> None:
    """12 rows: one process cuts them 4, 4, 4, two cut theirs 4, 2 each."""
    stage = tasks.sft(steps=20, precision="float32", position_gaps=0.7)
    stage |= {"batch_size": 12, "micro_batch_size": 4}
    recipe = tasks.recipe(stage)
    assert lives.live(recipe, tmp_path / "alone")
    file = lives.write_recipe(tmp_path / "sft.toml", recipe.model_dump(mode="json"))
    finish(processes.train(home, 2, file, "--run", tmp_path / "run"))
    processes.assert_parity(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("count", [2, 4])
def test_expert_parallel(
    home: Path, recipe_file: Path, undisturbed: Path, tmp_path: Path, count: int
) -> None:
    """Interrupted, and gone on with as plain data parallel: a state is the same for both."""
    run = tmp_path / "run"
    process = processes.train(home, count, recipe_file, "--run", run, "--expert-parallel")
    processes.wait_for_step(process, run, 14)
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    for record in processes.told(run, "step"):  # an even load is what is foretold
        foretold = record["communication_bytes_modelled"]
        assert record["communication_bytes"] == pytest.approx(foretold, rel=0.1)
    finish(processes.train(home, 2, "--resume", "--run", run))
    processes.assert_parity(run, undisturbed)


def test_a_full_disk_is_said_once_and_costs_no_checkpoint(
    home: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(words, check=False).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        run, ballast = disk / "run", disk / "ballast"
        lives.live_until(lives.recipe_for(corpus), run, 10)
        state = (lives.last_checkpoint(run) / "state.pt").stat().st_size
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - state // 2))
        process = processes.train(home, 2, "--resume", "--run", run)
        code, _, err = processes.ended(process)
        assert code == 1, err
        assert err.startswith("qiusuo: the disk is full: could not write"), err
        assert err.count("\n") == 1, err
        assert lives.last_checkpoint(run).name == "step-00000010"
        ballast.unlink()
        finish(processes.train(home, 2, "--resume", "--run", run))
        processes.assert_parity(run, undisturbed)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    ip = shutil.which("ip")
    if ip is None:
        pytest.skip("there is no `ip` (iproute2) to make network namespaces with")
    names = [f"qiusuo-{os.getpid()}-{number}" for number in (1, 2)]

    def call(*words: str) -> None:
        subprocess.run([ip, *words], check=True, capture_output=True)

    try:
        call("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not make network namespaces here: {error.stderr.decode().strip()}")
    try:
        call("netns", "add", names[1])
        ends = ["veth1", "netns", names[0], "type", "veth", "peer", "name", "veth2"]
        call("link", "add", *ends, "netns", names[1])
        for number, name in enumerate(names, 1):
            call("-n", name, "link", "set", "lo", "up")
            call("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", f"veth{number}")
            call("-n", name, "link", "set", f"veth{number}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], check=False, capture_output=True)


def test_two_hosts(
    home: Path, recipe_file: Path, undisturbed: Path, tmp_path: Path, hosts: list[str]
) -> None:
    """Two processes with nothing but a cable and the run folder in common."""
    run = tmp_path / "run"
    started = []
    for number, name in enumerate(hosts, 1):
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        options += ["--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "test"]
        options += ["--local-addr", f"10.77.0.{number}", "--rdzv-conf", f"is_host={number == 1}"]
        words = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        words += [*options, "-m", "--", "qiusuo", "train", str(recipe_file), "--run", str(run)]
        environment = lives.environment(home) | {"GLOO_SOCKET_IFNAME": f"veth{number}"}
        started.append(processes.started(words, environment))
    outs = [finish(process) for process in started]
    assert sum(out.count("Run folder") for out in outs) == 1
    processes.assert_parity(run, undisturbed)
    sent = sum(record["communication_bytes"] for record in processes.told(run, "step"))
    on_the_wire = sum(bytes_sent(name, f"veth{number}") for number, name in enumerate(hosts, 1))
    assert sent < on_the_wire  # which carries headers, looks, checkpoints and meetings too


def bytes_sent(name: str, device: str) -> int:
    path = f"/sys/class/net/{device}/statistics/tx_bytes"
    words = ["ip", "netns", "exec", name, "cat", path]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
