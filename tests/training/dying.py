"""A program, not a test: lives a recipe and is killed while its checkpoint of step 16 is written.

Arguments: corpus, folder for the runs. First it lives undisturbed, in "whole"; then each way to
die forks a child that dies in a run of its own, named as the way is.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.training import lives

DRAFT = ".partial-step-00000016"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut_files() -> None:
    """From here on a file that grows beyond 100 kB kills: in the middle of writing the state."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


# By way: the file operation, a part of its path, and what happens just before it.
WAYS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "half-written": ("os.mkdir", DRAFT, cut_files),
    "written-but-not-synced": ("open", DRAFT, die),
    "not-yet-renamed": ("os.rename", DRAFT, die),
    "while-the-oldest-goes": ("os.rename", ".partial-deleted-step-00000008", die),
}


def main(corpus: Path, folder: Path) -> None:
    recipe = lives.recipe_for(corpus, **lives.OFTEN)
    lives.live(recipe, folder / "whole")
    for way, (event, part, action) in WAYS.items():
        if os.fork() == 0:

            def hook(name: str, args: tuple[object, ...]) -> None:
                if name == event and any(part in str(arg) for arg in args):  # noqa: B023
                    action()  # noqa: B023

            sys.addaudithook(hook)
            lives.live(recipe, folder / way)
            os._exit(0)
        _, status = os.wait()
        print(way, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
