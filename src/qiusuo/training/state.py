"""Everything a stage needs to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch.nn import Parameter
from torch.optim import Optimizer

from qiusuo.checkpoint.training_state import save_state
from qiusuo.model.transformer import Transformer
from qiusuo.training.lora import LoRA


class Feed(Protocol):
    """What a stage takes its work from; its state is plain numbers, texts and tensors."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class StageState:
    """``step`` counts this stage's finished steps, ``run_step`` the whole run's, ``planned`` is
    the stage's length once it is fixed. ``seconds`` is time spent in training steps, ``ends`` the
    run's step at which each finished stage ended. With an ``adapter`` the model's own weights are
    frozen and not kept."""

    model: Transformer
    optimizers: list[Optimizer]
    feed: Feed
    stage: str
    planned: int
    adapter: LoRA | None = None
    step: int = 0
    run_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)

    _COUNTERS = ("stage", "planned", "step", "run_step", "tokens", "seconds", "ends")

    def trained(self) -> Iterator[Parameter]:
        """Every parameter that an optimizer moves."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    @contextmanager
    def whole_model(self) -> Iterator[Transformer]:
        """The model as it is used: with the adapter inside its weights, where there is one."""
        with nullcontext() if self.adapter is None else self.adapter.merged():
            yield self.model

    def save(self, folder: Path) -> None:
        content: dict[str, Any] = {name: getattr(self, name) for name in self._COUNTERS}
        content |= {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "feed": self.feed.state_dict(),
        }
        save_state(folder, content | weights(self.model, self.adapter))

    def take_over(self, content: dict[str, Any]) -> None:
        """Go on from a checkpoint's content, whose weights the model has already: of this stage
        all of it, of an earlier one what counts over the whole run."""
        self.run_step, self.tokens, self.seconds, self.ends = (
            content[name] for name in ("run_step", "tokens", "seconds", "ends")
        )
        if content["stage"] != self.stage:
            return
        self.step, self.planned = content["step"], content["planned"]
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.feed.load_state_dict(content["feed"])


def weights(model: Transformer, adapter: LoRA | None) -> dict[str, Any]:
    """What a checkpoint keeps of a model: all of it, or the adapter alone."""
    if adapter is not None:
        return {"adapter": adapter.state_dict()}
    return {"model": model.state_dict()}


def take_weights(model: Transformer, adapter: LoRA | None, content: dict[str, Any]) -> None:
    """Put a checkpoint's weights into the model, or into the adapter beside it."""
    if adapter is not None:
        adapter.load_state_dict(content["adapter"])
    else:
        model.load_state_dict(content["model"])
