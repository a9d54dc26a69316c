"""The stage ``dpo``: make the preferred answer of each pair likelier than the other one.

Pairs come from a file, or from what the policy itself got right and wrong (a ``sample`` stage with
``pairs``). The reference is the model that the stage begins with; all it is asked for are two
numbers a pair, so they are computed once, before the first step, and kept in the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qiusuo.data.preferences import Preferences, read_preferences
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.kernels.token_logprobs import token_logprobs
from qiusuo.model.moe import Routing
from qiusuo.training.beginning import stage_state
from qiusuo.training.example_rows import example_rows, longest_first
from qiusuo.training.pairs import PairOrder, Pairs
from qiusuo.training.preference import Answers, preference_loss
from qiusuo.training.recipe import RecipeError
from qiusuo.training.scene import Scene
from qiusuo.training.seeds import seed_of
from qiusuo.training.stages import DpoStage, PairSource
from qiusuo.training.steps import Learning, StepResult

# P pairs, B = 2P answers: the chosen ones, then the rejected ones. T places, N counted ones.


class Sums(NamedTuple):
    """Of each answer: its log-probability and how many tokens it has."""

    logprobs_B: Tensor
    tokens_B: Tensor
    routings: dict[int, Routing]


class Preferring(Learning):
    """A step is one batch of pairs. The order of the pairs and what the reference said of each are
    the state beside weights and optimizer."""

    stage: DpoStage

    def __init__(self, scene: Scene[DpoStage]) -> None:
        stage = scene.stage
        parts = [preferences(scene, source) for source in stage.sources]
        self.pairs = Pairs(parts)
        context = scene.model.config.max_position_embeddings
        if self.pairs.longest > context:
            raise RecipeError(
                f"stage {stage.name}: a conversation has {self.pairs.longest} tokens, over the "
                f"model's max_position_embeddings {context}: leave out what is longer"
            )
        self.order = PairOrder(self.pairs, seed_of(f"{scene.recipe.seed}/{stage.name}"))
        self.reference_P2: Tensor | None = None
        super().__init__(stage, stage_state(scene, self), scene.record)

    # -- state: this object is its own feed ----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.state_dict(), "reference": self.reference_P2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.reference_P2 = state["reference"]

    # -- a step ----------------------------------------------------------------------------------

    def one_step(self) -> StepResult:
        """One update from the next pairs; before the first one the reference is asked."""
        stage = self.stage
        if self.reference_P2 is None:
            self.reference_P2 = self.ask_reference()
        loss, tokens, told = 0.0, 0, torch.zeros(5)
        for part in self.parts(self.order.take(stage.batch_size)):
            with self.autocast():
                sums = self.answers(part)
            chosen_P, rejected_P = sums.logprobs_B.chunk(2)
            reference_2P = self.reference_P2[part].to(self.device).unbind(1)
            found = preference_loss(
                Answers(chosen_P, reference_2P[0]),
                Answers(rejected_P, reference_2P[1]),
                sums.tokens_B.chunk(2)[0],
                beta=stage.beta,
                label_smoothing=stage.label_smoothing,
                sft_weight=stage.sft_weight,
            )
            total = found.loss_P.sum() / stage.batch_size
            total.backward()
            loss += total.item()
            tokens += int(sums.tokens_B.sum())
            right_P = (found.chosen_reward_P > found.rejected_reward_P).float()
            measures = (right_P, found.chosen_reward_P, found.rejected_reward_P)
            told += torch.stack([x.detach().sum().cpu() for x in (*measures, chosen_P, rejected_P)])
            self.load.add(sums.routings)
        norm = self.apply_gradients(loss)
        accuracy, chosen, rejected, *logprobs = (told / stage.batch_size).tolist()
        more = {
            "reward_accuracy": accuracy,
            "reward_margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "logprob_chosen": logprobs[0],
            "logprob_rejected": logprobs[1],
            "epoch": self.order.epoch,
        }
        return StepResult(loss, norm, tokens, more)

    @torch.no_grad()
    def ask_reference(self) -> Tensor:
        """Log-probabilities of every pair's two answers by the weights of this moment [P, 2]."""
        reference_P2 = torch.empty(self.pairs.length, 2)
        for part in self.parts(range(self.pairs.length)):
            with self.autocast():
                logprobs_B = self.answers(part).logprobs_B
            reference_P2[part] = torch.stack(logprobs_B.chunk(2), 1).float().cpu()
        return reference_P2

    def answers(self, numbers: Sequence[int]) -> Sums:
        pairs = [self.pairs.pair(number) for number in numbers]
        examples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        inputs_BT, labels_BT = (x.to(self.device) for x in example_rows(examples))
        model = self.state.model
        hidden = model(inputs_BT)
        # Only the places with a label go through the head.
        mask_BT = labels_BT != IGNORE
        row_N, place_N = mask_BT.nonzero(as_tuple=True)
        x_ND = hidden.x_BTD[row_N, place_N]
        labels_N = labels_BT[row_N, place_N]
        logprobs_N, _ = token_logprobs(x_ND, model.lm_head.weight, labels_N, float32_head=True)
        logprobs_B = logprobs_N.new_zeros(len(inputs_BT)).index_add(0, row_N, logprobs_N)
        return Sums(logprobs_B, mask_BT.sum(1), hidden.routings)

    def parts(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Micro-batches of the pairs with these numbers."""
        pairs = map(self.pairs.pair, numbers)
        lengths = [max(len(example.tokens) for example in pair) for pair in pairs]
        for part in longest_first(lengths, self.stage.micro_batch_size):
            yield [numbers[place] for place in part]


def preferences(scene: Scene[DpoStage], source: PairSource) -> Preferences:
    """DataError or RecipeError where there are none."""
    if source.file is not None:
        return read_preferences(source.file, scene.tokenizer)
    path = scene.traces_path(source.pairs or "")
    if not path.is_file() or not path.stat().st_size:
        raise RecipeError(
            f"stage {scene.stage.name}: stage {source.pairs} kept no pairs: it must be of the kind "
            "sample with pairs = true, and some problem needs a right and a wrong answer beside "
            "each other: give it more count or answers, or problems that the model can half do"
        )
    return read_preferences(path, scene.tokenizer)
