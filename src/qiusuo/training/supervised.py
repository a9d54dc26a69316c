"""Steps over given text, token by token: what ``pretrain``, ``sft`` and ``distil`` share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from qiusuo.data.batch import Batch
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.model.cost import measure
from qiusuo.training.losses import Window, language_model_losses, make_window, with_gaps
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
        self.batches = cast(Iterator[Batch], state.feed)

    def one_step(self) -> StepResult:
        return self.learn(next(self.batches))

    def learn(self, batch: Batch) -> StepResult:
        stage = self.stage
        windows = self.cut(batch)
        counts = [
            max(1, sum(int((w.labels[ahead] != IGNORE).sum()) for w in windows))
            for ahead in range(len(windows[0].labels))
        ]
        main = mtp = balance = torch.zeros((), device=self.device)
        for window in windows:
            with self.autocast():
                losses = self.forward(self.state.model, window)
            main = main + losses.main.detach() / counts[0]
            total = losses.main / counts[0]
            if losses.mtp:
                per_module = torch.stack(losses.mtp) / torch.tensor(counts[1:], device=self.device)
                total = total + stage.mtp_weight * per_module.mean()
                mtp = mtp + per_module.detach()
            balance = balance + losses.balance.detach() / len(windows)
            (total + stage.balance.sequence_weight * losses.balance / len(windows)).backward()
            self.load.add(losses.routings)
        loss = main.item()
        norm = self.apply_gradients(loss)
        more = {"balance_loss": balance.item()}
        if mtp.ndim:
            more["mtp_loss"] = mtp.mean().item()
        # What is packed is computed, counted in the loss or not.
        flops = self.flops_per_token * stage.batch_size * stage.sequence_length
        return StepResult(loss, norm, counts[0], more, flops)

    def cut(self, batch: Batch) -> list[Window]:
        """The micro-batches of one step."""
        stage = self.stage
        size = stage.micro_batch_size or stage.batch_size
        depth = self.state.model.config.num_nextn_predict_layers
        gaps = stage.position_gaps

        def rows(x_BS: Tensor, start: int) -> Tensor:
            return x_BS[start : start + size].to(self.device)

        windows = []
        for start in range(0, stage.batch_size, size):
            tokens_BS, documents_BS, valid_BS = (
                rows(part, start) for part in (batch.tokens_BS, batch.documents_BS, batch.valid_BS)
            )
            window = make_window(tokens_BS, documents_BS, valid_BS, depth, self.isolate)
            if gaps:
                seed = seed_of(f"{self.gaps_seed}/{self.state.step}/{start}")
                window = with_gaps(window, documents_BS, gaps, seed)
            windows.append(window)
        return windows
