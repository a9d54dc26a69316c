"""A program, not a test: lives reinforcement that samples ahead and is killed on the way.

Arguments: a model to begin from, folder for the runs. Each way to die leaves the number of the
sampling process in WAY.pid; when this program goes on, that process has ended.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from qiusuo.training.recipe import Recipe
from qiusuo.training.rl.ahead import Ahead
from tests.training import lives, tasks
from tests.training.dying import die

WAYS = ("as-a-batch-begins", "checkpoint")


def recipe_for(base: Path) -> Recipe:
    """With everything that has a state."""
    recipe = tasks.eventful_rl(base)
    [stage] = recipe.stages
    return recipe.model_copy(update={"stages": (stage.model_copy(update={"lag": 1}),)})


def prepare_to_die(way: str, pid_file: Path) -> None:
    begin = Ahead.begin

    def begin_and_die(self: Ahead, step: int, version: int) -> None:
        begin(self, step, version)
        assert self.process is not None
        pid_file.write_text(str(self.process.popen.pid))
        if way == "as-a-batch-begins" and step == 4:
            die()

    def hook(name: str, args: tuple[object, ...]) -> None:
        named = name == "os.rename" and ".partial-step-00000006" in str(args)
        if way == "checkpoint" and named:
            die()

    Ahead.begin = begin_and_die
    sys.addaudithook(hook)


def wait_for_the_end(pid: int) -> None:
    """Of a process that is nobody's child any more."""
    stat = Path(f"/proc/{pid}/stat")
    while True:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return  # dead, where nobody collects the dead
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.005)


def main(base: Path, folder: Path) -> None:
    recipe = recipe_for(base)
    for way in WAYS:
        pid_file = folder / f"{way}.pid"
        if os.fork() == 0:
            prepare_to_die(way, pid_file)
            lives.live(recipe, folder / way)
            os._exit(0)
        _, status = os.wait()
        wait_for_the_end(int(pid_file.read_text()))
        print(way, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
