"""Where the time of a training step goes, part by part, and how far from the machine's rate it is.

The steps are those of training (``SupervisedSteps``), on random tokens. Each module of a part is
timed by hooks where its forward and its backward pass begin and end; on a CPU these run one after
the other, so what is between them is the part's own. The head's losses are no module: forward they
have what the model's blocks leave of the pass, backward what their own nodes of the graph take. The
sums of the residual stream, and of its gradients, are done by the norms. What no part claims is
"rest": embedding, other gradients that are added up, what is counted for the log. The arithmetic
of a part is counted from its shapes, as model/cost.py counts it; its rate stands beside that of a
large matrix product, measured in the same minute.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qiusuo.data.batch import Batch
from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import measure
from qiusuo.model.gqa import GroupedQueryAttention
from qiusuo.model.layers import MLP, RMSNorm
from qiusuo.model.mla import MultiHeadLatentAttention
from qiusuo.model.moe import Experts, Router
from qiusuo.model.transformer import Transformer
from qiusuo.training.beginning import random_model
from qiusuo.training.hardware import keep_freed_memory
from qiusuo.training.losses import Losses
from qiusuo.training.optimizers import build_optimizers
from qiusuo.training.parallel.limits import check_shared
from qiusuo.training.parallel.world import ALONE, World
from qiusuo.training.recipe import Recipe, RecipeError
from qiusuo.training.stages import SupervisedStage
from qiusuo.training.state import StageState
from qiusuo.training.steps import StepResult
from qiusuo.training.supervised import SupervisedSteps

WARM_UP = 3  # steps that choose code and room

# A module belongs to the first part whose class it is.
PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "attention": (MultiHeadLatentAttention, GroupedQueryAttention),
    "routed experts": (Experts,),
    "routers": (Router,),
    "dense and shared MLPs": (MLP,),
    "norms and residual sums": (RMSNorm,),
}
BLOCKS = "blocks"  # the embedding, all blocks and the last norm; MTP modules
FORWARD, STEP = "forward passes", "step"  # the whole of them
HEAD, OPTIMIZER, REST = "head and losses", "clip and optimizer", "rest"


@dataclass(frozen=True)
class PartTime:
    """Medians over the steps, in seconds; operations of a step, forward and backward."""

    name: str
    forward: float
    backward: float
    flops: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class StepProfile:
    """``seconds`` of a step without hooks, ``peak`` in operations a second."""

    parts: list[PartTime]
    seconds: float
    tokens: int
    flops: float
    peak: float
    precision: str


Seconds = dict[tuple[str, str], float]  # by part and direction


class _Clock:
    """Seconds of one step; of what is begun twice, as a part inside its like, the outer counts."""

    def __init__(self) -> None:
        self.seconds: Seconds = defaultdict(float)
        self.began: dict[tuple[str, str], float] = {}

    def start(self, part: str, direction: str) -> None:
        self.began.setdefault((part, direction), time.perf_counter())

    def stop(self, part: str, direction: str) -> None:
        began = self.began.pop((part, direction), None)
        if began is not None:
            self.seconds[part, direction] += time.perf_counter() - began

    def taken(self) -> Seconds:
        seconds, self.seconds, self.began = dict(self.seconds), defaultdict(float), {}
        return seconds


def profile_step(recipe: Recipe, steps: int, device: str = "cpu") -> StepProfile:
    """Where the time of ``random_steps`` goes; RecipeError as there."""
    work = random_steps(recipe, device)
    model, stage = work.state.model, work.stage
    clock = _Clock()
    for _ in range(WARM_UP):
        _step(work, clock)
    plain = [_step(work, clock)[STEP, "forward"] for _ in range(steps)]
    with _hooks(work, clock):
        timed = [_step(work, clock) for _ in range(steps)]
    tokens = stage.batch_size * stage.sequence_length
    flops = flops_by_part(model, tokens, stage.sequence_length)
    return StepProfile(
        _parts(timed, flops),
        statistics.median(plain),
        tokens,
        sum(flops.values()),
        work.peak,
        stage.precision,
    )


def random_steps(recipe: Recipe, device: str = "cpu", world: World = ALONE) -> SupervisedSteps:
    """The steps of a recipe's first stage that learns from text, on random tokens, with random
    weights. Of several processes each calls it. RecipeError where the recipe has no such stage, or
    begins with a checkpoint."""
    stages = [stage for stage in recipe.stages if isinstance(stage, SupervisedStage)]
    if not stages or recipe.base is not None:
        raise RecipeError(
            f"{recipe.name}: to profile a step, the recipe needs [model] and a stage of kind "
            "pretrain, sft or distil"
        )
    stage = stages[0]
    check_shared(recipe, [stage], world.size)
    config = recipe.model_for(recipe.tokenizer.vocab_size)
    model = random_model(config, recipe.seed, device, world)
    keep_freed_memory()
    dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
    optimizers = build_optimizers(model, stage.optimizer, (), dtype, world)
    feed = _SameText(model.config, stage)
    state = StageState(model, optimizers, feed, stage.name, stage.steps, world=world)
    return SupervisedSteps(stage, state, lambda entry: None, isolate=False, seed=recipe.seed)


def take_step(work: SupervisedSteps) -> StepResult:
    """One step as ``run`` takes it, without the log."""
    result = work.one_step()
    work.load.add_up(work.world)
    work.load.update_biases(work.bias_speed)
    return result


def flops_by_part(model: Transformer, tokens: int, sequence_length: int) -> dict[str, float]:
    """Operations of a step, forward and backward: six for each weight that a token is multiplied
    with; for attention's scores and results as for so many weights, at half the sequence."""
    cost = measure(model.config)
    weights: dict[str, float] = defaultdict(float)
    for _, module, part in _modules(model):
        numbers = sum(p.numel() for p in module.parameters() if p.ndim > 1)
        if isinstance(module, Experts):
            numbers = numbers * _per_token(model) // len(module.gate_up_proj)
        weights[part] += numbers
    weights["attention"] += (cost.attention_width + cost.attention_width_mtp) * sequence_length / 2
    passes = 1 + model.config.num_nextn_predict_layers
    weights[HEAD] = passes * model.lm_head.weight.numel()
    whole = cost.training_flops(sequence_length) / 6
    weights[REST] = max(0.0, whole - sum(weights.values()))  # what joins an MTP module's inputs
    return {part: 6.0 * tokens * numbers for part, numbers in weights.items()}


def _per_token(model: Transformer) -> int:
    return next(iter(model.routers().values())).choice.per_token


def _modules(model: Transformer) -> Iterator[tuple[str, nn.Module, str]]:
    """Every module that is timed, with its part; what is inside another one is that one's."""
    for name, module in model.named_modules():
        part = next((part for part, kinds in PARTS.items() if isinstance(module, kinds)), None)
        if part is not None and ".self_attn." not in name:
            yield name, module, part


def _parts(timed: list[Seconds], flops: dict[str, float]) -> list[PartTime]:
    """Medians; what the blocks and the clock leave of a pass is the head's and the rest's."""
    found = []
    for one in timed:
        known = {key: took for key, took in one.items() if key[0] in (*PARTS, HEAD, OPTIMIZER)}
        inside = sum(known[part, "forward"] for part in PARTS if (part, "forward") in known)
        behind = sum(took for (_, direction), took in known.items() if direction == "backward")
        known[HEAD, "forward"] = one[FORWARD, "forward"] - one[BLOCKS, "forward"]
        known[REST, "forward"] = one[BLOCKS, "forward"] - inside
        passes = one[STEP, "forward"] - one[OPTIMIZER, "forward"]
        known[REST, "backward"] = passes - one[FORWARD, "forward"] - behind
        found.append(known)

    def median(part: str, direction: str) -> float:
        return statistics.median(one.get((part, direction), 0.0) for one in found)

    names = [
        name
        for name in (*PARTS, HEAD, OPTIMIZER, REST)
        if any((name, "forward") in one for one in found)
    ]
    return [
        PartTime(name, median(name, "forward"), median(name, "backward"), flops.get(name, 0.0))
        for name in names
    ]


class _SameText:
    """A ``Feed`` of always the same random tokens."""

    def __init__(self, config: ModelConfig, stage: SupervisedStage) -> None:
        shape = stage.batch_size, stage.sequence_length + 1 + config.num_nextn_predict_layers
        chance = torch.Generator().manual_seed(0)
        tokens_BS = torch.randint(config.vocab_size, shape, generator=chance)
        documents_BS = torch.zeros_like(tokens_BS)
        self.batch = Batch(tokens_BS, documents_BS, torch.ones_like(tokens_BS, dtype=torch.bool))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


def _step(work: SupervisedSteps, clock: _Clock) -> Seconds:
    """Take a step; its seconds, and what the clock's hooks saw of it."""
    clock.start(STEP, "forward")
    take_step(work)
    clock.stop(STEP, "forward")
    return clock.taken()


@contextmanager
def _hooks(work: SupervisedSteps, clock: _Clock) -> Iterator[None]:
    """Let the clock see every part of a step."""
    model = work.state.model
    handles: list[Any] = []
    for _, module, part in _modules(model):
        handles += [
            module.register_forward_pre_hook(_told(clock.start, part, "forward")),
            module.register_forward_hook(_told(clock.stop, part, "forward")),
            module.register_full_backward_pre_hook(_told(clock.start, part, "backward")),
            module.register_full_backward_hook(_told(clock.stop, part, "backward")),
        ]
    handles.append(model.register_forward_pre_hook(_told(clock.start, BLOCKS, "forward")))
    handles.append(model.register_forward_hook(_told(clock.stop, BLOCKS, "forward")))
    # What modules' hooks do not see: they know ``forward`` alone.
    timed: list[tuple[Any, str, str]] = [(work, "forward", FORWARD)]
    timed.append((work, "apply_gradients", OPTIMIZER))
    timed += [(block, "predict", BLOCKS) for block in model.model.mtp_blocks]
    before = [(owner, vars(owner).get(name)) for owner, name, _ in timed]
    for owner, name, part in timed:
        vars(owner)[name] = _timed(getattr(owner, name), clock, part)
    vars(work)["forward"] = _losses_timed(work.forward, clock)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (owner, name, _), (_, own) in zip(timed, before, strict=True):
            if own is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = own


def _timed(function: Callable[..., Any], clock: _Clock, part: str) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        clock.start(part, "forward")
        result = function(*given)
        clock.stop(part, "forward")
        return result

    return run


def _losses_timed(forward: Callable[..., Losses], clock: _Clock) -> Callable[..., Losses]:
    """The passes, whose losses tell the clock when their own part of the backward pass runs."""

    def run(*given: Any) -> Losses:
        losses = forward(*given)
        for loss in (losses.main, *losses.mtp):
            if loss.grad_fn is not None:
                loss.grad_fn.register_prehook(_told(clock.start, HEAD, "backward"))
                loss.grad_fn.register_hook(_told(clock.stop, HEAD, "backward"))
        return losses

    return run


def _told(report: Callable[[str, str], None], part: str, direction: str) -> Callable[..., None]:
    return lambda *given: report(part, direction)
