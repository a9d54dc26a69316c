"""AdamW, and Muon for the matrices inside the blocks.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the
nearest orthogonal matrix, found by five Newton-Schulz iterations: every direction of the update
gets the same size. Here matrices of one shape go through the iterations together, and the stacked
experts are what they are: many matrices, gate and up apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from qiusuo.training.parallel.matrices import MatrixExchange, is_spread_matrix, own_part
from qiusuo.training.parallel.world import ALONE, World
from qiusuo.training.sections import OptimizerSection

# N matrices, R rows, C columns.

# The quintic's coefficients (Jordan): steepest at zero while staying near 1 for singular values.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices_NRC: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """About U Vᵀ of each matrix's singular value decomposition, in that type; same shape."""
    a, b, c = NEWTON_SCHULZ
    x_NRC = matrices_NRC.to(dtype)
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    if tall:
        x_NRC = x_NRC.mT
    norm = torch.linalg.vector_norm(x_NRC, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    # The scale in that type too: a product of mixed types is twenty times slower on a CPU.
    x_NRC = x_NRC.contiguous() * (1 / (norm + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
        poly_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, poly_NRR, x_NRC, beta=a)
    return x_NRC.mT if tall else x_NRC


class Muon(Optimizer):
    """Momentum SGD with orthogonalised updates. A parameter is one matrix [R, C] or a stack
    [..., R, C]. Weight decay is decoupled, as in AdamW. Of sharded parameters this process holds
    some of a stack's matrices, or some rows of a matrix, which then goes to its owner whole.
    ``dtype``: in which matrices are orthogonalised."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.bfloat16,
        world: World = ALONE,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.dtype, self.world = dtype, world

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            spread = [p for p in held if is_spread_matrix(p)]
            here = [p for p in held if not is_spread_matrix(p)]
            momenta = [self._momentum(p, group) for p in here]
            self._apply(group, here, _updates(here, momenta, self.dtype))
            if spread:
                rows = [self._momentum(p, group) for p in spread]
                exchange = MatrixExchange(self.world, spread)
                owned = [spread[i] for i in exchange.owned]
                updates = _updates(owned, exchange.gather(rows), self.dtype)
                self._apply(group, spread, exchange.scatter(updates, rows, self.dtype))

    def _momentum(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Nesterov momentum of this parameter's gradient, as far as this process holds it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer, grad = own_part(state["momentum"]), own_part(parameter.grad)
        buffer.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(buffer, group["momentum"])

    def _apply(
        self, group: dict[str, Any], parameters: list[nn.Parameter], updates: list[Tensor]
    ) -> None:
        for parameter, update in zip(parameters, updates, strict=True):
            rows, columns = _matrix_shape(parameter)
            # Keeps the size of the output's change the same for wide and tall matrices.
            size = group["lr"] * max(1.0, rows / columns) ** 0.5
            own = own_part(parameter)
            own.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)


def _updates(
    parameters: list[nn.Parameter], momenta: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Each momentum's matrices orthogonalised; matrices of one shape together."""
    # A tall matrix joins the wide ones as its transpose: fewer, larger products.
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, parameter in enumerate(parameters):
        rows, columns = _matrix_shape(parameter)
        shapes[min(rows, columns), max(rows, columns)].append(place)
    updates: dict[int, Tensor] = {}
    for places in shapes.values():
        wide = [_wide(momenta[place], parameters[place]) for place in places]
        update_NRC = orthogonalize(torch.cat(wide), dtype)
        counts = [len(each) for each in wide]
        for place, wide_NRC in zip(places, update_NRC.split(counts), strict=True):
            rows, columns = _matrix_shape(parameters[place])
            turned = wide_NRC.mT if rows > columns else wide_NRC
            updates[place] = turned.reshape_as(momenta[place])
    return [updates[place] for place in range(len(parameters))]


def _matrix_shape(parameter: nn.Parameter) -> tuple[int, int]:
    """A stack of gate and up projections [E, 2F, D] is 2E matrices [F, D]."""
    rows, columns = parameter.shape[-2:]
    return (rows // 2 if getattr(parameter, "two_matrices", False) else rows), columns


def _wide(momentum: Tensor, parameter: nn.Parameter) -> Tensor:
    """A parameter's momentum as matrices [N, R, C] that are not taller than wide."""
    rows, columns = _matrix_shape(parameter)
    momentum_NRC = momentum.view(-1, rows, columns)
    return momentum_NRC.mT if rows > columns else momentum_NRC


def build_optimizers(
    model: nn.Module,
    section: OptimizerSection,
    adapter: Iterable[nn.Parameter] = (),
    dtype: torch.dtype = torch.bfloat16,
    world: World = ALONE,
) -> list[Optimizer]:
    """Every trainable parameter in exactly one optimizer. Routers, norms, embedding and head take
    AdamW, as do those of an ``adapter``. What is frozen in part is not decayed: decay would move
    the frozen part (``expert_selection``). ``dtype``: of Muon's products. ValueError where nothing
    is trainable."""
    muon: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = list(adapter)
    plain: list[nn.Parameter] = []
    muon_plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = ".layers." in name and parameter.ndim >= 2
        whole = not getattr(parameter, "partly_frozen", False)
        if section.kind == "muon" and inside and not name.endswith(".gate.weight"):
            if name.endswith("experts.gate_up_proj"):
                parameter.two_matrices = True  # type: ignore[attr-defined]
            (muon if whole else muon_plain).append(parameter)
        else:
            (decayed if whole and parameter.ndim >= 2 else plain).append(parameter)
    optimizers: list[Optimizer] = []
    if groups := _groups(decayed, plain, section.weight_decay):
        betas = (section.beta1, section.beta2)
        optimizers.append(AdamW(groups, lr=section.adamw_learning_rate, betas=betas, fused=True))
    if groups := _groups(muon, muon_plain, section.weight_decay):
        rate, momentum = section.learning_rate, section.momentum
        optimizers.append(Muon(groups, rate, momentum, 0.0, dtype, world))
    if not optimizers:
        raise ValueError("nothing to train: every parameter is frozen and there is no adapter")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _groups(
    decayed: list[nn.Parameter], plain: list[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": plain})
    return [{"weight_decay": 0.0} | group for group in groups if group["params"]]
