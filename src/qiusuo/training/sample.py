"""The stage ``sample``: rejection sampling (R1 §2.3.3, arXiv:2501.12948).

The model answers training problems, and what a verifier finds right becomes data to imitate.

Kept answers lie in the run's ``traces/NAME.jsonl`` as conversations, thoughts included: the form
that ``sft`` reads, and anyone else can. Where another model answers, a teacher, learning from its
answers is R1's way to distil (§2.4). With ``pairs`` a right answer lies there beside a wrong one,
as ``dpo`` reads them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qiusuo.evaluation.asking import Asker
from qiusuo.tasks.task import END_THINK, THINK, Problem, take_apart
from qiusuo.training.named_models import named_model
from qiusuo.training.rl.questions import Questions
from qiusuo.training.rl.rollouts import Group, Rollout, roll_out
from qiusuo.training.scene import Scene
from qiusuo.training.seeds import seed_of
from qiusuo.training.speaking import Speaker, spoken_dtype
from qiusuo.training.stages import SampleStage
from qiusuo.training.state import StageState


class Sampling:
    """A step is one batch of problems."""

    def __init__(self, scene: Scene[SampleStage]) -> None:
        stage = scene.stage
        self.scene, self.stage = scene, stage
        self.seed = seed_of(f"{scene.recipe.seed}/{stage.name}")
        self.questions = Questions(stage.tasks, None, self.seed)
        self.kept = self.bytes = self.answered = 0
        steps = -(-stage.count // stage.batch)
        self.state = StageState(scene.model, [], self, stage.name, steps, adapter=scene.adapter)
        model, tokenizer, adapter = scene.model, scene.tokenizer, scene.adapter
        if stage.model is not None:  # it may read other tokens: only its words are kept
            named = named_model(scene, stage.model, torch.float32)
            model, tokenizer, adapter = named.model, named.tokenizer, None
        self.asker = dataclasses.replace(scene.asker, tokenizer=tokenizer)
        self.speaker = Speaker(
            model,
            None,
            adapter,
            spoken_dtype(model),
            answers=stage.batch * stage.answers,
            max_tokens=stage.max_tokens,
        )
        self.path = scene.traces_path(stage.name)

    def state_dict(self) -> dict[str, Any]:
        return {
            "questions": self.questions.state_dict(),
            "kept": self.kept,
            "bytes": self.bytes,
            "answered": self.answered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.questions.load_state_dict(state["questions"])
        self.kept, self.bytes, self.answered = state["kept"], state["bytes"], state["answered"]

    def look(self, whole: bool) -> Iterator[dict[str, Any]]:
        return iter(())

    def close(self) -> None:
        return

    def run(self, after_step: Callable[[], bool]) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self.bytes)  # what a killed run wrote after its last checkpoint
            file.seek(self.bytes)  # truncating moves no place, and this one is told as the length
            while self.state.step < self.state.planned:
                start = time.perf_counter()
                groups = self.ask()
                lines = [line for group in groups for line in self.lines(group)]
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())  # before a checkpoint says how long it is
                self.bytes = file.tell()
                self.kept += len(lines)
                self.answered += sum(len(group.rollouts) for group in groups)
                self.count(groups, time.perf_counter() - start)
                if after_step():
                    return

    def ask(self) -> list[Group]:
        stage = self.stage
        questions = self.questions.take(min(stage.batch, stage.count - self.questions.drawn))
        with self.speaker.speaking() as lm:
            return roll_out(
                lm,
                self.asker,
                questions,
                group=stage.answers,
                max_tokens=stage.max_tokens,
                temperature=stage.temperature,
                seed=seed_of(f"{self.seed}/{self.state.step}"),
                keep_experts=False,
                version=self.state.run_step,
            )

    def lines(self, group: Group) -> list[str]:
        """What is kept of a group's answers: the first different ones."""
        problem, asker = group.question.problem, self.asker
        asked = asker.messages(problem)
        right = dict.fromkeys(one.response for one in group.rollouts if self.is_right(one))
        kept = [said(response) for response in right][: self.stage.keep]
        if not self.stage.pairs:
            found = [{"messages": [*asked, message]} for message in kept]
        else:
            wrong = dict.fromkeys(one.response for one in group.rollouts if self.is_wrong(one))
            found = [
                {"prompt": asked, "chosen": [message], "rejected": [said(response)]}
                for message, response in zip(kept, wrong, strict=False)
            ]
        return [_line(record, problem, asker) for record in found]

    def is_right(self, one: Rollout) -> bool:
        valid = not self.stage.trace_valid or one.verdict.measures.get("trace_valid", 1) == 1
        return one.verdict.reward == 1 and valid and self.can_be_said(one)

    def is_wrong(self, one: Rollout) -> bool:
        """Wrong in what it answers; one without an answer teaches form alone."""
        answered = take_apart(one.response).answer is not None
        return one.verdict.reward == 0 and answered and self.can_be_said(one)

    def can_be_said(self, one: Rollout) -> bool:
        """Whether the conversation that is kept has the tokens that were sampled: it ends, and no
        mark other than a thought's stands in it, which would be read as text."""
        marks = self.asker.tokenizer.special_tokens.keys() - {THINK, END_THINK}
        return one.finished and not any(mark in one.response for mark in marks)

    def count(self, groups: list[Group], seconds: float) -> None:
        state = self.state
        tokens = sum(len(one.answer) for group in groups for one in group.rollouts)
        state.step += 1
        state.run_step += 1
        state.tokens += tokens
        state.seconds += seconds
        self.scene.record(
            {
                "kind": "rollout",
                "stage": self.stage.name,
                "step": state.run_step,
                "pass_at_1": sum(group.passed for group in groups) / len(groups),
                "pass_at_k": sum(group.passed > 0 for group in groups) / len(groups),
                "k": self.stage.answers,
                "length": tokens / sum(len(group.rollouts) for group in groups),
                "kept": self.kept,
                "answered": self.answered,
                "rollout_seconds": seconds,
            }
        )


def said(response: str) -> dict[str, Any]:
    """The assistant's message."""
    parts = take_apart(response)
    if parts.answer is None:
        return {"role": "assistant", "content": response, "reasoning_content": None}
    return {"role": "assistant", "content": parts.answer, "reasoning_content": parts.thought}


def _line(record: dict[str, Any], problem: Problem, asker: Asker) -> str:
    about = {"task": problem.task, "difficulty": problem.difficulty, "key": problem.key}
    told = record | {"thinking": asker.thinking} | about
    return json.dumps(told, ensure_ascii=False) + "\n"
