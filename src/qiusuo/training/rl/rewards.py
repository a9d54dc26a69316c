"""What an answer is paid: the verifier's 0 or 1, and what a recipe adds to it.

Additions are small and say what they are for. Format and language keep thoughts readable, as in R1
(arXiv:2501.12948 §2.2, §2.3.2); a task's guard pays for what a rule cannot see. They are never paid
in place of the verifier's reward, which pass@k and the curriculum go by.
"""

from __future__ import annotations

import random
import re
from typing import Any

from qiusuo.tasks.task import END_THINK, THINK, Guard, Problem, take_apart
from qiusuo.training.rl.questions import Questions
from qiusuo.training.rl.rollouts import Group, Rollout
from qiusuo.training.stages import RlStage

HAN = re.compile(r"[\u4e00-\u9fff]")
LATIN_WORD = re.compile(r"[A-Za-z]+")


class Rewards:
    """Rewards of groups; guards remember what was written before."""

    def __init__(self, stage: RlStage, questions: Questions, seed: int) -> None:
        self.stage, self.seed = stage, seed
        asked = stage.guard_weight > 0
        self.guards: list[Guard | None] = [
            stream.task.guard() if asked else None for stream in questions.streams
        ]

    def of(self, group: Group, number: int) -> list[float]:
        """Of each answer; ``number``: which group of the stage, for the lot."""
        guard = self.guards[group.question.entry]
        return [
            self._of_one(rollout, group.question.problem, guard, (number, place))
            for place, rollout in enumerate(group.rollouts)
        ]

    def _of_one(
        self, rollout: Rollout, problem: Problem, guard: Guard | None, lot: tuple[int, int]
    ) -> float:
        stage, reward = self.stage, rollout.verdict.reward
        if stage.random_reward:
            return float(random.Random(f"lot/{self.seed}/{lot}").random() < 0.5)
        if stage.format_weight:
            reward += stage.format_weight * well_formed(rollout)
        if stage.language_weight:
            reward += stage.language_weight * language_share(rollout.response, problem)
        if guard is not None:
            bonus = guard.judge(problem, rollout.verdict)
            reward += stage.guard_weight * bonus * rollout.verdict.reward
        return reward

    def state_dict(self) -> dict[str, Any]:
        return {"guards": [guard and guard.state_dict() for guard in self.guards]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for guard, saved in zip(self.guards, state["guards"], strict=True):
            if guard is not None:
                guard.load_state_dict(saved)


def well_formed(rollout: Rollout) -> float:
    """1.0 where the answer ended by itself and is one thought, closed, and one answer."""
    return float(rollout.finished and take_apart(rollout.response).answer is not None)


def language_share(response: str, problem: Problem) -> float:
    """Share of a response's words in the language that its problem is asked in: Han characters
    count as words (R1's language consistency). 1.0 where there are none."""
    said = response.replace(THINK, " ").replace(END_THINK, " ")  # the marks are of no language
    han, latin = len(HAN.findall(said)), len(LATIN_WORD.findall(said))
    wanted = han if problem.data.get("language") == "zh" else latin
    return wanted / (han + latin) if han + latin else 1.0
