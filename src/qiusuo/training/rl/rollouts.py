"""Rollouts: answers that the policy tried, what they were paid, and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qiusuo.engine.asking import Completion
from qiusuo.engine.language_model import LanguageModel
from qiusuo.evaluation.asking import Asker
from qiusuo.tasks.task import Verdict
from qiusuo.training.rl.questions import Question
from qiusuo.training.scene import TrainingError


@dataclass(frozen=True)
class Rollout:
    """One answer. ``logprobs`` as the engine drew them, under the model itself; ``experts`` of
    prompt and answer but for the last token; ``finished``: it ended by itself."""

    prompt: list[int]
    answer: list[int]
    logprobs: list[float]
    experts: Tensor | None
    version: int
    finished: bool
    response: str
    verdict: Verdict


@dataclass(frozen=True)
class Group:
    """All answers to one question."""

    question: Question
    rollouts: list[Rollout]

    @property
    def passed(self) -> float:
        """Share that the verifier found right."""
        return sum(one.verdict.reward for one in self.rollouts) / len(self.rollouts)


def roll_out(
    lm: LanguageModel,
    asker: Asker,
    questions: Sequence[Question],
    *,
    group: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    keep_experts: bool,
    version: int,
) -> list[Group]:
    """Answer every question ``group`` times, all of them side by side, and judge the answers.
    ``version``: of the weights, a number that a resumed run gives them too (the engine's own begins
    anew with every process)."""
    prompts = [asker.prompt_ids(question.problem) for question in questions]
    end = asker.tokenizer.eos_id
    completions = lm.generate(
        prompts,
        n=group,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        keep_experts=keep_experts,
        stop_ids=frozenset() if end is None else frozenset({end}),
    )
    groups = []
    for row, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        told = completions[row * group : (row + 1) * group]
        rollouts = [_judged(question, prompt, one, asker, version) for one in told]
        groups.append(Group(question, rollouts))
    return groups


def _judged(
    question: Question, prompt: list[int], told: Completion, asker: Asker, version: int
) -> Rollout:
    if told.error is not None:
        raise TrainingError(f"a rollout failed: {told.error}")
    finished = told.finish_reason == "stop"
    words = told.token_ids[:-1] if finished else told.token_ids
    response = asker.response(asker.tokenizer.decode(words))
    return Rollout(
        prompt,
        told.token_ids,
        told.logprobs,
        told.experts,
        version,
        finished,
        response,
        question.task.verify(question.problem, response),
    )


def kept_record(
    rollout: Rollout, question: Question, asker: Asker, reward: float, advantage: float
) -> dict[str, Any]:
    """A line of the run's rollouts.jsonl. ``reward``: what was paid, all in all."""
    problem, verdict = question.problem, rollout.verdict
    return {
        "task": problem.task,
        "difficulty": problem.difficulty,
        "prompt": asker.text(problem),
        "response": rollout.response,
        "reward": reward,
        "right": verdict.reward == 1,
        "answer": verdict.answer,
        "reason": verdict.reason,
        "tokens": len(rollout.answer),
        "advantage": advantage,
        "version": rollout.version,
        "measures": dict(verdict.measures),
    }
