"""Projections that learn on AMX, against their equation in float64; skipped where the processor has
none. Errors as in test_tile_mlp.py: of numbers that were rounded to bfloat16 once or twice.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qiusuo.kernels.native import native
from qiusuo.kernels.tile_linear import LARGE, gain_by_tiles, linears_reference, tile_linears
from qiusuo.model import layers
from qiusuo.model.layers import Linear, project
from qiusuo.training.losses import language_model_losses, make_window
from tests.kernels.gradients import normal
from tests.model.shapes import tiny_model

# M rows, D in, O out.

pytestmark = pytest.mark.skipif(
    (library := native()) is None or not library.has_tiles,
    reason="no AMX, or QIUSUO_KERNELS leaves it out",
)

ROUNDED = 0.005  # of a tensor's norm
FEW_ROUNDED = 0.02  # of one that may be a few numbers


def rows_and_weights(
    M: int, D: int, widths: tuple[int, ...], x_type: torch.dtype, type_: torch.dtype, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    x_MD = normal(M, D, seed=seed).to(x_type)
    return x_MD, [(normal(width, D, seed=width) / D**0.5).to(type_) for width in widths]


def values_and_grads(
    kernel: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    weights: list[Tensor],
    used: tuple[int, ...] = (),
) -> list[Tensor | None]:
    """All values, then the gradients of x and the weights; towards the ``used`` values (or all)."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    ys = kernel(*leaves)
    used = used or tuple(range(len(ys)))
    toward = [normal(*ys[i].shape, seed=i + 5).bfloat16().to(ys[i].dtype) for i in used]
    torch.autograd.backward([ys[i] for i in used], toward)
    return [*(y.detach() for y in ys), *(leaf.grad for leaf in leaves)]


def assert_near(x: Tensor, weights: list[Tensor], used: tuple[int, ...] = ()) -> None:
    found = values_and_grads(tile_linears, x, weights, used)
    expected = values_and_grads(linears_reference, x.double(), [w.double() for w in weights], used)
    types = [torch.bfloat16] * len(weights) + [t.dtype for t in (x, *weights)]
    for number, (f, e, type_) in enumerate(zip(found, expected, types, strict=True)):
        if e is None:
            assert f is None, number
            continue
        assert f is not None
        assert f.dtype is type_, number
        error = (f.double() - e).norm() / e.norm()
        assert error < (ROUNDED if e.numel() > 500 else FEW_ROUNDED), (number, float(error))


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "D", "widths"),
    [
        (1, 8, (8,)), (33, 17, (31, 1)), (64, 32, (32, 32)), (257, 40, (100, 8, 24)),
        (300, 96, (520,)), (2500, 33, (65, 40)),
    ],
)  # fmt: skip
def test_projections(
    M: int, D: int, widths: tuple[int, ...], x_type: torch.dtype, weight_type: torch.dtype
) -> None:
    assert_near(*rows_and_weights(M, D, widths, x_type, weight_type))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 140),
    st.integers(8, 70),
    st.lists(st.integers(8, 70), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_any_shape(M: int, D: int, widths: list[int], seed: int) -> None:
    assert_near(*rows_and_weights(M, D, tuple(widths), torch.float32, torch.float32, seed=seed))


@pytest.mark.parametrize("used", [(0,), (1,), (2, 0)])
def test_a_result_that_nobody_used(used: tuple[int, ...]) -> None:
    """Its weight gets no gradient, and x the others'."""
    assert_near(*rows_and_weights(70, 40, (24, 33, 8), torch.bfloat16, torch.float32), used)


def test_nobody_wants_the_gradient_of_the_rows() -> None:
    x, weights = rows_and_weights(70, 40, (24, 33), torch.float32, torch.float32)
    expected = values_and_grads(tile_linears, x, weights)
    leaves = [w.requires_grad_() for w in weights]
    ys = tile_linears(x, *leaves)
    toward = [normal(*y.shape, seed=i + 5).bfloat16() for i, y in enumerate(ys)]
    torch.autograd.backward(ys, toward)
    assert x.grad is None
    assert all(torch.equal(w.grad, e) for w, e in zip(leaves, expected[3:], strict=True))


def test_rows_in_batches_and_gradients_with_gaps() -> None:
    x, (weight,) = rows_and_weights(60, 24, (40,), torch.float32, torch.float32)

    def in_heads(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        (y_BTO,) = tile_linears(x.view(3, 20, 24), weight)
        return (y_BTO.unflatten(-1, (4, 10)).transpose(1, 2).reshape(-1, 40),)

    def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y_BTO = (x @ weight.T).view(3, 20, 40)
        return (y_BTO.unflatten(-1, (4, 10)).transpose(1, 2).reshape(-1, 40),)

    found = values_and_grads(in_heads, x, [weight])
    expected = values_and_grads(plain, x.double(), [weight.double()])
    for f, e in zip(found, expected, strict=True):
        assert f is not None
        assert e is not None
        assert (f.double() - e).norm() < ROUNDED * e.norm()


def test_the_same_bits_for_any_number_of_threads() -> None:
    x, weights = rows_and_weights(2500, 96, (100, 64), torch.bfloat16, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(values_and_grads(tile_linears, x, weights))
    finally:
        torch.set_num_threads(threads)
    for one, other in pairwise(found):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_row_depends_on_no_other() -> None:
    x, weights = rows_and_weights(300, 64, (40, 24), torch.float32, torch.float32)
    x[3, 5] = torch.nan
    for all_MO, few_MO in zip(tile_linears(x, *weights), tile_linears(x[:37], *weights),
                              strict=True):  # fmt: skip
        assert all_MO[3].isnan().all()
        assert torch.isfinite(all_MO[4:]).all()
        assert torch.equal(all_MO[4:37], few_MO[4:])


def test_a_weight_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 31"):
        tile_linears(normal(40, 31), normal(8, 31), normal(8, 32))


class TestWhenItIsTaken:
    """The model asks for it only where it means what the layers say."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many projections each call made."""
        made: list[int] = []

        def counted(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            made.append(len(weights))
            return tile_linears(x, *weights)

        monkeypatch.setattr(layers, "tile_linears", counted)
        return made

    @staticmethod
    def linears(*widths: int, bias: bool = False) -> list[Linear]:
        return [Linear(32, width, bias=bias) for width in widths]

    def test_under_autocast(self, calls: list[int]) -> None:
        x, made = normal(2, 40, 32), self.linears(16, 8)
        with torch.autocast("cpu", torch.bfloat16):
            one, other = project(x, *made)
            alone = made[0](x)
            with torch.no_grad():
                project(x, *made)
        assert calls == [2, 1, 2]
        assert (one.shape, other.shape) == ((2, 40, 16), (2, 40, 8))
        assert torch.equal(one, alone)

    def test_not_elsewhere(self, calls: list[int]) -> None:
        x, made = normal(40, 32), self.linears(16, 8)
        project(x, *made)  # float32
        with torch.autocast("cpu", torch.bfloat16):
            project(x[:3], *made)  # a few rows
            project(x, *self.linears(16, 8, bias=True))
            project(x, nn.Linear(32, 4), nn.Linear(32, 8))
            made[0].weight.requires_grad_(False)
            made[0](x)
        assert not calls

    def test_one_that_differs_goes_alone(self, calls: list[int]) -> None:
        """A hook is an adapter, or a calibration: it must be called."""
        x, made, seen = normal(40, 32), self.linears(16, 8), []
        made[1].register_forward_hook(lambda *_: seen.append(1))
        with torch.autocast("cpu", torch.bfloat16):
            project(x, *made)
        assert seen
        assert calls == [1]

    def test_a_large_one_alone_goes_another_way(self) -> None:
        weight = torch.empty(LARGE // 256 + 1, 256)
        assert gain_by_tiles(weight[1:])
        assert not gain_by_tiles(weight)
        assert gain_by_tiles(weight, weight)
        assert not gain_by_tiles()

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (dict(model_type="llama"), [3, 1]),  # q with k and v, o
            (dict(model_type="qwen2"), [1]),  # the others have biases
            (dict(), [2, 1, 1, 1]),  # q_a with kv_a, q_b, kv_b, o
            (dict(q_lora_rank=None), [2, 1, 1]),  # q with kv_a, kv_b, o
        ],
    )
    def test_in_models(
        self,
        calls: list[int],
        monkeypatch: pytest.MonkeyPatch,
        changes: dict[str, object],
        expected: list[int],
    ) -> None:
        """What they are taken for, and that gradients are those of the layers alone."""
        tokens = torch.randint(97, (2, 25), generator=torch.Generator().manual_seed(0))
        window = make_window(
            tokens, torch.zeros_like(tokens), torch.ones_like(tokens).bool(), 0, False
        )

        def grads() -> list[Tensor]:
            model = tiny_model(num_hidden_layers=1, **changes)
            with torch.autocast("cpu", torch.bfloat16):
                language_model_losses(model, window).main.backward()
            return [p.grad for p in model.parameters() if p.grad is not None]

        found = grads()
        assert calls == expected
        monkeypatch.setattr(layers, "gain_by_tiles", lambda *weights: False)
        for one, other in zip(found, grads(), strict=True):
            assert (one - other).norm() < 0.03 * other.norm()
        assert calls == expected
