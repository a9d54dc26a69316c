"""Expert parallel: tokens go to the experts, instead of weights to the tokens.

Process r of W holds the r-th part of a layer's experts, and nobody gathers them. The router chooses
as ever, groups and all. Then each (token, expert) pair's row goes to the process that has the
expert, through it, and back, where the token adds up its K results: two all-to-alls forward and two
backward (DeepSeek-V3 §3.2.2, without its limit of nodes a token). An expert sees the tokens of all
processes, so its gradient is that of the whole batch as it stands.

In memory, in checkpoints and for the optimizers it is what ``fully_shard`` makes of a stack of
experts: a tensor sharded along them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from qiusuo.kernels.experts import experts_grouped
from qiusuo.model.moe import Experts, Routing
from qiusuo.model.transformer import Transformer
from qiusuo.training.parallel.matrices import own_part
from qiusuo.training.parallel.world import World
from qiusuo.training.recipe import RecipeError

# M tokens, K experts per token, P = M*K pairs, R rows that came here, D hidden, E experts, W
# processes.


def share_experts(model: Transformer, world: World) -> set[nn.Parameter]:
    """Let each process keep its experts and tokens come to them; the parameters that are not to be
    sharded again. RecipeError where there are no experts, or not as many for each."""
    shared: set[nn.Parameter] = set()
    stacks = [module for module in model.modules() if isinstance(module, Experts)]
    if not stacks:
        raise RecipeError("the model has no routed experts: leave --expert-parallel out")
    for experts in stacks:
        count = len(experts.gate_up_proj)
        if count % world.size:
            raise RecipeError(
                f"{world.size} processes cannot share {count} experts evenly: leave "
                "--expert-parallel out, or take a number that divides them"
            )
        for name, parameter in list(experts.named_parameters()):
            assert world.mesh is not None
            part = distribute_tensor(parameter.data, world.mesh, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(part))
        shared |= set(experts.parameters())
        experts.forward = partial(visit, experts, world)  # type: ignore[method-assign]
    return shared


def visit(experts: Experts, world: World, x_MD: Tensor, routing: Routing) -> Tensor:
    """As ``Experts.forward``, of the experts of all processes."""
    device = x_MD.device.type
    if torch.is_autocast_enabled(device):  # half the bytes on the way
        x_MD = x_MD.to(torch.get_autocast_dtype(device))
    gate_up, down = own_part(experts.gate_up_proj), own_part(experts.down_proj)
    choices = routing.indices_MK.shape[1]
    expert_P = routing.indices_MK.flatten()
    order_P = torch.argsort(expert_P, stable=True)  # by expert, and so by process
    sorted_P = expert_P[order_P]
    there = torch.bincount(sorted_P // len(gate_up), minlength=world.size)
    counts = there.tolist()
    back = [int(n) for n in world.exchange(list(there.split(1)), [1] * world.size)]
    expert_R = torch.cat(world.exchange(list(sorted_P.split(counts)), back)) % len(gate_up)
    x_RD = _Journey.apply(x_MD[order_P // choices], world, counts, back)
    if len(x_RD):
        weight_R1 = torch.ones(len(x_RD), 1, device=x_RD.device)
        y_RD = experts_grouped(x_RD, weight_R1, expert_R[:, None], gate_up, down)
    else:  # nobody came: a gradient of zero, as on one process, and a part in the way back
        y_RD = x_RD + 0 * (gate_up.sum() + down.sum())
    y_PD = _Journey.apply(y_RD, world, back, counts)
    home_P = torch.empty_like(order_P)
    home_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    y_MKD = y_PD[home_P].unflatten(0, (-1, choices))
    return (y_MKD * routing.weights_MK[..., None].to(y_MKD.dtype)).sum(1)


class _Journey(torch.autograd.Function):
    """Rows [P, D] to other processes, ``there[r]`` of them to process r, and those that come from
    them; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, world: World, there: list[int], back: list[int]) -> Tensor:
        ctx.how = world, there, back
        return _exchanged(x_PD, world, there, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        world, there, back = ctx.how
        return _exchanged(grads[0], world, back, there), None, None, None


def _exchanged(x_PD: Tensor, world: World, there: list[int], back: list[int]) -> Tensor:
    width = x_PD.shape[1]
    parts = [part.flatten() for part in x_PD.contiguous().split(there)]
    return torch.cat(world.exchange(parts, [n * width for n in back])).view(-1, width)
