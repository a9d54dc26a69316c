"""Attention on AMX against the equation in float64; skipped where the processor has none.

bfloat16 rounds what goes in between, so what is asked is to be as near to the equation as PyTorch
is with the same numbers: over a whole tensor, the error may be half as large again, or half a step
of bfloat16 where PyTorch happens to round nothing.
"""

import pytest
import torch
from torch import Tensor

from qiusuo.kernels import attention as room
from qiusuo.kernels.attention import attention, attention_by_tiles, attention_reference, causal_mask
from qiusuo.kernels.native import native
from qiusuo.kernels.tile_attention import (
    takes,
    tile_attention,
    tile_attention_by_tiles,
)
from tests.kernels.gradients import normal, value_and_grads
from tests.kernels.sizes import Sizes
from tests.model.shapes import tiny_model

# B batch, H heads, K key heads, T queries, S keys, E query/key width, V value width.

pytestmark = pytest.mark.skipif(
    (library := native()) is None or not library.has_tiles,
    reason="no AMX, or QIUSUO_KERNELS leaves it out",
)

STEP = 2.0**-8  # half of a bfloat16's, to its number
FLOAT32 = 1e-4  # what sums in float32 leave of a gradient that is zero
NAMES = ("result", "queries' gradient", "keys' gradient", "values' gradient")
LENGTHS = [1, 2, 17, 33, 129, 257]
WIDTHS = [(48, 32), (192, 128), (40, 24), (16, 64)]


def qkv(
    batch: int, heads: tuple[int, int], queries: int, keys: int, widths: tuple[int, int]
) -> list[Tensor]:
    """As projections leave them: [B, T, H, X] in memory, seen as [B, H, T, X]."""
    shapes = (
        (heads[0], queries, widths[0]),
        (heads[1], keys, widths[0]),
        (heads[1], keys, widths[1]),
    )
    return [
        normal(batch, rows, many, width, seed=seed, dtype=torch.bfloat16).transpose(1, 2)
        for seed, (many, rows, width) in enumerate(shapes)
    ]


def equation(q: Tensor, k: Tensor, v: Tensor, scale: float, mask_BTS: Tensor | None) -> Tensor:
    """In float64 throughout; zeros for a query that sees nothing."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if mask_BTS is None:
        mask_BTS = causal_mask(q.shape[2], k.shape[2], q.device)[None]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask_BTS[:, None], -1e300)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * mask_BTS[:, None]
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-300) @ v


def pytorch(*args: object) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "takes", lambda *_: False)
        return attention(*args)  # type: ignore[arg-type]


def compare(tensors: list[Tensor], scale: float, mask_BTS: Tensor | None = None) -> None:
    def through(kernel: object, *inputs: Tensor) -> list[Tensor]:
        return value_and_grads(lambda q, k, v: kernel(q, k, v, scale, mask_BTS), *inputs)  # type: ignore[operator]

    expected = through(equation, *(x.double() for x in tensors))
    got, theirs = through(attention, *tensors), through(pytorch, *tensors)
    for name, e, g, t in zip(NAMES, expected, got, theirs, strict=True):
        assert g.dtype == torch.bfloat16, name
        assert g.shape == e.shape, name
        # Of queries that see nothing PyTorch's plain path makes NaN.
        error, other = (float((x.double() - e).nan_to_num().norm()) for x in (g, t))
        assert g.isfinite().all(), name
        assert error <= max(1.5 * other, STEP * float(e.norm()), FLOAT32), (name, error, other)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_causal(length, widths):
    batch = 2 + 32 // length  # of few numbers no error can be told
    compare(qkv(batch, (3, 3), length, length, widths), widths[0] ** -0.5)


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 2), (1, 300), (2, 257), (33, 64), (129, 700), (257, 258), (600, 1100)]
)
def test_causal_with_keys_from_before(queries, keys):
    compare(qkv(1 + 32 // queries, (2, 2), queries, keys, (48, 32)), 0.2)


def test_more_queries_than_keys_see_nothing_at_first():
    tensors = qkv(1, (2, 2), 70, 40, (48, 32))
    compare(tensors, 0.2)
    assert not attention(*tensors, 0.2)[:, :, :30].any()


def test_a_whole_span_of_queries_that_see_nothing():
    """Keys are laid out for those that come after it."""
    tensors = qkv(1, (2, 2), 700, 100, (48, 32))
    expected = value_and_grads(
        lambda q, k, v: equation(q, k, v, 0.2, None), *(x.double() for x in tensors)
    )
    got = value_and_grads(lambda q, k, v: attention(q, k, v, 0.2, None), *tensors)
    for name, e, g in zip(NAMES, expected, got, strict=True):
        assert (g.double() - e).norm() <= STEP * e.norm(), name


@pytest.mark.parametrize("length", [2, 17, 129, 257, 600])
def test_documents(length):
    """Each sees itself alone; those of a batch are cut elsewhere."""
    document_BT = torch.stack([torch.arange(length) // size for size in (length // 3 + 1, 50)])
    mask_BTT = (document_BT[:, :, None] == document_BT[:, None]) & causal_mask(
        length, length, "cpu"
    )
    compare(qkv(2, (2, 2), length, length, (48, 32)), 0.2, mask_BTT)


@pytest.mark.parametrize(("queries", "keys"), [(33, 33), (129, 257), (70, 600)])
def test_any_mask(queries, keys):
    generator = torch.Generator().manual_seed(queries)
    mask_BTS = torch.rand(2, queries, keys, generator=generator) < 0.3
    mask_BTS[0, 5] = False
    mask_BTS[1, :, keys // 2 :] = False
    tensors = qkv(2, (4, 2), queries, keys, (48, 32))
    compare(tensors, 0.2, mask_BTS)
    compare(tensors, 0.2, mask_BTS[1:])  # one for all
    out = attention(*tensors, 0.2, mask_BTS)
    assert not out[0, :, 5].any()
    every_other = torch.stack((mask_BTS, ~mask_BTS), -1).flatten(-2)[..., ::2]
    assert every_other.stride(-1) == 2
    assert torch.equal(attention(*tensors, 0.2, every_other), out)


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (14, 2)], ids=str)
@pytest.mark.parametrize("length", [33, 600])
def test_key_heads_that_serve_several(heads, length):
    compare(qkv(1, heads, length, length, (64, 64)), 0.125)


def test_wherever_tensors_stand():
    """Values beside keys, as an expansion leaves them; a shared key, not copied; queries and a
    result's gradient with gaps in their last dimension."""
    both = normal(2, 40, 3, 48 + 32, seed=1, dtype=torch.bfloat16).transpose(1, 2)
    k, v = both[..., :48], both[..., 48:]
    q = normal(2, 3, 48, 40, seed=2, dtype=torch.bfloat16).transpose(2, 3)
    shared = k[:, :1].expand(-1, 3, -1, -1)
    toward = normal(2, 3, 40, 64, seed=3, dtype=torch.bfloat16)[..., ::2]

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = tile_attention(*leaves, 0.2)
        return [out.detach(), *torch.autograd.grad(out, leaves, toward)]

    for keys in (k, shared):
        expected = run(q.contiguous(), keys.contiguous(), v.contiguous())
        for a, b in zip(run(q, keys, v), expected, strict=True):
            assert torch.equal(a, b)


def test_results_and_gradients_are_laid_out_for_the_projections():
    leaves = [x.requires_grad_() for x in qkv(2, (3, 3), 20, 20, (48, 32))]
    out = tile_attention(*leaves, 0.2)
    made = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    assert all(x.transpose(1, 2).is_contiguous() for x in made)


def test_the_number_of_threads_changes_nothing():
    tensors = qkv(2, (4, 2), 600, 600, (48, 32))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(value_and_grads(lambda q, k, v: tile_attention(q, k, v, 0.2), *tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@torch.no_grad()
def test_a_query_depends_on_what_it_sees_alone():
    """So chunks of a prompt, and what stands beside it in a batch, cannot change an answer."""
    q, k, v = qkv(2, (3, 3), 700, 700, (48, 32))
    whole = tile_attention(q, k, v, 0.2)
    for start, stop in ((0, 1), (0, 33), (301, 450), (699, 700)):
        seen = slice(0, stop)
        part = tile_attention(q[1:, :, start:stop], k[1:, :, seen], v[1:, :, seen], 0.2)
        assert torch.equal(part, whole[1:, :, start:stop])


@pytest.mark.parametrize("size", [1e-20, 30.0, 1000.0])
def test_scores_of_any_size(size):
    """One key takes all, or all are equal; the largest score comes first, last, anywhere."""
    q, k, v = qkv(1, (2, 2), 300, 300, (48, 32))
    got = value_and_grads(lambda *x: tile_attention(*x, 1.0), q * size, k, v)
    assert all(x.isfinite().all() for x in got)
    expected = equation((q * size).double(), k.double(), v.double(), 1.0, None)
    assert (got[0].double() - expected).norm() < STEP * expected.norm()


def test_memory_is_linear_in_the_sequence():
    """The largest thing made is a gradient of queries or keys, not 2,048 × 2,048 scores."""
    length, width = 2048, 48
    tensors = qkv(1, (1, 1), length, length, (width, 32))
    with Sizes() as sizes:
        compare_free = value_and_grads(lambda q, k, v: attention(q, k, v, 0.2), *tensors)
    assert sizes.largest <= 2 * length * width  # two: the test's own weights are float32
    assert all(x.isfinite().all() for x in compare_free)


@torch.no_grad()
@pytest.mark.parametrize(("queries", "before"), [(40, 0), (33, 700), (257, 513)])
def test_tiles_join_to_the_equation(queries, before):
    q, k, v = qkv(2, (4, 2), queries, before + queries, (192, 128))
    parts = list(room.tiles_of_mask(queries, before + queries, 256, None, q.device))
    tiles = [(k[:, :, tile], v[:, :, tile], mask) for tile, mask in parts]
    got = tile_attention_by_tiles(q, tiles, 0.07)
    expected = equation(q.double(), k.double(), v.double(), 0.07, None)
    assert (got.double() - expected).norm() < STEP * expected.norm()


@torch.no_grad()
def test_queries_that_see_nothing_of_a_tile():
    q, k, v = qkv(2, (2, 2), 60, 60, (48, 32))
    mask_BTS = causal_mask(60, 60, q.device)[None] & (torch.arange(60) >= 25)
    tiles = [
        (k[:, :, a : a + 10], v[:, :, a : a + 10], mask_BTS[..., a : a + 10])
        for a in range(0, 60, 10)
    ]
    for order in (tiles, tiles[::-1]):
        got = tile_attention_by_tiles(q, order, 0.2)
        assert not got[:, :, :25].any()
        expected = equation(q.double(), k.double(), v.double(), 0.2, mask_BTS)
        assert (got.double() - expected).norm() < STEP * expected.norm()
        assert torch.equal(attention_by_tiles(q, order, 0.2), got)


def test_what_it_leaves_to_pytorch():
    q, k, v = qkv(1, (2, 2), 8, 8, (48, 32))
    assert takes(0.2, q, k, v)
    assert not takes(0.2, q.float(), k, v)
    assert not takes(0.2, q, k, v.double())
    assert not takes(-0.2, q, k, v)
    assert not takes(0.2, q.to("meta"))
    full = attention(q.float(), k.float(), v.float(), 0.2)
    assert torch.equal(full, pytorch(q.float(), k.float(), v.float(), 0.2, None))
    assert torch.equal(
        attention_reference(q, k[:, :1], v[:, :1], 0.2),
        attention_reference(q, k[:, :1].expand_as(k), v[:, :1].expand_as(v), 0.2),
    )


def test_refused_before_anything_is_read():
    q, k, v = qkv(1, (4, 2), 8, 8, (48, 32))
    for bad in ((q, k, v[:, :1]), (q, k[..., :40], v), (q[:, :3], k, v), (q, k[:, :, :7], v)):
        with pytest.raises(ValueError, match="do not fit"):
            tile_attention(*bad, 0.2)
    with pytest.raises(ValueError, match="bfloat16"):
        tile_attention(q, k.float(), v, 0.2)
    with pytest.raises(ValueError, match="bool"):
        tile_attention(q, k, v, 0.2, torch.ones(1, 8, 8))
    with pytest.raises(RuntimeError):
        tile_attention(q, k, v, 0.2, torch.ones(1, 8, 7, dtype=torch.bool))


def test_a_model_under_autocast_goes_this_way(monkeypatch):
    """Its projections give bfloat16. Without experts: a choice that falls otherwise is no error."""
    tokens = torch.randint(0, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    model, taken = tiny_model(first_k_dense_replace=3), []

    def counted(*args: Tensor) -> Tensor:
        taken.append(args)
        return tile_attention(*args)

    def states(autocast: bool = True) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, autocast):
            return model(tokens).x_BTD.float()

    monkeypatch.setattr(room, "tile_attention", counted)
    ours = states()
    assert taken
    monkeypatch.setattr(room, "takes", lambda *_: False)
    expected = states(autocast=False)
    assert (ours - expected).norm() < 1.5 * (states() - expected).norm()
