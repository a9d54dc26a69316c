"""Everything a stage needs to go on as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from qiusuo.checkpoint.training_state import save_state
from qiusuo.data.loader import Loader
from qiusuo.model.transformer import Transformer


@dataclass
class StageState:
    """``step`` counts this stage's finished steps, ``run_step`` the whole run's, ``planned`` is
    the stage's length once it is fixed. ``seconds`` is time spent in training steps."""

    model: Transformer
    optimizers: list[Optimizer]
    loader: Loader
    stage: str
    planned: int
    step: int = 0
    run_step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    _COUNTERS = ("stage", "planned", "step", "run_step", "tokens", "seconds")

    def save(self, folder: Path) -> None:
        content: dict[str, Any] = {name: getattr(self, name) for name in self._COUNTERS}
        content |= {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loader": self.loader.state_dict(),
        }
        save_state(folder, content)

    def take_over(self, content: dict[str, Any]) -> None:
        """Go on from a checkpoint's content: of this stage all of it, of an earlier one the
        weights and what counts over the whole run."""
        self.model.load_state_dict(content["model"])
        self.run_step, self.tokens, self.seconds = (
            content[name] for name in ("run_step", "tokens", "seconds")
        )
        if content["stage"] != self.stage:
            return
        self.step, self.planned = content["step"], content["planned"]
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.loader.load_state_dict(content["loader"])
