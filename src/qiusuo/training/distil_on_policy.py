"""The stage ``distil_on_policy``: the student answers, teachers tell what they would have said.

At every token of the student's own answers the whole distribution of the student is drawn to the
teacher's: L = Σᵢ wᵢ KL(π_student ‖ π_teacherᵢ), the mean over tokens (multi-teacher on-policy
distillation, DeepSeek-V4). So the student is corrected where it goes itself, and never learns to go
on from answers that it would not give. Sampling has no gradient. Specialists are teachers of
their tasks alone. Only the teachers' hidden states are kept at a time, never their logits.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from qiusuo.kernels.distribution_match import TeacherStates, distribution_match
from qiusuo.model.transformer import Transformer
from qiusuo.training.beginning import stage_state
from qiusuo.training.example_rows import longest_first
from qiusuo.training.named_models import named_model, same_vocabulary
from qiusuo.training.rl.questions import Questions
from qiusuo.training.rl.rollouts import Group, Rollout, kept_record, roll_out
from qiusuo.training.rl.telling import told_of
from qiusuo.training.rl.update import Paid, Rows, rows_of
from qiusuo.training.scene import Scene
from qiusuo.training.seeds import seed_of
from qiusuo.training.speaking import Speaker
from qiusuo.training.stages import OnPolicyStage, TeacherSection
from qiusuo.training.steps import Learning, StepResult

# B answers of a micro-batch, R of them with a teacher, T places, N tokens of answers, M of those
# with the teacher, D student's hidden, E teacher's hidden.


@dataclass(frozen=True)
class Expert:
    """A teacher at work."""

    section: TeacherSection
    model: Transformer

    def knows(self, task: str) -> bool:
        return not self.section.tasks or task in self.section.tasks


@dataclass(frozen=True)
class Answered:
    """One answer of the student's, and the task it is about, by the recipe's name for it."""

    rollout: Rollout
    task: str


class OnPolicy(Learning):
    """A step is one batch of the student's own answers, read by every teacher that knows the task.
    The questions' places are all the state there is beside weights and optimizer."""

    stage: OnPolicyStage

    def __init__(self, scene: Scene[OnPolicyStage]) -> None:
        stage = scene.stage
        self.scene = scene
        self.seed = seed_of(f"{scene.recipe.seed}/{stage.name}")
        self.questions = Questions(stage.tasks, None, self.seed)
        super().__init__(stage, stage_state(scene, self.questions), scene.record)
        self.experts = [self.expert(section) for section in stage.teachers]
        self.speaker = Speaker(
            scene.model,
            None,
            scene.adapter,
            self.dtype,
            answers=stage.prompts * stage.answers,
            max_tokens=stage.max_tokens,
        )
        self.rollouts = scene.run.open_rollouts()

    def expert(self, section: TeacherSection) -> Expert:
        named = named_model(self.scene, section.model, self.dtype)
        same_vocabulary(self.scene, named, section.model)
        return Expert(section, named.model)

    def run(self, after_step: Callable[[], bool]) -> None:
        # Only now the state is the checkpoint's: what was written after it comes again.
        self.rollouts.truncate_after(self.state.run_step)
        super().run(after_step)

    def close(self) -> None:
        self.rollouts.close()

    # -- a step ----------------------------------------------------------------------------------

    def one_step(self) -> StepResult:
        """Ask, answer, learn from the teachers, and tell."""
        start = time.perf_counter()
        groups = self.ask()
        rolled = time.perf_counter()
        result, far = self.learn(groups)
        self.tell(groups, far, rolled - start, time.perf_counter() - rolled)
        return result

    def ask(self) -> list[Group]:
        stage = self.stage
        questions = self.questions.take(stage.prompts)
        with self.speaker.speaking() as lm:
            return roll_out(
                lm,
                self.scene.asker,
                questions,
                group=stage.answers,
                max_tokens=stage.max_tokens,
                temperature=stage.temperature,
                seed=seed_of(f"{self.seed}/{self.state.step}"),
                keep_experts=False,
                version=self.state.run_step,
            )

    def learn(self, groups: Sequence[Group]) -> tuple[StepResult, dict[int, float]]:
        """One update; how far each rollout (by id) is from its teachers, nats a token."""
        answered = [
            Answered(rollout, self.stage.tasks[group.question.entry].task)
            for group in groups
            for rollout in group.rollouts
        ]
        tokens = sum(len(one.rollout.answer) for one in answered)
        loss, far = 0.0, {}
        lengths = [len(one.rollout.prompt) + len(one.rollout.answer) for one in answered]
        for part in longest_first(lengths, self.stage.micro_batch_size):
            chosen = [answered[number] for number in part]
            rows = rows_of([Paid(one.rollout, 0.0) for one in chosen], False, self.device)
            with self.autocast():
                part_loss, each_B = self.divergence(rows, chosen, 1 / tokens)
            part_loss.backward()
            loss += part_loss.item()
            for one, sum_ in zip(chosen, each_B.tolist(), strict=True):
                far[id(one.rollout)] = sum_ / len(one.rollout.answer)
        norm = self.apply_gradients(loss)
        return StepResult(loss, norm, tokens), far

    def divergence(
        self, rows: Rows, answered: Sequence[Answered], weight: float
    ) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, and each answer's sum over tokens and teachers [B]."""
        model, settings = self.state.model, self.stage.match
        hidden = model(rows.inputs_BT)
        self.load.add(hidden.routings)
        row_N, place_N = rows.mask_BT.nonzero(as_tuple=True)
        x_ND = hidden.x_BTD[row_N, place_N]
        loss = x_ND.new_zeros((), dtype=torch.float32)
        each_B = torch.zeros(len(answered), device=self.device)
        for expert in self.experts:
            known_B = torch.tensor([expert.knows(one.task) for one in answered], device=self.device)
            if not known_B.any():
                continue
            number_B = known_B.cumsum(0) - 1  # of an answer among those the teacher reads
            chosen_M = known_B[row_N].nonzero().squeeze(1)
            with torch.no_grad():
                x_RTE = expert.model(rows.inputs_BT[known_B]).x_BTD
            x_ME = x_RTE[number_B[row_N[chosen_M]], place_N[chosen_M]]
            importance = expert.section.weight
            part, each_M = distribution_match(
                x_ND[chosen_M],
                model.lm_head.weight,
                TeacherStates(x_ME, expert.model.lm_head.weight),
                x_ND.new_full((len(chosen_M),), weight * importance, dtype=torch.float32),
                settings.divergence,
                settings.teacher_share,
                float32_head=True,
            )
            loss = loss + part
            each_B.index_add_(0, row_N[chosen_M], importance * each_M.float())
        return loss, each_B

    # -- what is told ------------------------------------------------------------------------------

    def tell(
        self, groups: Sequence[Group], far: dict[int, float], rolling: float, learning: float
    ) -> None:
        place = {"stage": self.stage.name, "step": self.state.run_step + 1}
        divergences: dict[str, list[float]] = defaultdict(list)
        for group in groups:
            problem = group.question.problem
            name = f"{problem.task}/{problem.difficulty}"
            divergences[name] += [far[id(one)] for one in group.rollouts]
        told = told_of(groups, self.stage.answers) | {
            "kind": "rollout",
            **place,
            "reward": fmean(group.passed for group in groups),
            "divergence": {name: fmean(sums) for name, sums in sorted(divergences.items())},
            "rollout_seconds": rolling,
            "update_seconds": learning,
        }
        self.record(told)
        for group in groups[: self.stage.kept_rollouts]:
            one = group.rollouts[0]
            record = kept_record(one, group.question, self.scene.asker, one.verdict.reward, 0.0)
            self.rollouts.append(place | record | {"divergence": far[id(one)]})
