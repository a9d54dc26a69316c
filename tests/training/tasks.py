"""Recipes with tasks, so small that learning and trying take moments; parity of eight bits."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.tasks.parity import Parity
from qiusuo.tasks.task import Verdict
from qiusuo.training.recipe import Recipe, parse_recipe
from qiusuo.training.rl.questions import Question
from qiusuo.training.rl.reinforce import Reinforcement
from qiusuo.training.rl.rollouts import Group, Rollout
from tests.training import lives

Make = Callable[..., Reinforcement]
PARITY: dict[str, Any] = {"task": "parity", "difficulties": [8]}
MODEL: dict[str, Any] = lives.MODEL | {"hidden_size": 32}


def sft(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "sft",
        "steps": 6,
        "sequence_length": 64,
        "batch_size": 4,
        "precision": "float32",
        "checkpoint_steps": 4,
        "schedule": {"warmup_steps": 3},
        "sources": [{"task": PARITY, "thought_share": 0.5}],
        **changes,
    }


def rl(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "rl",
        "steps": 4,
        "prompts": 3,
        "group": 4,
        "max_tokens": 12,
        "precision": "float32",
        "checkpoint_steps": 2,
        "tasks": [PARITY],
        "schedule": {"warmup_steps": 0, "decay_fraction": 0.0},
        **changes,
    }


def sample(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "sample",
        "tasks": [PARITY],
        "count": 12,
        "answers": 4,
        "batch": 4,
        "max_tokens": 12,
        "trace_valid": False,
        "checkpoint_steps": 2,
        **changes,
    }


def table(*stages: dict[str, Any], base: Path | None = None, **top: Any) -> dict[str, Any]:
    start: dict[str, Any] = {"tokenizer": {"kind": "characters"}, "model": MODEL}
    if base is not None:
        start = {"base": str(base), "license": "mit"}
    whole = {"name": "tries", "save_dtype": "float32", **start, **top, "stages": list(stages)}
    return copy.deepcopy(whole)


def recipe(*stages: dict[str, Any], base: Path | None = None, **top: Any) -> Recipe:
    return parse_recipe(table(*stages, base=base, **top))


def tokenizer() -> Tokenizer:
    return Tokenizer.train_characters(["01="])


NOVEL: dict[str, Any] = {
    "task": str(Path(__file__).with_name("novel.py")),
    "difficulties": [8, 9, 10],
}


def eventful_rl(base: Path) -> Recipe:
    """Reinforcement with all that has a state: curriculum, guard, refills, a reference that is
    renewed, several updates a batch, looks; begins from ``base``."""
    stage = rl(
        steps=7,
        group=2,
        max_tokens=14,
        tasks=[NOVEL, PARITY | {"weight": 0.5}],
        curriculum={"start": 8, "rise": 0.3, "memory": 2},
        guard_weight=0.5,
        format_weight=0.1,
        loss={"kl": 0.05},
        reference_steps=3,
        updates=2,
        micro_batch_size=2,
        validation_steps=3,
        samples={"prompts": ["01"], "max_tokens": 4},
    )
    evaluation = {"tasks": [PARITY], "count": 3, "samples": 2, "max_tokens": 12}
    return recipe(stage, base=base, evaluation=evaluation)


def chain(base: Path) -> Recipe:
    """sft, rl, sample, and sft on what was sampled, from where the first one ended."""
    return recipe(
        sft(steps=3, name="teach"),
        rl(steps=3),
        sample(),
        sft(steps=3, name="refine", start_from="teach", sources=[{"traces": "sample"}]),
        base=base,
        evaluation={"tasks": [PARITY], "count": 2, "samples": 2, "max_tokens": 12},
    )


# Answers made up, where a model is of no concern


def rollout(
    reward: float = 1.0, *, tokens: int = 3, finished: bool = True, response: str = ""
) -> Rollout:
    """``reward``: the verifier's."""
    answer = "1" if reward else "0"
    verdict = Verdict(reward, answer, "right" if reward else "wrong answer", {"thought": 0.0})
    words = response or f"<think></think>{answer}"
    return Rollout([5, 6], [7] * tokens, [-0.5] * tokens, None, 0, finished, words, verdict)


def group(rewards: Sequence[float], question: Question | None = None, **how: Any) -> Group:
    return Group(question or a_question(), [rollout(reward, **how) for reward in rewards])


def a_question(difficulty: int = 8, entry: int = 0) -> Question:
    task = Parity()
    return Question(task.problem(difficulty, random.Random(3)), task, entry)
