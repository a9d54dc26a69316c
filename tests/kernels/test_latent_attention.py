"""The native kernel on pages against the equation, on odd shapes; skipped where there is none."""

import pytest
import torch

from qiusuo.kernels.cached_rows import Int8Rows
from qiusuo.kernels.latent_attention import (
    latent_attention,
    latent_attention_reference,
    walks_pages,
)

PAGE = 32


def drawn(queries: int, heads: int, latent: int, rope: int, lengths: list[int]) -> tuple:
    torch.manual_seed(sum(lengths) + heads)
    pages = 90
    entries = torch.randn(pages, PAGE, latent + rope).bfloat16()
    q = torch.randn(queries, heads, latent + rope).bfloat16()
    width = -(-max(lengths) // PAGE)
    table = torch.stack([torch.randperm(pages)[:width] for _ in range(queries)])
    if not walks_pages(q, entries, latent):
        pytest.skip("no native kernel for latent attention on this machine")
    return q, entries, table, torch.tensor(lengths)


def in_int8(entries: torch.Tensor, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in int8, and the numbers that these mean."""
    pages, size, width = entries.shape
    rows = Int8Rows(latent, width - latent, torch.bfloat16)
    stored = torch.empty(pages * size, rows.width, dtype=torch.uint8)
    rows.keep(entries.flatten(0, 1), stored, torch.arange(pages * size))
    return stored.view(pages, size, -1), rows.read(stored).view_as(entries)


SHAPES = [
    (16, 64, 32, [5]),
    (4, 64, 32, [1, 33, 700]),
    (20, 512, 64, [1500, 513, 512, 128]),
    (128, 512, 64, [130]),
    (16, 512, 64, [2817, 1]),
    (7, 96, 64, [31, 641]),
]


@torch.no_grad()
@pytest.mark.parametrize(("heads", "latent", "rope", "lengths"), SHAPES)
def test_as_the_equation(heads: int, latent: int, rope: int, lengths: list[int]) -> None:
    q, entries, table, seen = drawn(len(lengths), heads, latent, rope, lengths)
    expected = latent_attention_reference(q.double(), entries.double(), table, seen, latent, 0.1)
    got = latent_attention(q, entries, table, seen, latent, 0.1)
    assert got.shape == (len(lengths), heads, latent)
    assert (got.double() - expected).abs().max() < 0.01 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("heads", "latent", "rope", "lengths"), SHAPES)
def test_int8_rows_count_as_the_numbers_they_mean(
    heads: int, latent: int, rope: int, lengths: list[int]
) -> None:
    q, entries, table, seen = drawn(len(lengths), heads, latent, rope, lengths)
    stored, numbers = in_int8(entries, latent)
    assert walks_pages(q, stored, latent)
    expected = latent_attention(q, numbers, table, seen, latent, 0.1)
    assert torch.equal(latent_attention(q, stored, table, seen, latent, 0.1), expected)


@torch.no_grad()
def test_what_is_not_seen_is_not_touched() -> None:
    q, entries, table, seen = drawn(1, 16, 64, 32, [75])
    stored, _ = in_int8(entries, 64)
    for rows, unknown in ((entries, float("nan")), (stored, 255)):
        before = latent_attention(q, rows, table, seen, 64, 0.1)
        rows[table[0, 2], 11:] = unknown  # as scales 255 are NaN too
        assert torch.equal(before, latent_attention(q, rows, table, seen, 64, 0.1))


@torch.no_grad()
def test_a_query_depends_on_itself_alone() -> None:
    q, entries, table, seen = drawn(3, 16, 128, 32, [1300, 40, 600])
    together = latent_attention(q, entries, table, seen, 128, 0.1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for n in range(3):
                one = slice(n, n + 1)
                alone = latent_attention(q[one], entries, table[one], seen[one], 128, 0.1)
                assert torch.equal(alone[0], together[n])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_scores_far_apart() -> None:
    """The largest score comes last: everything before has to shrink."""
    q, entries, table, seen = drawn(1, 16, 64, 32, [1000])
    last = entries[table[0, 31], 7]
    q[0] = last * 3
    expected = latent_attention_reference(q.double(), entries.double(), table, seen, 64, 1.0)
    got = latent_attention(q, entries, table, seen, 64, 1.0)
    assert (got.double() - expected).abs().max() < 0.01 * expected.abs().max()


def test_only_what_it_can() -> None:
    q, entries = torch.randn(1, 4, 96).bfloat16(), torch.randn(2, PAGE, 96).bfloat16()
    with torch.no_grad():
        assert not walks_pages(q.float(), entries.float(), 64)
        assert not walks_pages(q, entries, 50)
        assert not walks_pages(q, entries[:, :20], 64)
        assert not walks_pages(q, entries.view(torch.uint8), 64)  # another width
    assert not walks_pages(q, entries, 64)  # gradients are wanted
