"""Rows drawn side by side against the same rows drawn one by one: the same bits, whoever else is
there."""

import math
import random

import numpy as np
import pytest
import torch

from qiusuo.engine import sampler
from qiusuo.engine.philox import uniform, uniforms
from qiusuo.engine.plain_draws import WIDEST
from qiusuo.engine.sampler import BadLogits, Drawn, Row, draw
from qiusuo.engine.sampling import Sampling

WIDTHS = [1, 2, 7, 8, 9, 24, 127, 129, 255, 256, 257, 511, 513, 1000, 2048, 5003, WIDEST]
TEMPERATURES = [0.0, 5e-324, 1e-9, 0.3, 0.7, 1.0, 1.0, 1.0, 1.7, 40.0, 1e300]


def plain_row(rng: random.Random, **keys) -> Row:
    keys = {"temperature": rng.choice(TEMPERATURES), "seed": rng.getrandbits(64), **keys}
    place = rng.choice([rng.randrange(64), rng.getrandbits(40)])
    return Row(Sampling(**keys), (), (), place, rng.choice([0, 1, rng.getrandbits(62)]))


def logits_of(rng: random.Random, rows: int, width: int) -> torch.Tensor:
    logits = torch.from_numpy(
        np.random.default_rng(rng.getrandbits(60)).standard_normal((rows, width), dtype=np.float32)
    )
    for place in range(rows):
        logits[place] *= rng.choice([0.0, 0.1, 3.0, 30.0, 1e38])
        if width > 2:
            logits[place, rng.randrange(width)] = rng.choice([-math.inf, 3e38, 0.0])
    return logits


def one_by_one(logits: torch.Tensor, rows: list[Row]) -> list[Drawn | BadLogits]:
    return [sampler._draw_row(one.numpy(), row) for one, row in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_same_bits_as_one_by_one_in_any_company(width):
    rng = random.Random(width)
    for rows in (4, 5, 31, 256):
        logits, asked = logits_of(rng, rows, width), [plain_row(rng) for _ in range(rows)]
        alone = one_by_one(logits, asked)
        assert draw(logits, asked) == alone
        some = sorted(rng.sample(range(rows), rng.randrange(4, rows + 1)))
        assert draw(logits[some], [asked[i] for i in some]) == [alone[i] for i in some]


@pytest.mark.parametrize("temperature", TEMPERATURES[:6])
def test_one_temperature_for_all(temperature):
    rng = random.Random(3)
    logits = logits_of(rng, 40, 300)
    asked = [plain_row(rng, temperature=temperature) for _ in range(40)]
    assert draw(logits, asked) == one_by_one(logits, asked)
    spread = torch.stack((logits, logits), dim=1)[:, 1]  # rows that do not touch
    assert draw(spread, asked) == draw(logits.double(), asked) == one_by_one(logits, asked)


def test_among_rows_that_ask_for_more():
    rng = random.Random(5)
    more = [
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {3: 4.0}},
        {"logprobs": 4},
    ]
    asked = [plain_row(rng, **keys) for keys in more for _ in range(2)]
    asked += [plain_row(rng) for _ in range(20)]
    masked, banned = plain_row(rng), plain_row(rng)
    masked.allowed_W, banned.banned = torch.arange(50) % 3 == 0, frozenset(range(40))
    asked += [masked, banned]
    rng.shuffle(asked)
    logits = torch.randn(len(asked), 50, generator=torch.Generator().manual_seed(0))
    for row in asked:
        row.prompt, row.answer = [1, 2, 3], [4, 4, 5]
    drawn = draw(logits, asked)
    assert drawn == one_by_one(logits, asked)
    assert drawn[asked.index(banned)].token >= 40
    assert drawn[asked.index(masked)].token % 3 == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_spoils_no_other(bad):
    rng = random.Random(6)
    logits, asked = logits_of(rng, 9, 30), [plain_row(rng) for _ in range(9)]
    logits[4] = bad
    drawn = draw(logits, asked)
    assert isinstance(drawn[4], BadLogits)
    assert drawn == one_by_one(logits, asked)


def test_a_row_without_a_seed_is_refused_among_others():
    asked = [Row(Sampling(temperature=1.0, seed=i), (), (), 0) for i in range(8)]
    asked[5] = Row(Sampling(temperature=1.0), (), (), 0)
    with pytest.raises(ValueError, match="a draw needs a seed"):
        draw(torch.zeros(8, 10), asked)


def test_plain_rows_do_go_side_by_side(monkeypatch):
    monkeypatch.setattr(sampler, "_draw_row", None)  # not called
    rng = random.Random(7)
    assert len(draw(torch.zeros(64, 24), [plain_row(rng) for _ in range(64)])) == 64


def test_numbers_as_numpy_makes_them():
    rng = random.Random(8)
    ends = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 2, 2**64 - 1]
    words = [*ends, *(rng.getrandbits(rng.choice([8, 33, 64])) for _ in range(500))]
    keys = [(rng.choice(words), rng.choice(words), rng.choice(words)) for _ in range(2000)]
    keys = [(seed, choice, min(place, 2**64 - 2)) for seed, choice, place in keys]
    together = uniforms(*np.array(keys, dtype=np.uint64).T)
    assert together.tolist() == [uniform(*key) for key in keys]
