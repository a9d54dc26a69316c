"""Which columns of a weight matter: measured on text, so that four bits are spent where they count.

A weight's rounding error reaches the output times the number it is multiplied with. So the error of
column i matters as the mean square of input i, and that differs by orders of magnitude between the
columns of a model that reads text. Quantising then chooses each block's scale by the error weighted
so: the diagonal of what GPTQ (arXiv:2210.17323) uses whole, an importance matrix in llama.cpp.

Routed experts see only their own tokens. One that the text rarely wakes has its columns' squares
drawn towards the mean of all tokens of its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.load import load_model
from qiusuo.checkpoint.stored import Checkpoint, Progress
from qiusuo.checkpoint.tensors import Part
from qiusuo.data.corpora import open_corpus
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.layers import Linear
from qiusuo.model.moe import Experts, Routing
from qiusuo.model.transformer import Transformer

# M tokens, I in, E experts, D hidden, F expert width.

WINDOW = 512  # tokens that are read together
PRIOR = 32  # tokens' worth of the layer's mean in an expert's own
FLOOR = 1e-3  # of a matrix's mean: no column counts for nothing


@dataclass
class _Squares:
    """Sums of squares of a matrix's inputs [..., I], and how many rows were summed [...]."""

    sums: Tensor
    counts: Tensor

    def importance(self) -> Tensor:
        """Mean squares [..., I], about 1 on average."""
        mean_I = self.sums.view(-1, self.sums.shape[-1]).sum(0) / self.counts.sum().clamp_min(1)
        drawn = (self.sums + PRIOR * mean_I) / (self.counts[..., None] + PRIOR)
        whole = mean_I.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return drawn / whole + FLOOR


@dataclass(frozen=True)
class Calibration:
    """``importance``: by a weight's name in the state dict, [I], or [E, I] for a stack of experts.
    ``tokens``: how many were read."""

    importance: dict[str, Tensor]
    tokens: int

    def of(self, part: Part) -> Tensor | None:
        """Of the columns of one of a checkpoint's tensors [I]; None for one that was not seen."""
        found = self.importance.get(part.name)
        return found if found is None or part.expert is None else found[part.expert]


def calibrate(
    model: Transformer, rows: Sequence[Sequence[int]], progress: Progress | None = None
) -> Calibration:
    """Let the model read ``rows`` of token ids. CheckpointError where there are none."""
    if not any(rows):
        raise CheckpointError("there is nothing to calibrate with: the text has no tokens")
    found: dict[str, _Squares] = {}
    device, done, whole = model.lm_head.weight.device, 0, sum(map(len, rows))
    with torch.no_grad(), _hooks(model, found):
        for row in rows:
            _read(model, torch.tensor([list(row)], device=device))
            done += len(row)
            if progress is not None:
                progress(done, whole)
    return Calibration({name: one.importance().cpu() for name, one in found.items()}, whole)


def calibrate_on(
    checkpoint: Checkpoint, texts: Sequence[str], tokens: int, progress: Progress | None = None
) -> Calibration:
    """Load a checkpoint in bfloat16 and let it read about so many tokens of ``texts``: corpora by
    name, files or folders. CheckpointError where it has no tokenizer or memory is short, DataError
    for a text that cannot be read."""
    tokenizer = checkpoint.read_tokenizer()
    if tokenizer is None:
        raise CheckpointError(f"{checkpoint.place} has no tokenizer to read text with")
    corpora = [open_corpus(text).documents() for text in texts]
    context = checkpoint.config.max_position_embeddings
    rows = token_rows(tokenizer, corpora, tokens, context)
    return calibrate(load_model(checkpoint, dtype=torch.bfloat16), rows, progress)


def token_rows(
    tokenizer: Tokenizer, texts: Iterable[Iterable[str]], tokens: int, context: int
) -> list[list[int]]:
    """About so many tokens, as many of each of ``texts`` (documents each), in rows of at most
    WINDOW tokens and ``context``."""
    width, sources = min(WINDOW, context), list(texts)
    rows: list[list[int]] = []
    for documents in sources:
        left = tokens // len(sources)
        for document in documents:
            ids = [*tokenizer.text_start, *tokenizer.encode(document)][:left]
            rows += [ids[start : start + width] for start in range(0, len(ids), width)]
            left -= len(ids)
            if left <= 0:
                break
    return rows


def _read(model: Transformer, tokens_1T: Tensor) -> None:
    """A pass through all that is quantised: blocks, MTP modules, the head."""
    hidden = model(tokens_1T)
    model.logits(hidden.x_BTD[:, -1:])
    x_BTD = hidden.x_BTD
    for depth in range(model.config.num_nextn_predict_layers):
        length = tokens_1T.shape[1] - depth - 1
        if length < 1:
            return
        next_1T = tokens_1T[:, depth + 1 :]
        context = model.context(tokens_1T[:, :length])
        x_BTD = model.predict_ahead(x_BTD[:, :length], next_1T, depth, context).x_BTD


@contextmanager
def _hooks(model: nn.Module, found: dict[str, _Squares]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            handles.append(module.register_forward_pre_hook(_of_linear(f"{name}.weight", found)))
        elif isinstance(module, Experts):
            handles.append(module.register_forward_pre_hook(_of_experts(name, found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_linear(name: str, found: dict[str, _Squares]) -> Callable[..., None]:
    def see(module: nn.Module, given: tuple[Any, ...]) -> None:
        x_MI = given[0].flatten(0, -2).float()
        _add(found, name, x_MI.square().sum(0), torch.tensor(float(len(x_MI))))

    return see


def _of_experts(name: str, found: dict[str, _Squares]) -> Callable[..., None]:
    def see(module: Experts, given: tuple[Tensor, Routing]) -> None:
        x_MD, routing = given
        experts, _, width = module.down_proj.shape
        into_ED = torch.zeros(experts, x_MD.shape[1])
        inner_EF, count_E = torch.zeros(experts, width), torch.zeros(experts)
        for expert in routing.indices_MK.unique().tolist():
            token, choice = torch.where(routing.indices_MK == expert)
            x_RD = x_MD[token]
            gate_RF, up_RF = F.linear(x_RD, module.gate_up_proj[expert]).chunk(2, dim=-1)
            weight_R1 = routing.weights_MK[token, choice, None].float()
            act_RF = F.silu(gate_RF.float()) * up_RF.float() * weight_R1
            into_ED[expert] = x_RD.float().square().sum(0).cpu()
            inner_EF[expert] = act_RF.square().sum(0).cpu()
            count_E[expert] = len(token)
        _add(found, f"{name}.gate_up_proj", into_ED, count_E)
        _add(found, f"{name}.down_proj", inner_EF, count_E)

    return see


def _add(found: dict[str, _Squares], name: str, sums: Tensor, counts: Tensor) -> None:
    sums, counts = sums.cpu(), counts.cpu()
    if name in found:
        found[name].sums += sums
        found[name].counts += counts
    else:
        found[name] = _Squares(sums, counts.clone())
