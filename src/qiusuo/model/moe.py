"""DeepSeekMoE: many small routed experts, a few of them per token, beside shared ones.

The router scores every expert for a token, keeps the best groups, then the best experts in them.
In V3 (arXiv:2412.19437 §2.1.2) a bias per expert takes part in that choice but not in the weights:
raising the bias of an idle expert sends it tokens without bending the loss.

Reinforcement learning may replay the experts that were chosen when a text was sampled (R3,
arXiv:2510.11370 §4): a score rounded otherwise, or weights that moved on, would run other experts
than those that wrote it. Only the choice is replayed. The weights come from the live scores, so the
router learns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qiusuo.kernels.experts import experts_grouped
from qiusuo.kernels.linear import linear
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.layers import MLP

# B batch, T tokens, M = B*T, D hidden, E experts, K experts per token, g groups.


class Routing(NamedTuple):
    """One MoE layer's choices: what balancing, replay and the report look at."""

    scores_ME: Tensor  # float32, unbiased, before any choice
    indices_MK: Tensor
    weights_MK: Tensor  # float32


class Router(nn.Module):
    """``gate`` of a checkpoint. Everything in float32: a rounded score is another expert."""

    e_score_correction_bias: Tensor | None
    rows: int | None = None

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        biased = config.scoring_func == "sigmoid"
        bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32) if biased else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_MD: Tensor, replayed_MK: Tensor | None = None) -> Routing:
        """``replayed``: take these experts instead, but where a row begins with −1."""
        config = self.config
        with torch.autocast(x_MD.device.type, enabled=False):
            logits_ME = linear(x_MD.float(), self.weight.float(), rows=self.rows)
        if config.scoring_func == "sigmoid":
            scores_ME = logits_ME.sigmoid()
        else:
            scores_ME = logits_ME.softmax(-1)
        indices_MK = self.choose(scores_ME.detach())
        if replayed_MK is not None:
            indices_MK = torch.where(replayed_MK[:, :1] < 0, indices_MK, replayed_MK.long())
        weights_MK = scores_ME.gather(1, indices_MK)
        if config.norm_topk_prob:
            weights_MK = weights_MK / (weights_MK.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores_ME, indices_MK, weights_MK * config.routed_scaling_factor)

    def choose(self, scores_ME: Tensor) -> Tensor:
        """Group-limited top-k [M, K] of the biased scores."""
        config = self.config
        if self.e_score_correction_bias is not None:
            scores_ME = scores_ME + self.e_score_correction_bias
        if config.topk_group < config.n_group:
            scores_MgX = scores_ME.unflatten(-1, (config.n_group, -1))
            if config.scoring_func == "sigmoid":
                group_scores_Mg = scores_MgX.topk(2, dim=-1).values.sum(-1)
            else:
                group_scores_Mg = scores_MgX.amax(-1)
            kept = group_scores_Mg.topk(config.topk_group, dim=-1).indices
            dropped_Mg = torch.ones_like(group_scores_Mg, dtype=torch.bool).scatter_(1, kept, False)
            # −inf, not 0: with negative biases a zero would win over an expert that was kept.
            scores_ME = scores_MgX.masked_fill(dropped_Mg[..., None], float("-inf")).flatten(1)
        return scores_ME.topk(config.num_experts_per_tok, dim=-1).indices


class Experts(nn.Module):
    """All routed experts as two stacked tensors; per-expert names exist in checkpoints only."""

    rows: int | None = None

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden_size, width))

    def forward(self, x_MD: Tensor, routing: Routing) -> Tensor:
        return experts_grouped(
            x_MD,
            routing.weights_MK,
            routing.indices_MK,
            self.gate_up_proj,
            self.down_proj,
            self.rows,
        )


class MoE(nn.Module):
    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config.hidden_size, width)

    def forward(self, x_BTD: Tensor, replayed_MK: Tensor | None = None) -> tuple[Tensor, Routing]:
        x_MD = x_BTD.flatten(0, 1)
        routing = self.gate(x_MD, replayed_MK)
        out_BTD = self.experts(x_MD, routing).view_as(x_BTD)
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(x_BTD)
        return out_BTD, routing
