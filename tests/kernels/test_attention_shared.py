"""Heads that share their keys, by blocks and pieces of the keys, against the equation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qiusuo.kernels import attention as room
from qiusuo.kernels.attention import attention_reference, shared_key_attention
from tests.kernels.gradients import normal
from tests.kernels.sizes import Sizes

# B batch, T queries, S keys, K key heads, G heads of each, E width of a key, V of a value.

SCALE = 0.37


def equation(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKV: Tensor, mask_BTS: Tensor | None) -> Tensor:
    group = q_BTHE.shape[2] // k_BSKE.shape[2]
    k_BHSE, v_BHSV = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k_BSKE, v_BSKV))
    return attention_reference(q_BTHE.transpose(1, 2), k_BHSE, v_BHSV, SCALE, mask_BTS).transpose(
        1, 2
    )


def padded(lengths: list[int], queries: int) -> Tensor:
    """[B, T, S]: rows of a batch that have so many keys each, the last queries on the last."""
    last_BT = torch.tensor(lengths)[:, None] - queries + torch.arange(queries)
    return torch.arange(max(lengths)) <= last_BT[..., None]


def as_in_a_cache(batch: int, keys: int, shared: int, width: int, seed: int) -> Tensor:
    """[B, S, K, E], a part of more tokens and wider rows."""
    return normal(batch, keys + 5, shared, 2 * width, seed=seed)[:, 2:-3, :, :width]


@given(
    st.data(),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 60),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([(8, 8), (24, 10), (10, 24)]),
    st.sampled_from([1, 4, 7, 16, 1024]),
)
@settings(max_examples=80)
@torch.no_grad()
def test_any_shape_and_piece(data, batch, queries, before, shared, group, widths, piece):
    width, value_width = widths
    q_BTHE = normal(batch, queries, shared * group, width, seed=1)
    mask_BTS = None
    keys = queries + before
    if data.draw(st.booleans(), "padded"):
        length = st.integers(queries, keys)
        lengths = data.draw(st.lists(length, min_size=batch, max_size=batch), "lengths")
        mask_BTS, keys = padded(lengths, queries), max(lengths)
    k_BSKE = as_in_a_cache(batch, keys, shared, width, seed=2)
    v_BSKV = as_in_a_cache(batch, keys, shared, value_width, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PIECE", piece)
        got_BTHV = shared_key_attention(q_BTHE, k_BSKE, v_BSKV, SCALE, mask_BTS)
    expected_BTHV = equation(q_BTHE, k_BSKE, v_BSKV, mask_BTS)
    torch.testing.assert_close(got_BTHV, expected_BTHV, rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("keys", [2 * room.PIECE, 2 * room.PIECE + 3, 3 * room.PIECE + 517])
@torch.no_grad()
def test_pieces_of_their_real_size_in_both_precisions(queries, keys):
    q_BTHE = normal(1, queries, 6, 24, seed=1)
    k_BSKE = as_in_a_cache(1, keys, 2, 24, seed=2)
    expected = equation(q_BTHE, k_BSKE, k_BSKE, None)
    got = shared_key_attention(q_BTHE, k_BSKE, k_BSKE, SCALE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    half = shared_key_attention(q_BTHE.bfloat16(), *[k_BSKE.bfloat16()] * 2, SCALE)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.03)


@torch.no_grad()
def test_large_scores_stay_finite():
    q_BTHE, k_BSKE = normal(1, 2, 4, 16, seed=1) * 100, as_in_a_cache(1, 70, 2, 16, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PIECE", 16)
        got = shared_key_attention(q_BTHE, k_BSKE, k_BSKE, SCALE)
    expected = equation(q_BTHE, k_BSKE, k_BSKE, None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2], ids=["alone", "padded"])
@pytest.mark.parametrize("queries", [1, 4])
@torch.no_grad()
def test_the_scores_are_never_in_memory_at_once(batch, queries, monkeypatch):
    monkeypatch.setattr(room, "PIECE", 64)
    keys, heads, width = 2000, 12, 8
    mask_BTS = padded([keys, keys - 700], queries) if batch > 1 else None
    q_BTHE, k_BSKE = normal(batch, queries, heads, width), as_in_a_cache(batch, keys, 1, width, 2)
    with Sizes() as sizes:
        shared_key_attention(q_BTHE, k_BSKE, k_BSKE, SCALE, mask_BTS)
    assert sizes.largest < batch * queries * heads * keys / 2
