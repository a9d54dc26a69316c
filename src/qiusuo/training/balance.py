"""Keeping the experts of an MoE layer evenly busy (DeepSeek-V3 §2.1.2).

The main force costs the model nothing: after each step the bias of an expert that got fewer
tokens than its share rises by γ, that of a busier one falls. The bias takes part in the choice
only. A very small loss per sequence guards against a single sequence leaning on few experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qiusuo.kernels.routing import balance_loss
from qiusuo.model.moe import Routing
from qiusuo.model.transformer import Transformer
from qiusuo.training.parallel.world import World

# B sequences, T tokens, M = B*T, E experts, K experts per token.


class ExpertLoad:
    """Counts of (token, expert) pairs per layer over the whole batch of a step."""

    def __init__(self, model: Transformer) -> None:
        self.routers = model.routers()
        self.counts = {
            layer: torch.zeros(len(router.weight), device=router.weight.device)
            for layer, router in self.routers.items()
        }

    @torch.no_grad()
    def add(self, routings: dict[int, Routing]) -> None:
        for layer, routing in routings.items():
            chosen_P = routing.indices_MK.flatten()
            self.counts[layer] += torch.bincount(chosen_P, minlength=len(self.counts[layer]))

    def add_up(self, world: World) -> None:
        """Over all processes: a batch is what they read together."""
        if self.counts and world.size > 1:
            sizes = [len(count_E) for count_E in self.counts.values()]
            total = world.sum(torch.cat(list(self.counts.values())))
            self.counts = dict(zip(self.counts, total.split(sizes), strict=True))

    @torch.no_grad()
    def update_biases(self, speed: float) -> None:
        """b += γ·sign(mean load − load), on the whole batch's counts; then count anew."""
        for layer, count_E in self.counts.items():
            bias_E = self.routers[layer].e_score_correction_bias
            if bias_E is not None and speed > 0:
                bias_E += speed * torch.sign(count_E.mean() - count_E)
        self.reset()

    def reset(self) -> None:
        for count_E in self.counts.values():
            count_E.zero_()

    def relative(self) -> dict[int, list[float]]:
        """Load of each expert, 1.0 being an even share, in the layers that had tokens:
        reinforcement leaves the MTP modules out."""
        return {
            layer: (count_E / count_E.mean()).tolist()
            for layer, count_E in self.counts.items()
            if count_E.any()
        }

    def max_violation(self) -> dict[int, float]:
        """MaxVio (arXiv:2408.15664): how far the busiest expert is above its even share."""
        return {layer: max(load) - 1.0 for layer, load in self.relative().items()}


def sequence_balance_loss(routing: Routing, sequences: int) -> Tensor:
    """How unevenly a layer's experts are used, averaged over sequences (V3 eq. 17-20)."""
    return balance_loss(routing.scores_ME, routing.indices_MK.shape[1], sequences)
