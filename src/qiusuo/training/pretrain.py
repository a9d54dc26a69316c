"""The stage ``pretrain``: predict the next tokens of text, step after step.

One step is a whole batch: its micro-batches' gradients are added, clipped and applied, then the
router biases move by the whole batch's expert counts. A step depends on nothing but the state
before it, so a run that was killed goes on with the same losses as one that was not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qiusuo.data.batch import Batch
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.model.cost import measure
from qiusuo.training.balance import ExpertLoad
from qiusuo.training.hardware import matmul_peak
from qiusuo.training.losses import Window, language_model_losses, make_window
from qiusuo.training.recipe import PretrainStage
from qiusuo.training.schedule import learning_rate_share
from qiusuo.training.state import StageState

LOAD_EVERY = 10  # steps between expert loads in the log: they are long
PACE_STEPS = 10  # steps whose pace decides how many fit into `minutes`


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


@dataclass(frozen=True)
class StepResult:
    """Of one step: mean losses in nats per token, gradient norm before clipping."""

    loss: float
    mtp_loss: list[float]
    balance_loss: float
    grad_norm: float
    tokens: int


class Pretraining:
    """The steps of one stage. ``record`` is given one dict a step, in the log's form."""

    def __init__(
        self, stage: PretrainStage, state: StageState, record: Callable[[dict[str, Any]], None]
    ) -> None:
        self.stage, self.state, self.record = stage, state, record
        self.device = state.model.lm_head.weight.device
        self.dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
        self.load = ExpertLoad(state.model)
        self.forward = language_model_losses
        if stage.compile:
            self.forward = torch.compile(language_model_losses, dynamic=False)
        self.flops_per_token = measure(state.model.config).training_flops(stage.sequence_length)
        self.peak = matmul_peak(self.dtype, self.device.type)
        self.paces: deque[float] = deque(maxlen=PACE_STEPS)

    def run(self, after_step: Callable[[], bool]) -> None:
        """Step to the stage's end. ``after_step`` is called between steps, when the state is
        whole; training stops early where it returns true."""
        state = self.state
        batches = iter(state.loader)
        while state.step < state.planned:
            start = time.perf_counter()
            result = self.one_step(next(batches))
            seconds = time.perf_counter() - start
            state.step += 1
            state.run_step += 1
            state.tokens += result.tokens
            state.seconds += seconds
            self.paces.append(seconds)
            self.record(self.log_record(result, seconds))
            self.load.update_biases(self.stage.balance.bias_update_speed)
            if self.stage.minutes is not None and state.step == PACE_STEPS:
                state.planned = self.plan(self.stage.minutes)
            if after_step():
                return

    def one_step(self, batch: Batch) -> StepResult:
        stage, state = self.stage, self.state
        share = learning_rate_share(stage.schedule, state.step, state.planned)
        windows = self.cut(batch)
        counts = [
            max(1, sum(int((w.labels[ahead] != IGNORE).sum()) for w in windows))
            for ahead in range(len(windows[0].labels))
        ]
        main = mtp = balance = torch.zeros((), device=self.device)
        for window in windows:
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                losses = self.forward(state.model, window)
            main = main + losses.main.detach() / counts[0]
            total = losses.main / counts[0]
            if losses.mtp:
                per_module = torch.stack(losses.mtp) / torch.tensor(counts[1:], device=self.device)
                total = total + stage.mtp_weight * per_module.mean()
                mtp = mtp + per_module.detach()
            balance = balance + losses.balance.detach() / len(windows)
            (total + stage.balance.sequence_weight * losses.balance / len(windows)).backward()
            self.load.add(losses.routings)
        norm = self.apply_gradients(share)
        loss = main.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.record(
                {"kind": "event", "text": f"step {state.run_step + 1}: loss {loss}, norm {norm}"}
            )
            raise TrainingError(
                f"step {state.run_step + 1}: loss is {loss}, gradient norm {norm}: not finite. "
                "Lower the learning rates, or set precision to float32"
            )
        mtp_loss = mtp.flatten().tolist() if mtp.ndim else []
        return StepResult(loss, mtp_loss, balance.item(), norm, counts[0])

    def cut(self, batch: Batch) -> list[Window]:
        """The micro-batches of one step."""
        stage = self.stage
        size = stage.micro_batch_size or stage.batch_size
        depth = self.state.model.config.num_nextn_predict_layers

        def rows(x_BS: Tensor, start: int) -> Tensor:
            return x_BS[start : start + size].to(self.device)

        return [
            make_window(
                rows(batch.tokens_BS, start),
                rows(batch.documents_BS, start),
                rows(batch.valid_BS, start),
                depth,
                stage.data.isolate_documents,
            )
            for start in range(0, stage.batch_size, size)
        ]

    def apply_gradients(self, share: float) -> float:
        """Clip, step every optimizer at its share of the peak rate; returns the norm."""
        parameters = [p for p in self.state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.stage.optimizer.clip).item()
        if math.isfinite(norm):
            for optimizer in self.state.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * share
                optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return norm

    def plan(self, minutes: float) -> int:
        """Steps that fit into ``minutes`` at the median pace so far."""
        pace = statistics.median(self.paces)
        return min(self.stage.steps, max(PACE_STEPS + 1, int(minutes * 60 / pace)))

    def log_record(self, result: StepResult, seconds: float) -> dict[str, Any]:
        state = self.state
        rate = result.tokens / seconds
        entry: dict[str, Any] = {
            "kind": "step",
            "stage": state.stage,
            "step": state.run_step,
            "loss": result.loss,
            "balance_loss": result.balance_loss,
            "grad_norm": result.grad_norm,
            "lr": state.optimizers[-1].param_groups[0]["lr"],
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_second": rate,
            "flops_per_second": rate * self.flops_per_token,
            "peak_share": rate * self.flops_per_token / self.peak,
        }
        if result.mtp_loss:
            entry["mtp_loss"] = sum(result.mtp_loss) / len(result.mtp_loss)
        if self.load.counts:
            entry["max_violation"] = list(self.load.max_violation().values())
            if state.run_step % LOAD_EVERY == 0 or state.step == state.planned:
                entry["expert_load"] = list(self.load.relative().values())
        return entry
