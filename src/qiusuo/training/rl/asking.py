"""A batch of answers: which problems are asked, how often, and what stands in for the useless ones.

All of it is a function of the weights, the questions' places and the step. So it does not matter
which process asks, this one or the one that samples ahead (ahead.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from qiusuo.engine.language_model import LanguageModel
from qiusuo.evaluation.asking import Asker
from qiusuo.tasks.task import Problem, Verdict
from qiusuo.training.rl.policy_presets import Preset
from qiusuo.training.rl.questions import Question, Questions
from qiusuo.training.rl.rollouts import Group, Rollout, roll_out
from qiusuo.training.seeds import seed_of
from qiusuo.training.stages import RlStage


class Batch(NamedTuple):
    """All groups that were asked; ``refills``: how often more were drawn."""

    groups: list[Group]
    refills: int


class Asking:
    """``replay``: keep the experts that were chosen."""

    def __init__(
        self,
        stage: RlStage,
        preset: Preset,
        asker: Asker,
        questions: Questions,
        seed: int,
        replay: bool,
    ) -> None:
        self.stage, self.preset, self.asker = stage, preset, asker
        self.questions, self.seed, self.replay = questions, seed, replay

    def batch(self, lm: LanguageModel, step: int, version: int) -> Batch:
        """Groups of answers for the stage's ``step`` (from 0): enough that teach something, where
        they are refilled. The questions move on. ``version``: of the weights."""
        stage, preset = self.stage, self.preset
        most = stage.most_prompts or 2 * stage.prompts
        asked: list[Group] = []
        rounds, missing = 0, stage.prompts
        while missing > 0:
            asked += roll_out(
                lm,
                self.asker,
                self.questions.take(min(missing, most - len(asked))),
                group=preset.group_size,
                max_tokens=stage.max_tokens,
                temperature=stage.temperature,
                seed=seed_of(f"{self.seed}/{step}/{rounds}"),
                keep_experts=self.replay,
                version=version,
            )
            rounds += 1
            if preset.same_groups != "refill" or len(asked) >= most:
                break
            missing = stage.prompts - sum(0 < group.passed < 1 for group in asked)
        return Batch(asked, rounds - 1)


# -- batches as a checkpoint and a pipe take them ------------------------------------------------


def packed(batch: Batch) -> dict[str, Any]:
    """The batch as numbers, texts and one tensor."""
    rollouts = [one for group in batch.groups for one in group.rollouts]
    chosen = [one.experts for one in rollouts if one.experts is not None]
    return {
        "refills": batch.refills,
        "groups": [_packed_group(group) for group in batch.groups],
        "experts": torch.cat(chosen) if chosen else None,
    }


def unpacked(plain: dict[str, Any], questions: Questions) -> Batch:
    """The batch again; ``questions`` have its tasks."""
    lengths = [one["routed"] for group in plain["groups"] for one in group["rollouts"]]
    experts = plain["experts"]
    parts = iter([None] * len(lengths) if experts is None else experts.split(lengths))
    groups = []
    for group in plain["groups"]:
        task = questions.streams[group["entry"]].task
        question = Question(Problem(**group["problem"]), task, group["entry"])
        rollouts = []
        for saved in group["rollouts"]:
            fields = {key: value for key, value in saved.items() if key != "routed"}
            fields |= {"verdict": Verdict(**saved["verdict"]), "experts": next(parts)}
            rollouts.append(Rollout(**fields))
        groups.append(Group(question, rollouts))
    return Batch(groups, plain["refills"])


def _packed_group(group: Group) -> dict[str, Any]:
    problem = vars(group.question.problem)
    rollouts = []
    for one in group.rollouts:
        verdict = vars(one.verdict) | {"measures": dict(one.verdict.measures)}
        routed = 0 if one.experts is None else len(one.experts)
        plain = {key: value for key, value in vars(one).items() if key != "experts"}
        rollouts.append(plain | {"verdict": verdict, "routed": routed})
    return {
        "entry": group.question.entry,
        "problem": problem | {"data": dict(problem["data"])},
        "rollouts": rollouts,
    }
