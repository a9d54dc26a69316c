"""Draws for many rows at once that ask for nothing but a temperature, as rollouts do.

Row by row (sampler.py) the calls cost more than the work where a vocabulary is small. Here whole
arrays go through the same steps, and every result has the same bits: numpy works along the last
axis of an array one row at a time and in the same order as on that row alone, whatever rows stand
around it (tests/engine/test_plain_draws.py). That holds while a row fits into numpy's buffer for
sums in another type; longer rows, whose work outweighs the calls anyway, are drawn one by one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qiusuo.engine.philox import Words, uniforms

# R rows, W vocabulary, b blocks of a row, s tokens of a block.

TINY = 1e-20  # a lower temperature draws the same, until logits over it overflow float32
BLOCK = 256  # tokens summed at once where all of a vocabulary is drawn from
FEWEST = 4  # rows for which this is worth its own fixed cost
WIDEST = 8192  # numpy.getbufsize()

Floats = NDArray[np.floating]
Ids = NDArray[np.int64]


def draw_plain(
    logits_RW: Floats, temperature_R: Floats, seed_R: Words, choice_R: Words, position_R: Words
) -> tuple[list[int], list[float]]:
    """A token and its log probability (temperature 1) for each row of float32 logits, of which the
    largest is a number. A temperature of 0 takes the likeliest token, whatever the seed."""
    rows_R = np.arange(len(logits_RW))
    token_R = logits_RW.argmax(1)
    largest_R = logits_RW[rows_R, token_R]
    with np.errstate(over="ignore"):  # to -inf: a weight of 0
        gaps_RW = logits_RW - largest_R[:, None]
    weights_RW = np.exp(gaps_RW)
    mass_R = weights_RW.sum(1)  # in float32, as a row's
    sampled_R = temperature_R > 0
    if sampled_R.any():
        if (temperature_R != 1).any():
            weights_RW = _tempered(gaps_RW, temperature_R)
        token_R = np.where(
            sampled_R, _drawn(weights_RW, uniforms(seed_R, choice_R, position_R)), token_R
        )
    chosen_R = logits_RW[rows_R, token_R].astype(np.float64) - largest_R
    # math.log: numpy's own may differ from it in the last bit.
    logprobs = [
        chosen - math.log(mass)
        for chosen, mass in zip(chosen_R.tolist(), mass_R.tolist(), strict=True)
    ]
    return token_R.tolist(), logprobs


def _tempered(gaps_RW: Floats, temperature_R: Floats) -> Floats:
    """Weights under each row's temperature; a greedy row's are of no use."""
    bounded_R = temperature_R.clip(TINY, 1 / TINY).astype(gaps_RW.dtype)
    with np.errstate(over="ignore"):
        gaps_RW /= bounded_R[:, None]
    return np.exp(gaps_RW, out=gaps_RW)


def _drawn(weights_RW: Floats, number_R: Floats) -> Ids:
    """The token at which each row's running mass passes ``number`` of its whole: first the block
    that holds it, then the place in there."""
    rows, width = weights_RW.shape
    wide_RW = weights_RW.astype(np.float64)
    target_R = number_R * wide_RW.sum(1)
    if width < BLOCK:
        return _first_above(wide_RW.cumsum(1), target_R)
    whole = width // BLOCK * BLOCK
    blocks_Rb = wide_RW[:, :whole].reshape(rows, -1, BLOCK).sum(2)
    rest_R1 = wide_RW[:, whole:].copy().sum(1, keepdims=True)
    sums_Rb = np.concatenate((blocks_Rb, rest_R1), axis=1).cumsum(1)
    block_R = _first_above(sums_Rb, target_R)
    rows_R = np.arange(rows)
    before_R = np.where(block_R > 0, sums_Rb[rows_R, block_R - 1], 0.0)
    # The last block is filled up with nothing: its running sum stays where it is.
    padded_RW = np.pad(wide_RW, ((0, 0), (0, whole + BLOCK - width)))
    inside_Rs = padded_RW.reshape(rows, -1, BLOCK)[rows_R, block_R].cumsum(1)
    return block_R * BLOCK + _first_above(inside_Rs, target_R - before_R)


def _first_above(sums_Rb: Floats, target_R: Floats) -> Ids:
    """Where each row's rising sums pass its target; rounding never leads to a place of no
    weight."""
    below_all_R = np.nextafter(sums_Rb[:, -1], 0.0)
    bounded_R = np.minimum(np.maximum(target_R, 0.0), below_all_R)
    return np.count_nonzero(sums_Rb <= bounded_R[:, None], axis=1)
