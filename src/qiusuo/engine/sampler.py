"""Draws tokens from rows of logits.

A token is a pure function of its row of logits, its request and its place in the answer: the
random number comes from Philox, a generator that is a function of a key (seed, choice) and a
counter (the place), not of what was drawn before. So neither the batch, nor the order of work, nor
a draft that is drawn ahead and thrown away can change an answer.

Every row is worked on by itself, in numpy, which has no threads whose number could change a sum.
No row is sorted whole unless its nucleus needs it: a partition finds the largest few, and what
survives is drawn from in the order of ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qiusuo.engine.sampling import Sampling

# R rows, W vocabulary, K tokens that survive the filters.

TINY = 1e-20  # a lower temperature draws the same, until logits over it overflow float32
FIRST_LOOK = 1024  # tokens looked at first for a nucleus
BLOCK = 256  # tokens summed at once where all of a vocabulary is drawn from

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]


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
    return [_draw_row(logits_W, row) for logits_W, row in zip(all_RW, rows, strict=True)]


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


def uniform(seed: int, choice: int, position: int) -> float:
    """The number in [0, 1) that decides the token at this place of this answer."""
    key = np.array([seed, choice], dtype=np.uint64)
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def candidates(logits_W: Floats, sampling: Sampling) -> tuple[Ids, Floats]:
    """What may be drawn at a temperature above 0: ids [K], ascending, and their weights [K],
    which are probabilities but for a common factor.

    Temperature, top-k, top-p and min-p in transformers' order and to its rules: tokens that tie
    with the k-th stay; the nucleus is the fewest tokens whose mass reaches ``top_p`` (here, of
    equals, the lower ids)."""
    largest = logits_W.max()
    ids_K, values_K = _unmasked(logits_W)
    if sampling.top_k is not None and sampling.top_k < len(values_K):
        kept = np.flatnonzero(values_K >= _largest(values_K, sampling.top_k).min())
        ids_K, values_K = _narrowed(ids_K, kept), values_K[kept]
    weights_K = _weights(values_K, largest, sampling.temperature)  # that of the likeliest is 1
    if sampling.top_p < 1:
        kept = _nucleus(values_K, weights_K, sampling)
        ids_K, weights_K = _narrowed(ids_K, kept), weights_K[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(weights_K >= sampling.min_p)
        ids_K, weights_K = _narrowed(ids_K, kept), weights_K[kept]
    return np.arange(len(logits_W)) if ids_K is None else ids_K, weights_K


def _unmasked(logits_W: Floats) -> tuple[Ids | None, Floats]:
    """Ids (None: all) and logits, without the masked ones where those are most: partitions are
    slow on very many equals."""
    allowed_W = logits_W > -np.inf
    if 2 * np.count_nonzero(allowed_W) > len(logits_W):
        return None, logits_W
    ids_K = np.flatnonzero(allowed_W)
    return ids_K, logits_W[ids_K]


def _narrowed(ids_K: Ids | None, kept: Ids) -> Ids:
    return kept if ids_K is None else ids_K[kept]


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
    if sampling.top_k is None and sampling.top_p == 1 and sampling.min_p == 0:
        weights_W = _weights(adjusted_W, adjusted_W.max(), sampling.temperature)
        return _place(weights_W, number * _mass(weights_W))
    ids_K, weights_K = candidates(adjusted_W, sampling)
    return int(ids_K[_place(weights_K, number * _mass(weights_K))])


def _mass(weights_K: Floats) -> float:
    return float(weights_K.sum(dtype=np.float64))


def _place(weights_K: Floats, target: float) -> int:
    """The first place at which the running sum is above ``target``.

    First the block that holds it, then the place in there: the running sum of a whole vocabulary
    costs more than all the rest of a draw."""
    whole = len(weights_K) // BLOCK * BLOCK
    blocks = weights_K[:whole].reshape(-1, BLOCK).sum(1, dtype=np.float64)
    sums = np.append(blocks, _mass(weights_K[whole:])).cumsum()
    block = _first_above(sums, target)
    before = float(sums[block - 1]) if block else 0.0
    inside = weights_K[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    return block * BLOCK + _first_above(inside, target - before)


def _first_above(sums: Floats, target: float) -> int:
    """Where rising sums pass ``target``; rounding never leads to a place of no weight."""
    below_all = math.nextafter(float(sums[-1]), 0.0)
    return int(np.searchsorted(sums, min(max(target, 0.0), below_all), side="right"))


def _weights(values_K: Floats, largest: np.floating, temperature: float) -> Floats:
    with np.errstate(over="ignore"):  # to -inf: a weight of 0
        gaps_K = values_K - largest
        if temperature != 1:
            gaps_K /= min(max(temperature, TINY), 1 / TINY)
    return np.exp(gaps_K, out=gaps_K)


def _largest(values_K: Floats, count: int) -> Floats:
    """The ``count`` largest, in no order."""
    return np.partition(values_K, len(values_K) - count)[len(values_K) - count :]


def _nucleus(values_K: Floats, weights_K: Floats, sampling: Sampling) -> Ids:
    """Places of the fewest tokens whose mass reaches ``top_p`` of all."""
    wanted = sampling.top_p * _mass(weights_K)
    largest = values_K.max()
    looked_at = min(FIRST_LOOK, len(values_K))
    while True:
        sorted_K = np.sort(_largest(values_K, looked_at))[::-1]
        sorted_weights_K = _weights(sorted_K, largest, sampling.temperature)
        if looked_at == len(values_K) or _mass(sorted_weights_K) >= wanted:
            break
        looked_at = min(8 * looked_at, len(values_K))
    size = _place(sorted_weights_K, math.nextafter(wanted, 0.0)) + 1  # at which it is reached
    least = sorted_K[size - 1]
    kept = np.flatnonzero(values_K >= least)
    if len(kept) > size:  # of the equals at the edge only the first
        equals = np.flatnonzero(values_K[kept] == least)
        kept = np.delete(kept, equals[size - len(kept) :])
    return kept


def _adjusted(logits_W: Floats, row: Row) -> Floats:
    """Logits with bias, penalties and mask; the same array where the request has none."""
    sampling = row.sampling
    repeated = sampling.repetition_penalty != 1
    counted = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    if not (sampling.logit_bias or repeated or counted or row.banned) and row.allowed_W is None:
        return logits_W
    adjusted_W = logits_W.copy()
    for token, bias in sampling.logit_bias.items():
        if token < len(adjusted_W):
            adjusted_W[token] += bias
    if repeated:
        seen = np.concatenate([np.asarray(p, np.int64) for p in (row.prompt, row.answer)])
        was, penalty = adjusted_W[seen], sampling.repetition_penalty
        adjusted_W[seen] = np.where(was < 0, was * penalty, was / penalty)  # once, however often
    if counted:
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
    log_mass = math.log(float(_weights(logits_W, np.float32(largest), 1.0).sum()))
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        count = min(top, len(logits_W))
        ids = np.flatnonzero(logits_W >= _largest(logits_W, count).min())
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
