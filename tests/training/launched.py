"""Work for processes that tests launch: they meet as a training's do, and one waits for ever."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from qiusuo.training.parallel.worker import BEREFT, SAID, STOPPED


def main() -> None:
    """Launch, and say what came of it. Words of the command: how many, which work, a folder."""
    from qiusuo.training.parallel.launch import LaunchError, launch  # torch, which few workers need

    def tell(death: str, restart: int) -> None:
        print(f"{death}; restart {restart}", flush=True)

    count, work, folder = sys.argv[1:]
    try:
        print(launch(int(count), globals()[work], Path(folder), tell=tell), flush=True)
    except LaunchError as error:
        print(error, flush=True)


def note(folder: Path) -> None:
    """Say that this process is there, and who it is."""
    rank = os.environ["RANK"]
    (folder / f".{rank}").write_text(str(os.getpid()))
    (folder / f".{rank}").rename(folder / f"{rank}-{os.environ['TORCHELASTIC_RESTART_COUNT']}")


def stuck(folder: Path) -> int:
    """Once started anew all is well. Before, the first waits in a collective for the second,
    which is stopped and keeps its connections, and the third may die: what none of them will notice
    by itself."""
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]):
        note(folder)
        return 0
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, lambda number, frame: None)  # a wish, between two steps
    dist.init_process_group("gloo")
    dist.barrier()
    note(folder)
    if os.environ["RANK"] == "0":
        dist.recv(torch.zeros(1), src=1)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)
    return 0


def crash(folder: Path) -> int:
    """The second dies whenever it is started; the first is sooner gone because of it."""
    if os.environ["RANK"] == "0":
        note(folder)
        sys.exit(BEREFT)
    while not (folder / f"0-{os.environ['TORCHELASTIC_RESTART_COUNT']}").exists():
        time.sleep(0.01)
    time.sleep(0.3)  # three looks of the launcher
    os.abort()


def answer(folder: Path) -> int:
    return SAID if os.environ["RANK"] == "1" else 0


def obey(folder: Path) -> int:
    """Stops in good order, however often it is told to."""
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    note(folder)
    while not asked:
        time.sleep(0.01)
    return STOPPED


def idle(folder: Path) -> int:
    """Does not listen yet."""
    note(folder)
    time.sleep(1000)
    return 0
