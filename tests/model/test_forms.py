"""Expanded and absorbed attention, whole and in pieces, alone and packed: one function."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.engine.paged_cache import PagedCache
from qiusuo.model import gqa, mla
from qiusuo.model.groups import Whole
from qiusuo.model.transformer import Transformer
from tests.kernels.sizes import Sizes
from tests.model.shapes import FAMILIES, VARIANTS, tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(97, (3, 29), generator=torch.Generator().manual_seed(5))


@dataclass
class Row:
    """A sequence in a cache."""

    pages: list[int]
    length: int = 0


def rows_in(model: Transformer, rows: int, places: int) -> tuple[PagedCache, list[Row]]:
    """A cache of small pages, dealt out in turn: no row has its pages side by side."""
    cache = PagedCache(model.config, rows * places, torch.float32, CPU, page_tokens=4)
    cache.clear_pages(range(rows * places))  # as the scheduler does
    each = cache.pages_for(places)
    return cache, [Row([row + rows * page for page in range(each)]) for row in range(rows)]


def in_pieces(
    model: Transformer, tokens_BT: torch.Tensor, pieces: list[tuple[int, bool]]
) -> torch.Tensor:
    """Hidden states when the cache is filled piece by piece: (tokens, absorbed) each."""
    cache, rows = rows_in(model, *tokens_BT.shape)
    out = []
    for length, absorbed in pieces:
        start, stop = rows[0].length, rows[0].length + length
        positions_BT = torch.arange(start, stop).expand(len(tokens_BT), -1)
        group = cache.group(rows, length, absorbed)
        out.append(model(tokens_BT[:, start:stop], positions_BT, groups=(group,)).x_BTD)
        for row in rows:
            row.length = stop
    assert rows[0].length == tokens_BT.shape[1]
    return torch.cat(out, dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_absorbed_is_expanded(changes):
    model = tiny_model(**changes)
    expanded, absorbed = model(TOKENS), model(TOKENS, groups=(Whole(3, 29, absorbed=True),))
    with torch.enable_grad():
        trained_BTD = model(TOKENS).x_BTD.detach()
    for form in (expanded, absorbed):
        assert_close(form.x_BTD, trained_BTD)
    assert not torch.equal(absorbed.x_BTD, trained_BTD)  # it was another way


@pytest.mark.parametrize("name", ["v3", "qwen2"])
@torch.no_grad()
def test_long_contexts_by_tiles(name, monkeypatch):
    model = tiny_model(**FAMILIES[name])
    with torch.enable_grad():
        trained_BTD = model(TOKENS).x_BTD.detach()
    for room in (mla, gqa):
        monkeypatch.setattr(room, "TILE", 7)
    assert_close(model(TOKENS).x_BTD, trained_BTD)
    assert_close(in_pieces(model, TOKENS, [(11, False), (18, False)]), trained_BTD)


@torch.no_grad()
def test_the_heads_of_a_group_are_not_given_copies_of_their_keys():
    model = tiny_model(model_type="qwen2", num_attention_heads=6, num_key_value_heads=1)
    attend = model.model.main_blocks[0].self_attn
    keys, queries, width = 3 * gqa.TILE, 40, attend.width
    cached_BSKE = torch.randn(1, keys, 1, width)
    largest = max(queries * gqa.TILE, 2 * queries * attend.heads * width)
    assert largest < keys * attend.heads * width  # what copies would take
    with Sizes() as sizes:
        q_BTHE = torch.randn(1, queries, attend.heads, width)
        attend.attend_expanded(q_BTHE, cached_BSKE, cached_BSKE, None)
    assert sizes.largest <= largest


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_prefill_and_decode_through_the_cache_is_one_pass(changes):
    model = tiny_model(**changes)
    pieces = [(17, False), *[(1, True)] * 12]
    assert_close(in_pieces(model, TOKENS, pieces), model(TOKENS).x_BTD)


@given(st.data())
@settings(max_examples=15)
@torch.no_grad()
def test_any_pieces_in_any_form(data):
    model, left, pieces = tiny_model(num_hidden_layers=2), 29, []
    while left:
        pieces.append((data.draw(st.integers(1, left)), data.draw(st.booleans())))
        left -= pieces[-1][0]
    assert_close(in_pieces(model, TOKENS, pieces), model(TOKENS).x_BTD)


@torch.no_grad()
def test_sequences_of_any_lengths_in_one_pass():
    """A chunk of one prompt, single tokens of two others and two of a fourth, in three groups."""
    model = tiny_model()
    cache, rows = rows_in(model, 4, 29)
    filled = (0, 20, 11, 5)
    for row, length in zip(rows, filled, strict=True):
        if length:
            model(TOKENS[:1, :length], groups=(cache.group([row], length, False),))
            row.length = length
    counts = (9, 1, 1, 2)
    groups = (
        cache.group(rows[:1], 9, False),
        cache.group(rows[1:3], 1, True),
        cache.group(rows[3:], 2, True),
    )
    spans = [range(a, a + count) for a, count in zip(filled, counts, strict=True)]
    positions_1N = torch.tensor([[place for span in spans for place in span]])
    out_1ND = model(TOKENS[:1, positions_1N[0]], positions_1N, groups=groups).x_BTD
    whole_1TD = model(TOKENS[:1]).x_BTD
    assert_close(out_1ND, whole_1TD[:, positions_1N[0]])


@torch.no_grad()
def test_the_cache_keeps_latent_and_rope_key_only():
    model = tiny_model()
    cache, (row,) = rows_in(model, 1, 29)
    assert cache.entries_LpsW.shape[-1] == 16 + 8
    marker = 1234.5
    cache.entries_LpsW.fill_(marker)
    model(TOKENS[:1], groups=(cache.group([row], 29, False),))
    entries_LSZ = cache.entries_LpsW[:, row.pages].flatten(1, 2)
    assert not (entries_LSZ[:, :29] == marker).any()
    assert (entries_LSZ[:, 29:] == marker).all()


# -- documents ----------------------------------------------------------------------------------


def documents_mask(lengths: list[int]) -> torch.Tensor:
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same_TT = document_T[:, None] == document_T
    return (same_TT & torch.ones_like(same_TT).tril())[None]


@pytest.mark.parametrize("name", ["v3", "v3-negative-biases", "v2-lite"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(name):
    model = tiny_model(**VARIANTS[name])
    mask, positions = documents_mask([11, 18]), torch.tensor([[*range(11), *range(18)]])
    packed = model(TOKENS[:1], positions, mask).x_BTD
    other = TOKENS[:1].clone()
    other[:, :11] = (other[:, :11] + 1) % 97
    changed = model(other, positions, mask).x_BTD
    assert_close(changed[:, 11:], packed[:, 11:])  # not to the bit: experts' batches differ
    assert not torch.allclose(changed[:, :11], packed[:, :11], atol=1e-2)
    assert_close(packed[:, :11], model(TOKENS[:1, :11]).x_BTD)
    assert_close(packed[:, 11:], model(TOKENS[:1, 11:]).x_BTD)
    # without the mask they do: the test would notice
    assert not torch.allclose(
        model(other, positions).x_BTD[:, 11:], model(TOKENS[:1], positions).x_BTD[:, 11:], atol=1e-2
    )


@torch.no_grad()
def test_mtp_module_heeds_the_mask():
    model = tiny_model(num_nextn_predict_layers=1)
    mask = documents_mask([11, 17])
    tokens = TOKENS[:1, 1:]

    def ahead(hidden: torch.Tensor) -> torch.Tensor:
        context = model.context(tokens, mask_BTS=mask)
        return model.predict_ahead(hidden, tokens, 0, context).x_BTD

    hidden = model(TOKENS[:1, :-1]).x_BTD
    changed = hidden.clone()
    changed[:, :11] += 1
    assert_close(ahead(changed)[:, 11:], ahead(hidden)[:, 11:])
    assert not torch.allclose(ahead(changed)[:, :11], ahead(hidden)[:, :11], atol=1e-3)


@torch.no_grad()
def test_only_the_distance_between_positions_counts():
    model = tiny_model(**VARIANTS["v3-yarn"])
    shifted = model(TOKENS, torch.arange(50, 79)[None])
    torch.testing.assert_close(shifted.x_BTD, model(TOKENS).x_BTD, rtol=0, atol=1e-4)


def test_no_later_token_reaches_back():
    model = tiny_model()
    changed = TOKENS.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 97
    with torch.no_grad():
        before, after = model(TOKENS).x_BTD, model(changed).x_BTD
    assert_close(after[:, :20], before[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-2)


def test_a_row_does_not_depend_on_its_neighbours():
    model = tiny_model()
    with torch.no_grad():
        assert_close(model(TOKENS[1:2]).x_BTD, model(TOKENS).x_BTD[1:2])


def test_every_parameter_learns():
    """A gradient reaches every parameter when all depths are trained; the bias is not one."""
    model = tiny_model(num_nextn_predict_layers=2).train()
    x = model(TOKENS).x_BTD
    loss = model.logits(x).square().mean()
    for depth in range(2):
        following = TOKENS[:, depth + 1 :]
        x = model.predict_ahead(x[:, :-1], following, depth, model.context(following)).x_BTD
        loss = loss + model.logits(x).square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert not any("bias" in name for name, _ in model.named_parameters())
