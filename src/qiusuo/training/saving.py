"""Checkpoints while training goes on.

One process writes its state and goes on when it is on the disk. Several begin to write, each its
part, and go on at once from copies; the checkpoint gets its name, as ever in one rename, after the
last of them has written its last byte. Until then the one before is the last whole one, so a
process that dies costs at most ``checkpoint_steps`` and the steps taken during that writing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qiusuo.checkpoint.training_state import save_shards, save_state, wait_for
from qiusuo.runs.folder import RunFolder
from qiusuo.training.parallel.world import PATIENCE, World
from qiusuo.training.state import StageState


class Saver:
    """``kept``: steps whose checkpoints later stages still need."""

    def __init__(self, run: RunFolder, world: World, kept: Callable[[], Collection[int]]) -> None:
        self.run, self.world, self.kept = run, world, kept
        self.writing: Future[Any] | None = None
        self.draft = ExitStack()  # the leader's folder that has no name yet
        if world.size > 1:  # of its own: it is used while training uses the others
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def save(self, state: StageState) -> None:
        """Write a checkpoint of this moment, or begin to."""
        if self.world.size == 1:
            with self.run.new_checkpoint(state.run_step) as folder:
                save_state(folder, state.content())
            self.run.prune(keep=2, protect=self.kept())
            return
        self.settle()
        path = ""
        with self.world.together():
            if self.world.leads:
                path = str(self.draft.enter_context(self.run.new_checkpoint(state.run_step)))
        folder = Path(self.world.first(path))
        with self.draft.pop_all() as draft:  # whatever goes wrong from here on, it is cleared away
            with self.world.together():
                self.writing = save_shards(folder, state.content(), self.group, self.world.leads)
            self.draft = draft.pop_all()

    def look(self) -> None:
        """Give a checkpoint its name if it is whole by now. The first process is told of the
        others' last bytes before its own writing counts as done, so it alone can say. A failure
        waits for ``settle``, where all meet it."""
        writing = self.writing
        if self.world.leads and writing is not None and writing.done() and not writing.exception():
            self._finish()

    def settle(self) -> None:
        """Wait for what is being written; RunError or the writer's own error where it failed. To be
        called by all processes together."""
        if self.world.size > 1:
            with self.world.together():
                self._finish()

    def _finish(self) -> None:
        writing, self.writing = self.writing, None
        with self.draft.pop_all():
            if writing is not None:
                wait_for(writing)
        if writing is not None:
            self.run.prune(keep=2, protect=self.kept())
