"""The loop that all stages with an optimizer share.

One step is a whole batch: gradients are added, clipped and applied, then the router biases move by
the whole batch's expert counts. A step depends on nothing but the state before it, so a run that
was killed goes on with the same losses as one that was not.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qiusuo.model.fp8 import in_fp8
from qiusuo.model.transformer import Transformer
from qiusuo.training.balance import ExpertLoad
from qiusuo.training.hardware import matmul_peak
from qiusuo.training.parallel.matrices import own_part
from qiusuo.training.scene import Record, TrainingError
from qiusuo.training.schedule import learning_rate_share
from qiusuo.training.stages import LearningStage
from qiusuo.training.state import StageState

LOAD_EVERY = 10  # steps between expert loads in the log: they are long
PACE_STEPS = 10  # steps whose pace decides how many fit into `minutes`


@dataclass(frozen=True)
class StepResult:
    """Of one step: the loss, the gradient's norm before clipping, tokens with a loss, what else the
    log is told, and floating-point operations where they are known."""

    loss: float
    grad_norm: float
    tokens: int
    more: dict[str, Any] = field(default_factory=dict)
    flops: float | None = None


class Learning(ABC):
    """The steps of one stage. ``record`` is given one dict a step, in the log's form."""

    def __init__(self, stage: LearningStage, state: StageState, record: Record) -> None:
        self.stage, self.state, self.record = stage, state, record
        self.device = state.model.lm_head.weight.device
        self.dtype = torch.float32 if stage.precision == "float32" else torch.bfloat16
        state.model.recompute = stage.recompute
        self.load = ExpertLoad(state.model)
        # Where the routers are frozen (lora, esft) their biases are too.
        routers = state.model.routers().values()
        learn = all(router.weight.requires_grad for router in routers)
        self.bias_speed = stage.balance.bias_update_speed if learn else 0.0
        self.world = state.world
        peak = torch.tensor(matmul_peak(self.dtype, self.device.type), dtype=torch.float64)
        self.peak = self.world.sum(peak.to(self.device)).item()
        self.paces: deque[float] = deque(maxlen=PACE_STEPS)

    @abstractmethod
    def one_step(self) -> StepResult:
        """One whole batch: gradients, the optimizers' steps, and the expert loads added up. The
        counters of ``state`` are moved by ``run``."""
        ...

    def look(self, whole: bool) -> Iterator[dict[str, Any]]:
        return iter(())

    def close(self) -> None:
        return

    def run(self, after_step: Callable[[], bool]) -> None:
        """Step to the stage's end. ``after_step`` is called between steps, when the state is
        whole; training stops early where it returns true."""
        state = self.state
        while state.step < state.planned:
            self.world.traffic.take()  # looks and checkpoints are no part of a step
            start = time.perf_counter()
            result = self.one_step()
            self.load.add_up(self.world)
            seconds = time.perf_counter() - start
            state.step += 1
            state.run_step += 1
            state.tokens += result.tokens
            state.seconds += seconds
            self.paces.append(seconds)
            self.record(self.log_record(result, seconds))
            self.load.update_biases(self.bias_speed)
            if self.stage.minutes is not None and state.step == PACE_STEPS:
                state.planned = self.world.first(self.plan(self.stage.minutes))
            if self.enough():
                state.planned = state.step
            if after_step():
                return

    def enough(self) -> bool:
        """Whether the stage has reached what it was for, before its last step."""
        return False

    @contextmanager
    def autocast(self, model: Transformer | None = None) -> Iterator[None]:
        """Forward passes in the stage's precision; FP8 is for the model in training, or the one
        that is named."""
        precision = self.stage.precision
        fp8 = precision if precision in ("fp8", "fp8_ue8m0") else None
        autocast = torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)
        with autocast, in_fp8(model or self.state.model, fp8):
            yield

    def apply_gradients(self, loss: float) -> float:
        """Clip, step every optimizer at its share of the peak rate; the norm. TrainingError, with
        the weights as they were, where loss or norm is not finite."""
        state = self.state
        share = learning_rate_share(self.stage.schedule, state.step, state.planned)
        parameters = [p for p in state.trained() if p.grad is not None]
        norm = self.clip([own_part(p.grad) for p in parameters if p.grad is not None])
        if math.isfinite(norm) and math.isfinite(loss):
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * share
                optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        if math.isfinite(norm) and math.isfinite(loss):
            return norm
        step = state.run_step + 1
        self.record({"kind": "event", "text": f"step {step}: loss {loss}, norm {norm}"})
        raise TrainingError(
            f"step {step}: loss is {loss}, gradient norm {norm}: not finite. "
            "Lower the learning rates, or set precision to float32"
        )

    def clip(self, grads: list[Tensor]) -> float:
        """Scale the gradients, of which each process has its part, down to the norm that the
        recipe allows; their norm before."""
        norm = self.world.total_norm(torch.nn.utils.get_total_norm(grads))
        factor = self.stage.optimizer.clip / (norm + 1e-6)
        if factor < 1:
            for grad in grads:
                grad.mul_(factor)
        return norm.item()

    def plan(self, minutes: float) -> int:
        """Steps that fit into ``minutes`` at the median pace so far."""
        pace = statistics.median(self.paces)
        return min(self.stage.steps, max(PACE_STEPS + 1, int(minutes * 60 / pace)))

    def log_record(self, result: StepResult, seconds: float) -> dict[str, Any]:
        state = self.state
        entry: dict[str, Any] = {
            "kind": "step",
            "stage": state.stage,
            "step": state.run_step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": state.optimizers[-1].param_groups[0]["lr"],
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_second": result.tokens / seconds,
            **result.more,
        }
        if self.stage.minutes is not None and state.step <= PACE_STEPS:
            entry["minutes"] = self.stage.minutes  # the steps are still to be planned
        if result.flops is not None:
            entry["flops_per_second"] = result.flops / seconds
            entry["peak_share"] = result.flops / seconds / self.peak
        if self.world.size > 1:
            sent = torch.tensor(self.world.traffic.take(), dtype=torch.float64, device=self.device)
            entry["communication_bytes"] = int(self.world.sum(sent))
        if self.load.counts:
            entry["max_violation"] = list(self.load.max_violation().values())
            if state.run_step % LOAD_EVERY == 0 or state.step == state.planned:
                entry["expert_load"] = list(self.load.relative().values())
        return entry
