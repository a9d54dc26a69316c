"""ESFT (arXiv:2407.01906): fine-tune the few experts that a task's tokens use.

Tokens of one task go to few experts. Each layer's experts are scored on sample tokens, by their
share of the (token, expert) choices (§3.2, eq. 6; scores of a layer add up to 1), and the fewest
whose scores reach a threshold are trained. Everything else is frozen: the other experts stay bit
for bit what they were, and with them other tasks.

A layer's experts are one stacked tensor [E, ...], trainable as a whole or not at all, so a hook
clears the gradients of the others and the optimizers are told not to decay the stack.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qiusuo.data.batch import Batch
from qiusuo.model.moe import MoE
from qiusuo.model.transformer import Transformer
from qiusuo.training.losses import language_model_losses, make_window
from qiusuo.training.recipe import RecipeError

# B rows, T tokens, M = B*T, E experts, K experts per token.


@dataclass(frozen=True)
class ExpertSelection:
    """``experts``: the chosen of each MoE layer, by layer number (MTP modules' too), best first.
    ``share``: the threshold they reach on ``tokens`` sample tokens."""

    share: float
    tokens: int
    experts: dict[int, list[int]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"experts": {str(n): list(e) for n, e in self.experts.items()}}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ExpertSelection:
        return cls(**(raw | {"experts": {int(n): list(e) for n, e in raw["experts"].items()}}))


def select_experts(
    model: Transformer, batches: Iterable[Batch], share: float = 0.2
) -> ExpertSelection:
    """Choose in each layer the fewest experts whose scores on the batches' tokens reach ``share``.

    RecipeError where the model has no routed experts or the batches no tokens. Runs under the
    caller's autocast, without gradients."""
    if not model.routers():
        raise RecipeError(
            "the model has no routed experts to choose from: train all of it, or use lora"
        )
    scores, tokens = expert_scores(model, batches)
    chosen = {layer: fewest_reaching(score_E, share) for layer, score_E in scores.items()}
    return ExpertSelection(share, tokens, chosen)


@torch.no_grad()
def expert_scores(model: Transformer, batches: Iterable[Batch]) -> tuple[dict[int, Tensor], int]:
    """Each layer's scores [E] in float64, which add up to 1, and the number of tokens they are
    from: those the main model reads, padding not counted."""
    routers = model.routers()
    sums = {
        layer: torch.zeros(len(router.weight), dtype=torch.float64, device=router.weight.device)
        for layer, router in routers.items()
    }
    device = model.lm_head.weight.device
    depth = model.config.num_nextn_predict_layers
    tokens = 0
    for batch in batches:
        parts = (batch.tokens_BS, batch.documents_BS, batch.valid_BS)
        tokens_BS, documents_BS, valid_BS = (part.to(device) for part in parts)
        window = make_window(tokens_BS, documents_BS, valid_BS, depth, isolate=True)
        read_M = (documents_BS[:, : window.inputs.shape[1]] >= 0).flatten()
        tokens += int(read_M.sum())
        for layer, routing in language_model_losses(model, window).routings.items():
            chosen_P = routing.indices_MK[read_M].flatten()
            sums[layer] += chosen_P.bincount(minlength=len(sums[layer]))
    if tokens == 0:
        raise RecipeError("no tokens to score experts on: give at least one batch that has some")
    return {layer: sum_E / sum_E.sum() for layer, sum_E in sums.items()}, tokens


def fewest_reaching(score_E: Tensor, share: float) -> list[int]:
    """The fewest experts whose scores add up to ``share``, best first; of equals the first."""
    ordered_E, order_E = score_E.sort(descending=True, stable=True)
    short_E = ordered_E.cumsum(0) < share - 1e-12  # a sum to 1 may be a rounding below it
    count = min(int(short_E.sum()) + 1, int((score_E > 0).sum()))
    return order_E[:count].tolist()


def train_only(model: Transformer, selection: ExpertSelection) -> None:
    """Freeze all of a model but the selected experts.

    To be done before the optimizers are made, which ask each parameter whether it is trainable
    (``requires_grad``) and whether only in part (``partly_frozen``). RecipeError, and nothing
    changed, where the selection is another model's."""
    blocks = (*model.model.main_blocks, *model.model.mtp_blocks)
    networks = {block.layer: block.mlp for block in blocks}
    stacks: list[tuple[nn.Parameter, list[int]]] = []
    for layer, experts in selection.experts.items():
        mlp = networks.get(layer)
        if not isinstance(mlp, MoE) or not set(experts) <= set(range(len(mlp.gate.weight))):
            raise RecipeError(
                f"the selection names experts {experts} of layer {layer}, which the model does "
                "not have: it was made for another model; select again"
            )
        if experts:
            stacks += [(mlp.experts.gate_up_proj, experts), (mlp.experts.down_proj, experts)]
    model.requires_grad_(False)
    for stack, experts in stacks:
        _learn_only(stack, experts)


def _learn_only(stack: nn.Parameter, experts: list[int]) -> None:
    """Let the gradient [E, ...] reach these experts alone."""
    others_E11 = torch.ones(len(stack), 1, 1, dtype=torch.bool, device=stack.device)
    others_E11[experts] = False
    stack.partly_frozen = True  # type: ignore[attr-defined]
    stack.requires_grad_(True)
    stack.register_hook(lambda grad: grad.masked_fill(others_E11, 0))
