"""Draws tokens from rows of logits.

A token is a pure function of its row of logits, its request and its place in the answer: the
random number comes from Philox, a generator that is a function of a key (seed, choice) and a
counter (the place), not of what was drawn before. So neither the batch, nor the order of work, nor
a draft that is drawn ahead and thrown away can change an answer.

Every row is worked on by itself, in numpy, which has no threads whose number could change a sum;
rows that ask for nothing but a temperature go side by side, to the same bits (plain_draws.py).
What may be drawn from a row, and where in it a number falls, is in candidates.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qiusuo.engine.candidates import (
    Floats,
    candidates,
    filtered,
    largest_of,
    mass_of,
    place_of,
    weights_of,
)
from qiusuo.engine.philox import uniform
from qiusuo.engine.plain_draws import FEWEST, WIDEST, draw_plain
from qiusuo.engine.sampling import Sampling

# R rows, W vocabulary.


@dataclass
class Row:
    """One place in a pass that wants a token.

    ``prompt`` and ``answer`` are the history for penalties (lists; arrays are read faster),
    ``position`` how many answer tokens come before this one, ``choice`` which of n answers it is.
    ``allowed_W`` is a constraint's bool mask. ``banned`` are tokens that may not come yet: end
    tokens while fewer than ``min_tokens`` are out. A ban that would leave nothing of what a
    constraint allows is lifted: a finished JSON object cannot be made longer."""

    sampling: Sampling
    prompt: Sequence[int]
    answer: Sequence[int]
    position: int
    choice: int = 0
    allowed_W: Tensor | None = None
    banned: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Drawn:
    """``logprob``: log p under the model itself (temperature 1, nothing filtered).
    ``top``: (id, logprob) of the likeliest tokens, likeliest first, of equals the lower id."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class BadLogits:
    """A row from which nothing can be drawn, and why."""

    reason: str


def draw(logits_RW: Tensor, rows: Sequence[Row]) -> list[Drawn | BadLogits]:
    """One token per row of float logits [R, W]; a bad row spoils no other."""
    all_RW = _array(logits_RW)
    plain: list[int] = []
    if len(rows) >= FEWEST and all_RW.shape[1] <= WIDEST:
        plain = _plain(all_RW, rows)
    if len(plain) < FEWEST:
        return [_draw_row(logits_W, row) for logits_W, row in zip(all_RW, rows, strict=True)]
    together = _draw_together(all_RW, rows, plain)
    if len(plain) == len(rows):
        return list(together)
    drawn: dict[int, Drawn | BadLogits] = dict(zip(plain, together, strict=True))
    return [
        drawn[place] if place in drawn else _draw_row(all_RW[place], row)
        for place, row in enumerate(rows)
    ]


def _plain(all_RW: Floats, rows: Sequence[Row]) -> list[int]:
    """Those of which logits and a temperature are all that decides, and nothing is to be told but
    the token. What is wrong with a row whose logits are not numbers is told by itself."""
    finite_R = np.isfinite(all_RW.max(1)).tolist()
    # Looked at once where answers share it, as those to one request do.
    asked = {id(row.sampling): row.sampling for row in rows}
    plain = {number for number, sampling in asked.items() if _only_tempered(sampling)}
    return [
        place
        for place, (row, finite) in enumerate(zip(rows, finite_R, strict=True))
        if finite and id(row.sampling) in plain and row.allowed_W is None and not row.banned
    ]


def _only_tempered(sampling: Sampling) -> bool:
    drawable = sampling.seed is not None or sampling.temperature == 0
    return drawable and not (
        sampling.logprobs or filtered(sampling) or sampling.logit_bias or looks_back(sampling)
    )


def _changed(row: Row) -> bool:
    """Whether something is done to the logits before it is drawn from them."""
    sampling = row.sampling
    return bool(
        row.allowed_W is not None or row.banned or sampling.logit_bias or looks_back(sampling)
    )


def looks_back(sampling: Sampling) -> bool:
    """Whether a draw depends on the tokens before it: else a row may leave them out."""
    return sampling.repetition_penalty != 1 or _counted(sampling)


def _counted(sampling: Sampling) -> bool:
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _draw_together(all_RW: Floats, rows: Sequence[Row], plain: list[int]) -> list[Drawn]:
    """``_draw_row`` for plain rows, side by side."""
    logits_RW = all_RW if len(plain) == len(rows) else all_RW[plain]
    chosen = [rows[place] for place in plain]
    seeds = [row.sampling.seed or 0 for row in chosen]
    choices, positions = [row.choice for row in chosen], [row.position for row in chosen]
    numbers = (np.array(words, np.uint64) for words in (seeds, choices, positions))
    temperature_R = np.array([row.sampling.temperature for row in chosen], np.float64)
    return list(map(Drawn, *draw_plain(np.ascontiguousarray(logits_RW), temperature_R, *numbers)))


def token_logprobs(
    logits_RW: Tensor, targets: Sequence[int], top: int = 0
) -> list[Drawn | BadLogits]:
    """Log p of a given token per row of logits [R, W], and of the ``top`` likeliest."""
    answers: list[Drawn | BadLogits] = []
    for logits_W, target in zip(_array(logits_RW), targets, strict=True):
        largest = float(logits_W.max())
        bad = _fault(largest)
        answers.append(bad or _told(logits_W, largest, int(target), top))
    return answers


def _draw_row(logits_W: Floats, row: Row) -> Drawn | BadLogits:
    sampling = row.sampling
    adjusted_W = _adjusted(logits_W, row)
    likeliest = int(adjusted_W.argmax())  # of equals the first; NaN where there is one
    largest = float(logits_W.max()) if adjusted_W is not logits_W else float(logits_W[likeliest])
    bad = _fault(largest) or _fault(float(adjusted_W[likeliest]))
    if bad is not None:
        return bad
    token = likeliest
    if sampling.temperature > 0:
        if sampling.seed is None:
            raise ValueError("a draw needs a seed; a Request has one")
        number = uniform(sampling.seed, row.choice, row.position)
        token = _pick(adjusted_W, sampling, number)
    return _told(logits_W, largest, token, sampling.logprobs or 0)


def _pick(adjusted_W: Floats, sampling: Sampling, number: float) -> int:
    """The token at which the running mass passes ``number`` of the whole."""
    if not filtered(sampling):
        weights_W = weights_of(adjusted_W, adjusted_W.max(), sampling.temperature)
        return place_of(weights_W, number * mass_of(weights_W))
    ids_K, weights_K = candidates(adjusted_W, sampling)
    return int(ids_K[place_of(weights_K, number * mass_of(weights_K))])


def _adjusted(logits_W: Floats, row: Row) -> Floats:
    """Logits with bias, penalties and mask; the same array where the request has none."""
    if not _changed(row):
        return logits_W
    sampling = row.sampling
    adjusted_W = logits_W.copy()
    for token, bias in sampling.logit_bias.items():
        if token < len(adjusted_W):
            adjusted_W[token] += bias
    if sampling.repetition_penalty != 1:
        seen = np.concatenate([np.asarray(p, np.int64) for p in (row.prompt, row.answer)])
        was, penalty = adjusted_W[seen], sampling.repetition_penalty
        adjusted_W[seen] = np.where(was < 0, was * penalty, was / penalty)  # once, however often
    if _counted(sampling):
        ids, counts = np.unique(np.asarray(row.answer, np.int64), return_counts=True)
        adjusted_W[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    allowed_W = _allowed(len(adjusted_W), row)
    if allowed_W is not None:
        np.copyto(adjusted_W, -np.inf, where=~allowed_W)
    return adjusted_W


def _allowed(width: int, row: Row) -> NDArray[np.bool_] | None:
    banned = [token for token in row.banned if token < width]
    if row.allowed_W is None and not banned:
        return None
    allowed_W = np.ones(width, bool) if row.allowed_W is None else _array(row.allowed_W, torch.bool)
    if not banned:
        return allowed_W
    narrower_W = allowed_W.copy()
    narrower_W[banned] = False
    return narrower_W if row.allowed_W is None or narrower_W.any() else allowed_W


def _told(logits_W: Floats, largest: float, token: int, top: int) -> Drawn:
    """A token with its log probability, and the likeliest with theirs."""
    log_mass = math.log(float(weights_of(logits_W, np.float32(largest), 1.0).sum()))
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        count = min(top, len(logits_W))
        ids = np.flatnonzero(logits_W >= largest_of(logits_W, count).min())
        ids = ids[np.argsort(-logits_W[ids], kind="stable")][:count]
        likeliest = tuple((int(i), float(logits_W[i]) - largest - log_mass) for i in ids)
    return Drawn(token, float(logits_W[token]) - largest - log_mass, likeliest)


def _fault(largest: float) -> BadLogits | None:
    """What is wrong with a row whose largest logit this is."""
    if math.isnan(largest):
        return BadLogits("the model gave NaN for the next token: its weights or input are broken")
    if largest == math.inf:
        return BadLogits("the model gave an infinite logit: its weights or input are broken")
    if largest == -math.inf:
        return BadLogits("no token is allowed here: every one is masked out")
    return None


def _array(tensor: Tensor, dtype: torch.dtype = torch.float32) -> NDArray:
    return tensor.detach().to("cpu", dtype).numpy()
