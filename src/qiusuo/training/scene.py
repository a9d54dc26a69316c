"""What a stage is given to work with, and what it must be able to do.

The life of a stage (life.py) is the same for all kinds: steps, looks, checkpoints, a stop at any
moment. What a step is, is the kind's own (pretrain.py, sft.py, rl/reinforce.py, sample.py ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.evaluation.asking import Asker
from qiusuo.model.transformer import Transformer
from qiusuo.runs.folder import RunFolder
from qiusuo.training.lora import LoRA
from qiusuo.training.parallel.world import ALONE, World
from qiusuo.training.recipe import Recipe
from qiusuo.training.stages import Stage
from qiusuo.training.state import StageState

Record = Callable[[dict[str, Any]], None]
S = TypeVar("S", bound="Stage")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


@dataclass(frozen=True)
class Scene(Generic[S]):
    """``model`` has its weights, those that the stage begins with or the checkpoint's; ``record``
    takes one dict in the log's form. Of several processes each has its part of the weights."""

    recipe: Recipe
    stage: S
    run: RunFolder
    tokenizer: Tokenizer
    model: Transformer
    adapter: LoRA | None
    record: Record
    world: World = ALONE

    @property
    def asker(self) -> Asker:
        """How problems are put to this run's model."""
        ask = self.recipe.ask
        return Asker(self.tokenizer, ask.text, ask.thinking, ask.system)

    def traces_path(self, stage: str) -> Path:
        """Where a ``sample`` stage leaves what it kept."""
        return self.run.path / "traces" / f"{stage}.jsonl"

    def distributions_path(self, stage: str) -> Path:
        """Where a ``teach`` stage leaves what its teacher said."""
        return self.run.path / "distributions" / stage


class StageWork(Protocol):
    """One stage at work. Between two steps ``state`` is all there is to know of it."""

    state: StageState

    def run(self, after_step: Callable[[], bool]) -> None:
        """Step to the stage's end; stop early, between steps, where ``after_step`` says true."""
        ...

    def look(self, whole: bool) -> Iterator[dict[str, Any]]:
        """What there is to measure beside the tasks every stage is asked: "validation" records
        without their step. ``whole``: at the stage's end, when there is time for all of it."""
        ...

    def close(self) -> None:
        """Give up what outlives a step: processes, files."""
        ...
