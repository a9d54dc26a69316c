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

import torch
from torch import Tensor, nn

from qiusuo.kernels.experts import experts_grouped
from qiusuo.kernels.fp8 import Scales
from qiusuo.kernels.fp8_experts import experts_fp8
from qiusuo.kernels.linear import linear
from qiusuo.kernels.routing import Choice, Routing, choose_experts
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.layers import MLP

# B batch, T tokens, M = B*T, D hidden, E experts, K experts per token, g groups.


class Router(nn.Module):
    """``gate`` of a checkpoint. Everything in float32: a rounded score is another expert."""

    e_score_correction_bias: Tensor | None
    rows: int | None = None

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        sigmoid = config.scoring_func == "sigmoid"
        self.choice = Choice(
            groups=config.n_group,
            kept_groups=config.topk_group,
            per_token=config.num_experts_per_tok,
            sigmoid=sigmoid,
            normalized=config.norm_topk_prob,
            scaling=config.routed_scaling_factor,
        )
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32) if sigmoid else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_MD: Tensor, replayed_MK: Tensor | None = None) -> Routing:
        """``replayed``: take these experts instead, but where a row begins with −1."""
        with torch.autocast(x_MD.device.type, enabled=False):
            logits_ME = linear(x_MD.float(), self.weight.float(), rows=self.rows)
        return choose_experts(logits_ME, self.e_score_correction_bias, self.choice, replayed_MK)


class Experts(nn.Module):
    """All routed experts as two stacked tensors; per-expert names exist in checkpoints only.
    ``fp8``: compute in FP8, with such scales for the two; see ``in_fp8``."""

    rows: int | None = None
    fp8: tuple[Scales, Scales] | None = None

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden_size, width))

    def forward(self, x_MD: Tensor, routing: Routing) -> Tensor:
        weights_MK, indices_MK = routing.weights_MK, routing.indices_MK
        stacks = (self.gate_up_proj, self.down_proj)
        if self.fp8 is not None:
            return experts_fp8(x_MD, weights_MK, indices_MK, *stacks, *self.fp8)
        return experts_grouped(x_MD, weights_MK, indices_MK, *stacks, self.rows)


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
