"""Random numbers that are functions of a key and a place: Philox4x64-10, many at once.

Ten rounds stir a counter of four words with a key of two (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011). Nothing is carried from one number to the next, so the number of
(seed, choice, position) is the same whatever else is drawn. numpy makes a generator object for
each key, which costs more than the number; here arrays of keys and places go through the rounds
side by side, to the same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# R numbers.

Words = NDArray[np.uint64]

ROUNDS = 10
# For the counter's first and third word, and what the key grows by in every round.
FACTORS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
STEPS = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
LOW_FACTORS, HIGH_FACTORS = FACTORS & LOW, FACTORS >> HALF


def uniform(seed: int, choice: int, position: int) -> float:
    """The number in [0, 1) that decides the token at this place of this answer."""
    key = np.array([seed, choice], dtype=np.uint64)
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def uniforms(seed_R: Words, choice_R: Words, position_R: Words) -> NDArray[np.float64]:
    """``uniform`` of each, for positions below 2**64 - 1."""
    key_2R = np.stack((seed_R, choice_R))
    # Words 0 and 2 are multiplied, 1 and 3 are mixed in. numpy counts on before its first number.
    even_2R = np.zeros_like(key_2R)
    even_2R[0] = position_R + np.uint64(1)
    odd_2R = np.zeros_like(key_2R)
    for number in range(ROUNDS):
        if number:
            key_2R += STEPS
        high_2R, low_2R = _product(even_2R)
        even_2R = high_2R[::-1] ^ odd_2R ^ key_2R
        odd_2R = low_2R[::-1]
    return (even_2R[0] >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _product(x_2R: Words) -> tuple[Words, Words]:
    """The upper and the lower 64 bits of x times ``FACTORS``, by halves."""
    low_2R, high_2R = x_2R & LOW, x_2R >> HALF
    middle_2R = high_2R * LOW_FACTORS + ((low_2R * LOW_FACTORS) >> HALF)
    other_2R = low_2R * HIGH_FACTORS + (middle_2R & LOW)
    upper_2R = high_2R * HIGH_FACTORS + (middle_2R >> HALF) + (other_2R >> HALF)
    return upper_2R, x_2R * FACTORS
