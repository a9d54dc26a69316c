"""The stage ``sft``: imitate answers, counting what the assistant says and nothing else.

Answers come from files of messages, from the solutions of a task, or from what the model itself
got right (rejection sampling). Whole examples share a row and neither see nor predict each other;
the multi-token prediction modules go on learning.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

from qiusuo.data.dialogues import read_dialogues
from qiusuo.data.example_loader import ExampleLoader
from qiusuo.data.examples import Example, ExampleSource
from qiusuo.evaluation.asking import Asker
from qiusuo.tasks.task import SplitName
from qiusuo.training.beginning import stage_state
from qiusuo.training.given_tasks import problem_at, task_of
from qiusuo.training.recipe import RecipeError
from qiusuo.training.scene import Scene
from qiusuo.training.sections import TaskEntry
from qiusuo.training.seeds import seed_of
from qiusuo.training.stages import SftSource, SftStage
from qiusuo.training.supervised import SupervisedSteps


class Finetuning(SupervisedSteps):
    stage: SftStage

    def __init__(self, scene: Scene[SftStage]) -> None:
        stage = scene.stage
        feed = ExampleLoader(
            [(source_of(scene, source), source.weight) for source in stage.sources],
            batch_size=stage.batch_size,
            sequence_length=stage.sequence_length,
            lookahead=scene.model.config.num_nextn_predict_layers,
            seed=scene.recipe.seed,
            pad_id=scene.tokenizer.pad_id or 0,
        )
        state = stage_state(scene, feed)
        super().__init__(stage, state, scene.record, True, scene.recipe.seed)


def source_of(scene: Scene[Any], source: SftSource) -> ExampleSource:
    """The examples that a recipe names. DataError or RecipeError where there are none."""
    if source.task is not None:
        seed = seed_of(f"{scene.recipe.seed}/{scene.stage.name}")  # another stage, other problems
        return Solutions(source.task, scene.asker, source.thought_share, seed)
    if source.file is not None:
        return read_dialogues(source.file, scene.tokenizer)
    path = scene.traces_path(source.traces or "")
    if not path.is_file() or not path.stat().st_size:
        raise RecipeError(
            f"stage {scene.stage.name}: stage {source.traces} kept nothing: give it more count or "
            "answers, easier problems, or trace_valid = false"
        )
    return read_dialogues(path, scene.tokenizer)


class Solutions:
    """A task's problems with their solutions, without end: example i is a function of i."""

    length = None

    def __init__(
        self,
        entry: TaskEntry,
        asker: Asker,
        thought_share: float,
        seed: int,
        split: SplitName = "train",
    ) -> None:
        self.entry, self.asker, self.thought_share, self.seed = entry, asker, thought_share, seed
        self.split: SplitName = split
        self.task = task_of(entry)
        settings: list[Any] = [entry.model_dump(), thought_share, seed, asker.ask, asker.thinking]
        settings += [asker.system, asker.tokenizer.fingerprint]
        self.fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def example(self, index: int) -> Example:
        problem = problem_at(self.entry, self.split, self.seed, index)
        chance = random.Random(f"solution/{self.seed}/{index}")
        thought = chance.random() < self.thought_share
        response = self.task.solution(problem, chance, thought=thought)
        prompt, answer = self.asker.prompt_ids(problem), self.asker.answer_ids(response)
        counted = [False] * len(prompt) + [True] * len(answer)
        return Example(prompt + answer, counted)
