"""Attention by blocks and through the fused kernel against the equation."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qiusuo.kernels import attention as room
from qiusuo.kernels.attention import (
    attention,
    attention_by_tiles,
    attention_reference,
    causal_mask,
)
from tests.kernels.gradients import assert_all_close, normal, value_and_grads

# B batch, H heads, T queries, S keys, E query/key width, V value width.

BLOCK, LONGEST = room.QUERY_BLOCK, room.LONGEST_PLAIN


def qkv(
    batch: int, heads: int, queries: int, keys: int, width: int, value: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(batch, heads, queries, width, seed=1),
        normal(batch, heads, keys, width, seed=2),
        normal(batch, heads, keys, value, seed=3),
    )


def compare(tensors: tuple[Tensor, ...], mask_BTS: Tensor | None, scale: float = 0.37) -> None:
    def through(kernel: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(q, k, v, scale, mask_BTS)  # type: ignore[operator]

    assert_all_close(
        value_and_grads(partial(through, attention), *tensors),
        value_and_grads(partial(through, attention_reference), *tensors),
        1e-5,
    )


def documents(lengths: list[int], batch: int = 1) -> Tensor:
    """[B, T, T]: causal, and within one document only."""
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same_TT = document_T[:, None] == document_T
    return (same_TT & causal_mask(len(document_T), len(document_T), torch.device("cpu"))).expand(
        batch, -1, -1
    )


def test_the_reference_is_the_equation():
    q, k, v = (t.double() for t in qkv(2, 2, 4, 6, 5, 3))
    got = attention_reference(q.float(), k.float(), v.float(), 0.37)
    for b in range(2):
        for h in range(2):
            for t in range(4):
                seen = 6 - 4 + t + 1  # the last query stands on the last key
                weights = torch.exp(
                    torch.stack([q[b, h, t] @ k[b, h, s] * 0.37 for s in range(seen)])
                )
                expected = (weights[:, None] * v[b, h, :seen]).sum(0) / weights.sum()
                torch.testing.assert_close(got[b, h, t].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queries", [1, BLOCK - 1, BLOCK, BLOCK + 1, 300])
@pytest.mark.parametrize("widths", [(9, 5), (5, 9), (6, 6)], ids=["wide-key", "wide-value", "same"])
def test_causal_by_blocks(queries, widths):
    compare(qkv(2, 2, queries, queries, *widths), None)


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 2), (1, 300), (3, 130), (BLOCK, BLOCK + 1), (150, 290)]
)
def test_causal_with_keys_from_before(queries, keys):
    compare(qkv(1, 2, queries, keys, 8, 4), None)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [100, 60, 140], [128, 128, 44], [7, 150]])
def test_document_masks(lengths):
    total = sum(lengths)
    compare(qkv(2, 2, total, total, 8, 4), documents(lengths, batch=2))


def test_masks_of_a_batch_may_differ():
    masks = torch.cat((documents([60, 100]), documents([130, 30]), documents([160])))
    tensors = qkv(3, 2, 160, 160, 8, 4)
    compare(tensors, masks)
    alone = attention(*(t[1:2] for t in tensors), 0.37, masks[1:2])
    torch.testing.assert_close(attention(*tensors, 0.37, masks)[1:2], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("widths", [(6, 4), (4, 6)], ids=["wide-key", "wide-value"])
@pytest.mark.parametrize("kind", ["causal", "from-before", "documents"])
def test_long_sequences_through_the_fused_kernel(widths, kind, monkeypatch):
    def never(*_args: object) -> Tensor:
        raise AssertionError("a long sequence must not make a score matrix")

    monkeypatch.setattr(room, "_plain", never)
    keys = LONGEST + 9
    queries = 70 if kind == "from-before" else keys
    mask = documents([LONGEST // 2, keys - LONGEST // 2]) if kind == "documents" else None
    compare(qkv(1, 1, queries, keys, *widths), mask)


@given(st.data(), st.integers(1, 13), st.integers(0, 9), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=40)
def test_any_mask_on_either_path(data, queries, before, width, value):
    keys = queries + before
    mask_BTS = None
    if data.draw(st.booleans(), "masked"):
        seed = data.draw(st.integers(0, 99))
        mask_BTS = torch.rand(2, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.4
        mask_BTS |= torch.eye(queries, keys, dtype=torch.bool)  # no query may see nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "QUERY_BLOCK", data.draw(st.integers(1, 6), "block"))
        patch.setattr(room, "LONGEST_PLAIN", data.draw(st.sampled_from([0, 99]), "longest"))
        compare(qkv(2, 3, queries, keys, width, value), mask_BTS)


@pytest.mark.parametrize("longest", [0, 1024], ids=["fused", "plain"])
def test_bfloat16_is_close(longest, monkeypatch):
    monkeypatch.setattr(room, "LONGEST_PLAIN", longest)
    tensors = qkv(1, 2, 200, 200, 24, 16)
    half = attention(*(t.bfloat16() for t in tensors), 24**-0.5)
    assert half.dtype == torch.bfloat16
    full = attention_reference(*tensors, 24**-0.5)
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.03)


def test_causal_mask_puts_the_last_query_on_the_last_key():
    mask = causal_mask(2, 4, torch.device("cpu"))
    assert mask.tolist() == [[True, True, True, False], [True, True, True, True]]


# -- tile by tile -------------------------------------------------------------------------------


def tiles_of(k: Tensor, v: Tensor, mask_BTS: Tensor, size: int) -> list[tuple[Tensor, ...]]:
    return [
        (k[:, :, a : a + size], v[:, :, a : a + size], mask_BTS[..., a : a + size])
        for a in range(0, k.shape[-2], size)
    ]


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 70),
    st.sampled_from([(8, 8), (24, 10), (10, 24)]),
    st.integers(1, 50),
)
@settings(max_examples=40)
@torch.no_grad()
def test_tiles_join_to_the_equation(batch, heads, queries, before, widths, size):
    q, k, v = qkv(batch, heads, queries, before + queries, *widths)
    mask_BTS = causal_mask(queries, before + queries, q.device).expand(batch, -1, -1)
    got = attention_by_tiles(q, tiles_of(k, v, mask_BTS, size), 0.37)
    torch.testing.assert_close(got, attention_reference(q, k, v, 0.37), rtol=0, atol=1e-5)


@pytest.mark.parametrize("widths", [(24, 10), (10, 24)])
@torch.no_grad()
def test_queries_that_see_nothing_of_a_tile(widths):
    """Documents: the later ones see nothing of the first tiles, the first nothing of the last."""
    q, k, v = qkv(2, 3, 60, 60, *widths)
    mask_BTS = documents([25, 20, 15], batch=2)
    got = attention_by_tiles(q, tiles_of(k, v, mask_BTS, 10), 0.37)
    expected = attention_reference(q, k, v, 0.37, mask_BTS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tiles_with_large_scores_stay_finite():
    q, k, v = qkv(1, 2, 30, 90, 16, 8)
    mask_BTS = causal_mask(30, 90, q.device)[None]
    for factor in (30.0, 1e-6):
        got = attention_by_tiles(q * factor, tiles_of(k, v, mask_BTS, 32), 1.0)
        expected = attention_reference(q * factor, k, v, 1.0)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
