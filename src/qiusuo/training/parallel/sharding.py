"""Fully sharded data parallel: every weight, gradient and optimizer state lies in W pieces.

Process r of W holds the r-th part of the rows of each parameter (of stacked experts: its experts).
Before a block runs its weights are gathered, afterwards they are let go; its gradients are added
up over the processes and each keeps its part (ZeRO-3, arXiv:1910.02054; here PyTorch's
``fully_shard``). So an optimizer, which looks at one number at a time, does on its part what it
would do on the whole. Muon looks at whole matrices: matrices.py.

What every process must hold at once is the largest block, gathered, beside its W-th of the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qiusuo.checkpoint.load import Held
from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import meta_model
from qiusuo.model.transformer import Transformer
from qiusuo.training.parallel.experts import share_experts
from qiusuo.training.parallel.matrices import own_part
from qiusuo.training.parallel.traffic import CountedAllGather, CountedReduceScatter
from qiusuo.training.parallel.world import World


def sharded_model(config: ModelConfig, world: World, device: str) -> Transformer:
    """A model of which this process has room for its part of every parameter, with no numbers in
    it yet: no process holds the whole at any time. RecipeError where experts cannot be shared."""
    model = meta_model(config)
    _shard(model, world)
    return model.to_empty(device=device)


@torch.no_grad()
def initialize_parts(model: Transformer, generator: torch.Generator) -> None:
    """The numbers that ``Transformer.initialize`` gives: each parameter is drawn whole, by every
    process, and all of it but this process's part forgotten before the next."""
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape)
        model.draw(name, whole, generator)
        own, first = held_of(parameter)
        own.copy_(whole[first : first + len(own)])
    for router_bias in model.buffers():
        router_bias.zero_()


def held_of(tensor: Tensor) -> Held:
    """What this process holds of a tensor, and where that begins."""
    if not isinstance(tensor, DTensor):
        return Held(tensor)
    mesh, own = tensor.device_mesh, own_part(tensor)  # rows are dealt out as ``Tensor.chunk`` does
    each = -(-len(tensor) // mesh.size())
    return Held(own, min(mesh.get_local_rank() * each, len(tensor)))


def _shard(model: Transformer, world: World) -> None:
    """Let this process keep its part of every parameter. Embedding, head and last norm are gathered
    once a pass, since the losses read the head past its module."""
    placed = share_experts(model, world) if world.expert_parallel else set()
    for block in (*model.model.main_blocks, *model.model.mtp_blocks):
        fully_shard(block, mesh=world.mesh, ignored_params=placed)
        if block in model.model.mtp_blocks:
            register_fsdp_forward_method(block, "predict")
    fully_shard(model, mesh=world.mesh, ignored_params=placed)
    gather, reduce = CountedAllGather(world.traffic), CountedReduceScatter(world.traffic)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(reduce)
            # A loss is divided by all tokens of the batch, so gradients add up to the batch's.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def let_go(model: Transformer) -> None:
    """After passes without a backward pass: free what they left gathered, which would be stale
    after a step, and forget their order, by which the next backward pass would gather too much."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def held_like(saved: Any, held: Tensor) -> Any:
    """A saved tensor in the form in which this process holds ``held``: its part of it where that
    is sharded and the saved one is whole, of the same shape. Anything else is left as it is."""
    sharded = isinstance(held, DTensor) and not isinstance(saved, DTensor)
    if not (sharded and isinstance(saved, Tensor) and saved.shape == held.shape):
        return saved
    assert isinstance(held, DTensor)
    part = saved.to(held.device)
    return distribute_tensor(part, held.device_mesh, [Shard(0)], src_data_rank=None)


def empty_copy(model: Transformer, world: World) -> Transformer:
    """What ``gather_into`` fills: a whole model on the first process, which takes room only then.
    It is the model itself where there is one process, and of no use on the others."""
    return model if world.size == 1 or not world.leads else meta_model(model.config)


@torch.no_grad()
def gather_into(copy: Transformer, model: Transformer, world: World) -> None:
    """Put the weights of this moment, of all processes, into the first one's copy."""
    if world.size == 1:
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if not world.leads:
        return
    if copy.lm_head.weight.is_meta:
        copy.to_empty(device=model.lm_head.weight.device)
        if model.config.tie_word_embeddings:
            copy.lm_head.weight = copy.model.embed_tokens.weight
    copy.load_state_dict(state)
