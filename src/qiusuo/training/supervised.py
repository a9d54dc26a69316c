"""Steps over given text, token by token: what ``pretrain``, ``sft`` and ``distil`` share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from qiusuo.data.batch import Batch
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.model.cost import measure
from qiusuo.training.losses import Window, language_model_losses, make_window, positions_with_gaps
from qiusuo.training.optimizers import Muon
from qiusuo.training.parallel.matrices import is_spread_matrix
from qiusuo.training.parallel.traffic import step_bytes
from qiusuo.training.scene import Record
from qiusuo.training.seeds import seed_of
from qiusuo.training.stages import SupervisedStage
from qiusuo.training.state import StageState
from qiusuo.training.steps import Learning, StepResult


class SupervisedSteps(Learning):
    """``isolate``: documents of a row neither see nor predict each other. ``seed``: of what a step
    draws by itself."""

    stage: SupervisedStage

    def __init__(
        self,
        stage: SupervisedStage,
        state: StageState,
        record: Record,
        isolate: bool,
        seed: int,
    ) -> None:
        super().__init__(stage, state, record)
        self.isolate, self.gaps_seed = isolate, f"{seed}/{stage.name}"
        self.forward = language_model_losses
        if stage.compile:
            self.forward = torch.compile(language_model_losses, dynamic=False)
        self.flops_per_token = measure(state.model.config).training_flops(stage.sequence_length)
        self.depth = state.model.config.num_nextn_predict_layers
        self.batches = cast(Iterator[Batch], state.feed)

    def one_step(self) -> StepResult:
        return self.learn(next(self.batches))

    def learn(self, batch: Batch) -> StepResult:
        """``batch`` is all processes'; this one learns its rows, and the sums are over all."""
        stage, world = self.stage, self.world
        windows = self.cut(batch)
        counted = [sum(_labels(w, ahead) for w in windows) for ahead in range(self.depth + 1)]
        counts = world.sum(torch.tensor(counted, device=self.device)).clamp_min(1)
        nats = torch.zeros(self.depth + 2, device=self.device)  # main, each MTP module, balance
        for window in windows:
            with self.autocast():
                losses = self.forward(self.state.model, window)
            main = losses.main / counts[0]
            total, parts = main, [main]
            if losses.mtp:
                per_module = torch.stack(losses.mtp) / counts[1:]
                total = total + stage.mtp_weight * per_module.mean()
                parts += per_module.unbind()
            # Every row counts alike, however a batch is cut.
            balance = losses.balance * (len(window.tokens_BS) / stage.batch_size)
            (total + stage.balance.sequence_weight * balance).backward()
            nats += torch.stack([*parts, balance]).detach()
            self.load.add(losses.routings)
        nats = world.sum(nats)
        loss = nats[0].item()
        norm = self.apply_gradients(loss)
        more: dict[str, Any] = {"balance_loss": nats[-1].item()}
        if world.size > 1:
            more["communication_bytes_modelled"] = self.modelled_bytes()
        if self.depth:
            more["mtp_loss"] = nats[1:-1].mean().item()
        # What is packed is computed, counted in the loss or not.
        flops = self.flops_per_token * stage.batch_size * stage.sequence_length
        return StepResult(loss, norm, int(counts[0]), more, flops)

    def modelled_bytes(self) -> int:
        """What all processes should send in one step: see ``step_bytes``."""
        stage, size = self.stage, self.world.size
        matrices = [
            parameter
            for optimizer in self.state.optimizers
            if isinstance(optimizer, Muon)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if is_spread_matrix(parameter)
        ]
        rows = stage.batch_size // size
        passes = -(-rows // min(rows, stage.micro_batch_size or rows))
        # Token counts and the norm in eight bytes each, losses and expert counts in four.
        experts = sum(len(router.weight) for router in self.state.model.routers().values())
        told = 8 * (self.depth + 2) + 4 * (self.depth + 2) + 4 * experts
        itemsize = self.dtype.itemsize
        visits = self.visit_bytes() if self.world.expert_parallel else 0
        return step_bytes(self.state.model, passes, matrices, itemsize, told, visits, size)

    def visit_bytes(self) -> int:
        """Of a step's rows on their way to experts: there and back, forward and backward; and once
        the expert's number, in eight bytes."""
        model, stage = self.state.model, self.stage
        tokens = stage.batch_size * stage.sequence_length
        choices = [router.choice.per_token for router in model.routers().values()]
        row = 4 * model.config.hidden_size * self.dtype.itemsize + 8
        return tokens * sum(choices) * row

    def cut(self, batch: Batch) -> list[Window]:
        """This process's rows, as the micro-batches of one step."""
        stage = self.stage
        own = self.world.share(stage.batch_size)
        positions_BT: Tensor | None = None
        if stage.position_gaps:  # drawn for the whole batch: the same however it is cut
            length = batch.tokens_BS.shape[1] - 1 - self.depth
            seed = seed_of(f"{self.gaps_seed}/{self.state.step}")
            gaps = stage.position_gaps
            positions_BT = positions_with_gaps(batch.documents_BS, length, gaps, seed)
        windows = []
        size = stage.micro_batch_size or stage.batch_size
        for start in range(own.start, own.stop, size):
            rows = slice(start, min(start + size, own.stop))
            parts = (batch.tokens_BS, batch.documents_BS, batch.valid_BS)
            each = [part[rows].to(self.device) for part in parts]
            window = make_window(each[0], each[1], each[2], self.depth, self.isolate)
            if positions_BT is not None:
                window = window._replace(positions_BT=positions_BT[rows].to(self.device))
            windows.append(window)
        return windows


def _labels(window: Window, ahead: int) -> int:
    return int((window.labels[ahead] != IGNORE).sum())
