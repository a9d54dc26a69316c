"""Everything a stage needs to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.nn import Parameter
from torch.optim import Optimizer

from qiusuo.checkpoint.load import as_checkpoint, checkpoint_of
from qiusuo.checkpoint.stored import Checkpoint
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.transformer import Transformer
from qiusuo.training.lora import LoRA
from qiusuo.training.parallel.sharding import empty_copy, gather_into, held_like
from qiusuo.training.parallel.world import ALONE, World
from qiusuo.training.parallel.writing import brought_together


class Feed(Protocol):
    """What a stage takes its work from; its state is plain numbers, texts and tensors."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class StageState:
    """``step`` counts this stage's finished steps, ``run_step`` the whole run's, ``planned`` is
    the stage's length once it is fixed. ``seconds`` is time spent in training steps, ``ends`` the
    run's step at which each finished stage ended. With an ``adapter`` the model's own weights are
    frozen and not kept. Of several processes each has a state, in which weights and optimizers are
    its own part, and all else is the same."""

    model: Transformer
    optimizers: list[Optimizer]
    feed: Feed
    stage: str
    planned: int
    adapter: LoRA | None = None
    world: World = ALONE
    step: int = 0
    run_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shown = empty_copy(self.model, self.world)

    _COUNTERS = ("stage", "planned", "step", "run_step", "tokens", "seconds", "ends")

    def trained(self) -> Iterator[Parameter]:
        """Every parameter that an optimizer moves."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def gather(self) -> None:
        """Bring ``shown`` up to date, by all processes together."""
        gather_into(self.shown, self.model, self.world)

    @contextmanager
    def whole_model(self) -> Iterator[Transformer]:
        """The model as it is used, of this moment or of the last ``gather``: with the adapter
        inside its weights, where there is one."""
        with nullcontext() if self.adapter is None else self.adapter.merged():
            yield self.shown

    @contextmanager
    def stored(
        self, tokenizer: Tokenizer, sampling: Mapping[str, float]
    ) -> Iterator[Checkpoint | None]:
        """The model of this moment as a checkpoint's writer wants it, adapter inside. To be asked
        by all processes together; the first alone gets it, and the others serve it meanwhile."""
        if self.world.size == 1:
            with self.whole_model() as model:
                yield checkpoint_of(model, tokenizer, sampling)
            return
        with brought_together(self.model, self.world) as tensors:
            config = self.model.config
            yield as_checkpoint(config, tensors, tokenizer, sampling) if tensors else None

    def content(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values and the tensors themselves, not copies."""
        content: dict[str, Any] = {name: getattr(self, name) for name in self._COUNTERS}
        content |= {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "feed": self.feed.state_dict(),
        }
        return content | weights(self.model, self.adapter)

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
            optimizer.load_state_dict(_as_held(optimizer, saved))
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
        own, saved = model.state_dict(), content["model"]
        held = {
            name: held_like(each, own[name]) if name in own else each
            for name, each in saved.items()
        }
        model.load_state_dict(held)


def _as_held(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved optimizer's state in the form in which the parameters are held here."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        place: {name: held_like(value, parameters[place]) for name, value in values.items()}
        for place, values in saved["state"].items()
    }
    return saved | {"state": state}
