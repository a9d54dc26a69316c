"""The stage ``merge``: the weighted average of several models becomes the one in training.

Specialists that branched from one model and trained apart stay close enough to it for the middle
between them to be a model again, often one that can do what each of them can (model soups,
arXiv:2203.05482). Models that began apart have no such middle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qiusuo.training.named_models import named_model, same_vocabulary
from qiusuo.training.recipe import RecipeError
from qiusuo.training.scene import Scene
from qiusuo.training.stages import MergeStage
from qiusuo.training.state import StageState


class Merging:
    """One step, without an optimizer. Nothing is remembered between two."""

    def __init__(self, scene: Scene[MergeStage]) -> None:
        self.scene, self.stage = scene, scene.stage
        if scene.adapter is not None:
            raise RecipeError(
                f"stage {self.stage.name}: the average of two adapters' thin matrices is not the "
                "adapter between them: merge in a recipe without [adapter]"
            )
        self.state = StageState(scene.model, [], self, self.stage.name, 1)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return

    def look(self, whole: bool) -> Iterator[dict[str, Any]]:
        return iter(())

    def close(self) -> None:
        return

    def run(self, after_step: Callable[[], bool]) -> None:
        state = self.state
        if state.step == state.planned:
            return
        start = time.perf_counter()
        self.merge()
        state.step += 1
        state.run_step += 1
        state.seconds += time.perf_counter() - start
        named = ", ".join(f"{one.model} × {one.weight:g}" for one in self.stage.models)
        self.scene.record(
            {"kind": "event", "step": state.run_step, "text": f"{self.stage.name}: {named}"}
        )
        after_step()

    @torch.no_grad()
    def merge(self) -> None:
        """Summed in float64, one model in memory beside the sum; nothing is changed before all
        of them are known to fit."""
        total = sum(one.weight for one in self.stage.models)
        own = self.scene.model.state_dict()
        sums = {name: torch.zeros_like(held, dtype=torch.float64) for name, held in own.items()}
        for one in self.stage.models:
            found = named_model(self.scene, one.model, torch.float32)
            same_vocabulary(self.scene, found, one.model)
            theirs = found.model.state_dict()
            self.check(own, theirs, one.model)
            for name, held in theirs.items():
                sums[name] += held.double() * (one.weight / total)
        self.scene.model.load_state_dict({n: s.to(own[n].dtype) for n, s in sums.items()})

    def check(self, own: dict[str, Tensor], theirs: dict[str, Tensor], model: str) -> None:
        for name in own.keys() | theirs.keys():
            mine = list(own[name].shape) if name in own else "nothing"
            other = list(theirs[name].shape) if name in theirs else "nothing"
            if mine != other:
                raise RecipeError(
                    f"stage {self.stage.name}: {name} is {other} in {model} and {mine} in the "
                    "model in training: only models of one architecture have an average"
                )
