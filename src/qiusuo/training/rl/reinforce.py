"""The stage ``rl``: try, be paid, and make likelier what was paid above the others (GRPO).

A step asks a batch of problems, answers each several times on the engine, with the very weights
that are then updated (or one step ahead: ahead.py), and takes the verifier's rewards. Groups that
are all right or all wrong teach nothing and give way to others. Everything that the next step
depends on is in the state: weights, optimizer, the questions' places, guards, the reference.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qiusuo.model.transformer import Transformer
from qiusuo.training.beginning import stage_state
from qiusuo.training.recipe import RecipeError
from qiusuo.training.rl.advantages import group_advantages, soft_overlong_penalty
from qiusuo.training.rl.ahead import Ahead
from qiusuo.training.rl.asking import Asking, Batch
from qiusuo.training.rl.policy_loss import (
    PolicyMeasures,
    Tokens,
    Totals,
    add_measures,
    policy_loss,
)
from qiusuo.training.rl.policy_presets import PRESETS, Preset
from qiusuo.training.rl.questions import Questions
from qiusuo.training.rl.rewards import Rewards
from qiusuo.training.rl.rollouts import Group, kept_record
from qiusuo.training.rl.telling import told_of, told_of_update, told_together
from qiusuo.training.rl.update import Paid, Rows, row_logprobs, rows_of
from qiusuo.training.scene import Scene
from qiusuo.training.seeds import seed_of
from qiusuo.training.speaking import Speaker
from qiusuo.training.stages import RlStage
from qiusuo.training.steps import Learning, StepResult

THOROUGH_STEPS = 10  # between two looks at all answers side by side
RECENT = 10  # steps whose mean reward ends a stage
IMPORTANCE_CAP = 2.0  # where the sampler is a step behind and nothing else is said


class Pay(NamedTuple):
    """What a step's P groups of G answers were paid, and by group the rollouts that the update
    learns from; groups that teach nothing are left out of those where the recipe says so."""

    rewards_PG: Tensor
    same_P: Tensor  # bool: every answer was paid the same
    paid: list[list[Paid]]


class Reinforcement(Learning):
    """A step is one batch of questions, their answers, and the updates that learn from them. This
    object is its own feed: ``state_dict`` is all that a step depends on beside the weights."""

    stage: RlStage

    def __init__(self, scene: Scene[RlStage]) -> None:
        stage = scene.stage
        self.scene, self.preset = scene, resolved(stage)
        self.seed = seed_of(f"{scene.recipe.seed}/{stage.name}")
        self.questions = Questions(stage.tasks, stage.curriculum, self.seed)
        self.rewards = Rewards(stage, self.questions, self.seed)
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.reference: Transformer | None = None
        if self.preset.loss.kl > 0:
            self.reference = _frozen_copy(scene)
        super().__init__(stage, stage_state(scene, self), scene.record)
        config = scene.model.config
        layers = range(config.num_hidden_layers)
        self.replay = stage.replay_experts and any(map(config.is_moe_layer, layers))
        self.asking = Asking(
            stage, self.preset, scene.asker, self.questions, self.seed, self.replay
        )
        self.ahead = Ahead(scene, self.asking, self.dtype) if stage.lag else None
        if self.ahead is None:
            self.speaker = Speaker(
                scene.model,
                None,
                scene.adapter,
                self.dtype,
                answers=stage.prompts * self.preset.group_size,
                max_tokens=stage.max_tokens,
            )
        self.rollouts = scene.run.open_rollouts()

    def run(self, after_step: Callable[[], bool]) -> None:
        # Only now the state is the checkpoint's: what was written after it comes again.
        self.rollouts.truncate_after(self.state.run_step)
        super().run(after_step)
        if self.ahead is not None:  # what is under way belongs to the state, unless it is the end
            over = self.state.step >= self.state.planned
            self.ahead.forget() if over else self.ahead.wait()

    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
        self.rollouts.close()

    # -- state: this object is its own feed ----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        reference = None if self.reference is None else self.reference.state_dict()
        return {
            "questions": self.questions.state_dict(),
            "rewards": self.rewards.state_dict(),
            "recent": list(self.recent),
            "reference": reference,
            "ahead": None if self.ahead is None else self.ahead.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.questions.load_state_dict(state["questions"])
        self.rewards.load_state_dict(state["rewards"])
        self.recent.extend(state["recent"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        if self.ahead is not None:
            self.ahead.load_state_dict(state["ahead"])

    # -- a step ----------------------------------------------------------------------------------

    def one_step(self) -> StepResult:
        """Ask, pay, learn, and tell; with ``lag`` the next batch is begun before learning."""
        start = time.perf_counter()
        asked, refills = self.ask()
        for group in asked:
            self.questions.heard(group.question, group.passed)
        if self.ahead is not None and self.state.step + 1 < self.state.planned:
            self.ahead.begin(self.state.step + 1, self.state.run_step)
        pay = self.pay(asked)
        rolled = time.perf_counter()
        passed = float(sum(group.passed for group in asked) / len(asked))
        self.recent.append(passed)
        result, measures, entropy = self.learn(pay.paid)
        told = told_of(asked, self.preset.group_size) | {
            "zero_variance_share": pay.same_P.float().mean().item(),
            "kind": "rollout",
            "stage": self.stage.name,
            "step": self.state.run_step + 1,
            "reward": pay.rewards_PG.mean().item(),
            "rollout_seconds": rolled - start,
            "update_seconds": time.perf_counter() - rolled,
            "refills": refills,
        }
        if measures is not None:
            told |= told_of_update(measures, entropy, self.stage.temperature == 1)
        if self.state.step % THOROUGH_STEPS == 0:
            told |= told_together(asked, self.questions)
        if hardest := self.questions.hardest():
            told["curriculum"] = hardest
        self.record(told)
        self.keep(asked, pay)
        refresh = self.preset.refresh_reference
        if self.reference is not None and refresh and (self.state.step + 1) % refresh == 0:
            self.reference = _frozen_copy(self.scene)
        return result

    def enough(self) -> bool:
        limit = self.stage.stop_above
        full = len(self.recent) == RECENT
        return limit is not None and full and sum(self.recent) / RECENT > limit

    def ask(self) -> Batch:
        """The step's groups of answers."""
        step, version = self.state.step, self.state.run_step
        if self.ahead is not None:
            return self.ahead.take(step, version)
        with self.speaker.speaking() as lm:
            return self.asking.batch(lm, step, version)

    def pay(self, asked: Sequence[Group]) -> Pay:
        """Rewards and advantages. Guards remember what they judge: once a batch, and in order."""
        stage, preset = self.stage, self.preset
        first = self.questions.drawn - len(asked)
        rewards_PG = torch.tensor(
            [self.rewards.of(group, first + number) for number, group in enumerate(asked)]
        )
        if preset.overlong == "soft":
            margin = stage.overlong_margin or max(1, stage.max_tokens // 5)
            lengths = [[len(one.answer) for one in group.rollouts] for group in asked]
            penalty = soft_overlong_penalty(
                torch.tensor(lengths).flatten(), stage.max_tokens, margin
            )
            rewards_PG = rewards_PG + penalty.view_as(rewards_PG)
        advantages = group_advantages(rewards_PG, preset.scale)
        paid = []
        for number, group in enumerate(asked):
            if preset.same_groups != "keep" and bool(advantages.same_P[number]):
                continue
            values = advantages.values_PG[number].tolist()
            paid.append(
                [
                    Paid(one, value, self.counts(one.finished, value))
                    for one, value in zip(group.rollouts, values, strict=True)
                ]
            )
        return Pay(rewards_PG, advantages.same_P, paid)

    def counts(self, finished: bool, advantage: float) -> bool:
        masked = self.preset.overlong == "mask" and not finished
        return not masked and (advantage > 0 or not self.stage.positives_only)

    # -- the update ------------------------------------------------------------------------------

    def learn(self, groups: list[list[Paid]]) -> tuple[StepResult, PolicyMeasures | None, float]:
        """Update the weights; without anything to learn from they stay as they are."""
        parts = _parts(groups, self.preset.updates)
        losses, norms, tokens, entropy = [], [], 0, 0.0
        measures: list[PolicyMeasures] = []
        olds = [self.old_logprobs(part) for part in parts] if len(parts) > 1 else [None]
        for part, old in zip(parts, olds, strict=False):
            loss, norm, told, counted, nats = self.one_update(part, old)
            losses.append(loss)
            norms.append(norm)
            measures.append(told)
            tokens += counted
            entropy += nats
        if not tokens:
            return StepResult(0.0, 0.0, 0), None, 0.0
        result = StepResult(sum(losses) / len(losses), max(norms), tokens)
        mean = _mean(measures)
        return result, mean, entropy / tokens

    def one_update(
        self, part: list[Paid], old: list[Tensor] | None
    ) -> tuple[float, float, PolicyMeasures, int, float]:
        """One step of the optimizer. ``old``: log-probabilities for each micro-batch by the weights
        that the batch's first update began with; None where this is the only one. Gives the loss,
        the gradient's norm, measures, how many tokens counted and the sum of their entropies in
        nats."""
        batches = self.cut(part)
        counted = sum(int(rows.mask_BT.sum()) for rows in batches)
        totals = Totals(
            max(1, counted), max(1, sum(one.counted for one in part)), self.stage.max_tokens
        )
        loss_sum, entropy_sum = 0.0, 0.0
        measures = []
        for number, rows in enumerate(batches):
            with self.autocast():
                logprobs_BT, entropy_BT, routings = row_logprobs(
                    self.state.model, rows, self.stage.temperature
                )
            old_BT = logprobs_BT.detach() if old is None else old[number]
            # The engine tells them at temperature 1.
            exact = self.stage.temperature == 1
            loss, told = policy_loss(
                Tokens(
                    logprobs_BT,
                    old_BT,
                    rows.rollout_logprobs_BT if exact else old_BT,
                    rows.advantages_B,
                    rows.mask_BT,
                    self.reference_logprobs(rows),
                ),
                self.preset.loss,
                totals,
            )
            loss.backward()
            loss_sum += loss.item()
            entropy_sum += entropy_BT.sum().item()
            measures.append(told)
            self.load.add(routings)
        norm = self.apply_gradients(loss_sum)
        return loss_sum, norm, add_measures(measures), counted, entropy_sum

    def cut(self, part: list[Paid]) -> list[Rows]:
        """Micro-batches, the longest rows first."""
        size = self.stage.micro_batch_size
        part = sorted(part, key=lambda one: -len(one.rollout.prompt) - len(one.rollout.answer))
        return [
            rows_of(part[start : start + size], self.replay, self.device)
            for start in range(0, len(part), size)
        ]

    @torch.no_grad()
    def old_logprobs(self, part: list[Paid]) -> list[Tensor]:
        """By the weights that the first update begins with, for each micro-batch."""
        with self.autocast():
            return [
                row_logprobs(self.state.model, rows, self.stage.temperature)[0]
                for rows in self.cut(part)
            ]

    @torch.no_grad()
    def reference_logprobs(self, rows: Rows) -> Tensor | None:
        if self.reference is None:
            return None
        with self.autocast(self.reference):  # its own experts: what it would have said
            plain = rows._replace(experts_BTLK=None)
            return row_logprobs(self.reference, plain, self.stage.temperature)[0]

    # -- what is told ------------------------------------------------------------------------------

    def keep(self, asked: Sequence[Group], pay: Pay) -> None:
        """Some rollouts of the step for people to read: a right one and a wrong one in turn, while
        there are both, of as many groups as there are."""
        advantages = {id(one.rollout): one.advantage for group in pay.paid for one in group}
        answers = [
            (group.question, group.rollouts[number], pay.rewards_PG[row, number].item())
            for number in range(self.preset.group_size)
            for row, group in enumerate(asked)
        ]
        right = [one for one in answers if one[1].verdict.reward == 1]
        wrong = [one for one in answers if one[1].verdict.reward != 1]
        in_turn = (one for pair in zip_longest(right, wrong) for one in pair if one is not None)
        place = {"step": self.state.run_step + 1, "stage": self.stage.name}
        for question, rollout, reward in islice(in_turn, self.stage.kept_rollouts):
            advantage = advantages.get(id(rollout), 0.0)
            record = kept_record(rollout, question, self.scene.asker, reward, advantage)
            self.rollouts.append(place | record)


def resolved(stage: RlStage) -> Preset:
    """The stage's preset with what the stage says itself."""
    preset = PRESETS[stage.preset]
    loss = {key: value for key, value in stage.loss.model_dump().items() if value is not None}
    if stage.temperature != 1:
        weighing = {"lag = 1": stage.lag}
        for name in ("importance_cap", "drop_beyond"):
            weighing[f"loss.{name}"] = loss.get(name, getattr(preset.loss, name))
        if wanted := [name for name, value in weighing.items() if value]:
            raise RecipeError(
                f"stage {stage.name}: {' and '.join(wanted)} ask how likely the sampler found its "
                f"answers, which is known at temperature 1, not {stage.temperature}: set it to 1, "
                "or leave that out"
            )
    if stage.lag and preset.loss.importance_cap is None:
        loss = {"importance_cap": IMPORTANCE_CAP} | loss
    own: dict[str, Any] = {
        "group_size": stage.group,
        "scale": stage.scale,
        "same_groups": stage.same_groups,
        "overlong": stage.overlong,
        "updates": stage.updates,
        "refresh_reference": stage.reference_steps,
    }
    said = {key: value for key, value in own.items() if value is not None}
    return dataclasses.replace(preset, loss=dataclasses.replace(preset.loss, **loss), **said)


def _parts(groups: list[list[Paid]], updates: int) -> list[list[Paid]]:
    """The rollouts of each update: whole groups, about equally many."""
    updates = min(updates, len(groups))
    shares = [groups[number::updates] for number in range(updates)]
    parts = [[one for group in share for one in group if one.counted] for share in shares]
    return [part for part in parts if part]  # a step without a gradient still moves Adam's weights


def _mean(measures: list[PolicyMeasures]) -> PolicyMeasures:
    together = add_measures(measures)
    count = len(measures)
    return PolicyMeasures(
        **{
            name: value if name == "mismatch_max" else value / count
            for name, value in together._asdict().items()
        }
    )


def _frozen_copy(scene: Scene[RlStage]) -> Transformer:
    """The policy as it is now, to be measured against."""
    if scene.adapter is not None:
        with scene.adapter.merged():
            return copy.deepcopy(scene.model).requires_grad_(False)
    return copy.deepcopy(scene.model).requires_grad_(False)
