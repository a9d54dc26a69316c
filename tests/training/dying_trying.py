"""A program, not a test: lives recipes with tasks and is killed on the way, as dying.py does it.

Arguments: a model to begin from, folder for the runs. Runs are named RECIPE-WAY.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qiusuo.training import finish
from qiusuo.training.life import StageLife
from qiusuo.training.recipe import Recipe
from tests.training import lives, tasks
from tests.training.dying import die

RECIPES: dict[str, Callable[[Path], Recipe]] = {"rl": tasks.eventful_rl, "chain": tasks.chain}
# By recipe and way: dead as soon as the log has this kind of record of this step (the number says
# which of them), or before this checkpoint gets its name.
RECORDED: dict[str, tuple[str, int]] = {
    "rl-before-any-step": ("validation", 0),
    "rl-before-any-checkpoint": ("step", 1),
    "rl-after-the-rollouts": ("rollout", 4),
    "rl-after-the-update": ("step", 5),
    "rl-reference-renewed": ("step", 7),
    "chain-first-stage-looked": ("validation", 3),
    "chain-trying": ("rollout", 6),
    "chain-sampling": ("rollout", 9),
    "chain-refining": ("step", 11),
}
UNNAMED: dict[str, int] = {"rl-checkpoint": 6, "chain-end-of-sampling": 9}
# Dead behind a stage's last checkpoint, before its look.
UNSEEN: dict[str, int] = {"chain-before-the-look-at-rl": 6}
WAYS = (*RECORDED, *UNNAMED, *UNSEEN)


def prepare_to_die(way: str) -> None:
    if way in RECORDED:
        note = StageLife.note

        def note_and_die(self: Any, record: dict[str, Any]) -> None:
            note(self, record)
            if (record["kind"], record.get("step")) == RECORDED[way]:
                die()

        StageLife.note = note_and_die
    elif way in UNSEEN:
        look = StageLife.look

        def die_and_look(self: Any, whole: bool, when: str | None = None) -> None:
            if when == "after" and self.state.run_step == UNSEEN[way]:
                die()
            look(self, whole, when)

        StageLife.look = die_and_look
    else:
        draft = f".partial-step-{UNNAMED[way]:08d}"

        def hook(name: str, args: tuple[object, ...]) -> None:
            if name == "os.rename" and any(draft in str(arg) for arg in args):
                die()

        sys.addaudithook(hook)


def main(base: Path, folder: Path) -> None:
    finish.write_report = lambda path: path  # takes longer to draw than these to live
    for name, recipe_for in RECIPES.items():
        recipe = recipe_for(base)
        lives.live(recipe, folder / f"{name}-whole")
        for way in WAYS:
            if not way.startswith(name):
                continue
            if os.fork() == 0:
                prepare_to_die(way)
                lives.live(recipe, folder / way)
                os._exit(0)
            _, status = os.wait()
            print(way, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
