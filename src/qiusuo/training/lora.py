"""LoRA (arXiv:2106.09685): train two thin matrices beside each frozen one.

A projection W [O, I] becomes W + alpha / R · B A with B [O, R] and A [R, I]; B begins at zero, so
the model begins as it was. In training a hook on each projection adds B (A x) to what W x gives,
and the base weights may stay in bf16: A and B are float32. The engine reads weights where they
stand (decoding uses MLA's kv_b_proj without calling it), so for rollouts they are merged.

Without its adapter the model is what it was before training, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qiusuo.checkpoint.adapter_files import StoredAdapter, read_adapter, write_adapter
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.model.layers import Linear
from qiusuo.model.low_bit import is_low_bit
from qiusuo.model.transformer import Transformer
from qiusuo.training.name_patterns import named_by

# R rank, I in, O out.


@dataclass(frozen=True)
class LoRALayer:
    """One projection's adapter."""

    module: Linear
    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scale: float

    def add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The forward hook. Under autocast the products run in its type, else in float32."""
        (x,) = args
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.a_RI.dtype)
        low = F.linear(x, self.a_RI) * self.scale
        return out + F.linear(low, self.b_OR).to(out.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scale · B A, rounded once to W's type."""
        weight = self.module.weight
        with torch.autocast(weight.device.type, enabled=False):
            return (weight.float() + self.scale * (self.b_OR @ self.a_RI)).to(weight.dtype)


def adaptable(model: Transformer) -> dict[str, Linear]:
    """Modules that can have an adapter: every projection but the head, whose weight the losses
    read past it. Routers and routed experts are no such modules."""
    if is_low_bit(model):
        raise CheckpointError(
            "the model is quantised, and an adapter goes beside plain weights and into them: begin "
            "with the model that it was made from"
        )
    found = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    found.pop("lm_head")
    return found


class LoRA:
    """An adapter on a model, whose own parameters are frozen from here on.

    ``modules``: patterns of names (see ``named_by``), all projections if empty; RecipeError where
    one fits none. Nothing is added to the model's state dict."""

    def __init__(
        self,
        model: Transformer,
        generator: torch.Generator,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        modules: Sequence[str] = (),
    ) -> None:
        self.rank, self.alpha = rank, alpha
        known = adaptable(model)
        names = named_by(modules or ("*",), list(known), "projection that can have an adapter")
        self.layers = {name: _new_layer(known[name], generator, rank, alpha) for name in names}
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._hooks: list[RemovableHandle] = []
        self._attach()

    def parameters(self) -> list[nn.Parameter]:
        """What is to be trained, always in the same order."""
        return [p for layer in self.layers.values() for p in (layer.a_RI, layer.b_OR)]

    def state_dict(self) -> dict[str, Tensor]:
        """The matrices themselves, not copies, by names as in PEFT's files."""
        return {
            f"{name}.{which}.weight": matrix.detach()
            for name, layer in self.layers.items()
            for which, matrix in (("lora_A", layer.a_RI), ("lora_B", layer.b_OR))
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """CheckpointError, and nothing changed, where it is another adapter's."""
        own = self.state_dict()
        for name in own.keys() | state.keys():
            theirs = list(state[name].shape) if name in state else "nothing"
            mine = list(own[name].shape) if name in own else "nothing"
            if mine != theirs:
                raise CheckpointError(
                    f"{name} of the adapter is {mine}, what is to be loaded has {theirs}: rank and "
                    "modules must be those it was trained with"
                )
        for name, matrix in own.items():
            matrix.copy_(state[name])

    # -- with it, without it, inside the weights --------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it was before the adapter."""
        self._detach()
        try:
            yield
        finally:
            self._attach()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The adapter inside the weights, for whoever reads them; afterwards they are what they
        were, bit for bit. An engine on this model must be told: ``swap_weights({})`` inside.
        Holds a copy of the weights that have an adapter."""
        with self.disabled():
            kept = [(layer, layer.module.weight.detach().clone()) for layer in self._all()]
            try:
                self._merge()
                yield
            finally:
                with torch.no_grad():
                    for layer, weight in kept:
                        layer.module.weight.copy_(weight)

    def merged_weights(self) -> dict[str, Tensor]:
        """New tensors of the weights that have an adapter, by the model's names: what
        ``swap_weights`` of an engine takes that runs a model of its own."""
        return {f"{name}.weight": layer.merged_weight() for name, layer in self.layers.items()}

    def merge_for_good(self) -> None:
        """Leave the adapter in the weights; the model is an ordinary one again."""
        self._detach()
        self._merge()
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    @torch.no_grad()
    def _merge(self) -> None:
        for layer in self._all():
            layer.module.weight.copy_(layer.merged_weight())

    def _all(self) -> list[LoRALayer]:
        return list(self.layers.values())

    def _attach(self) -> None:
        self._hooks = [layer.module.register_forward_hook(layer.add) for layer in self._all()]

    def _detach(self) -> None:
        if not self._hooks:
            raise RuntimeError("the adapter is merged or disabled already")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -- files ------------------------------------------------------------------------------

    def save(self, folder: str | Path, base: str, dtype: torch.dtype = torch.float32) -> Path:
        """Write it as PEFT does; ``base`` names the model it belongs to. CheckpointError where
        the folder holds something else or the disk refuses."""
        matrices: dict[str, tuple[Tensor, Tensor]] = {
            name: (layer.a_RI, layer.b_OR) for name, layer in self.layers.items()
        }
        return write_adapter(StoredAdapter(base, self.rank, self.alpha, matrices), folder, dtype)

    @classmethod
    def load(cls, model: Transformer, folder: str | Path) -> LoRA:
        """Put a stored adapter on a model. CheckpointError where it belongs to another."""
        stored = read_adapter(folder)
        known = adaptable(model)
        for name, (a_RI, b_OR) in stored.matrices.items():
            theirs = [b_OR.shape[0], a_RI.shape[1]]
            mine = list(known[name].weight.shape) if name in known else "nothing that can have one"
            if mine != theirs:
                raise CheckpointError(
                    f"{folder}: {name} has an adapter for a weight {theirs}, the model has {mine}: "
                    f"it belongs to another model ({stored.base or 'it does not say which'})"
                )
        adapter = cls(
            model,
            torch.Generator(),
            rank=stored.rank,
            alpha=stored.alpha,
            modules=tuple(stored.matrices),
        )
        for name, pair in stored.matrices.items():
            layer = adapter.layers[name]
            with torch.no_grad():
                layer.a_RI.copy_(pair[0])
                layer.b_OR.copy_(pair[1])
        return adapter


def _new_layer(module: Linear, generator: torch.Generator, rank: int, alpha: float) -> LoRALayer:
    """A as ``nn.Linear`` begins (uniform, ±1/√I), B zero."""
    out_size, in_size = module.weight.shape
    kind: dict[str, Any] = {"device": module.weight.device, "dtype": torch.float32}
    a_RI = torch.empty(rank, in_size)
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    b_OR = torch.zeros(out_size, rank, **kind)
    return LoRALayer(module, nn.Parameter(a_RI.to(**kind)), nn.Parameter(b_OR), alpha / rank)
