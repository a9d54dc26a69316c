"""SwiGLU networks that learn on AMX, against their equation in float64; skipped where the processor
has none.

Their numbers are rounded to bfloat16 about as often as PyTorch's own products under autocast are,
so an error over a whole tensor of a few thousandths is right and one of a few hundredths is not.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qiusuo.kernels import experts as experts_room
from qiusuo.kernels.experts import experts_grouped, experts_reference
from qiusuo.kernels.native import native
from qiusuo.kernels.tile_mlp import fit_tiles, tile_experts, tile_mlp, tiles_learn
from qiusuo.model import layers
from qiusuo.model.layers import MLP
from tests.kernels.gradients import normal, value_and_grads

# M tokens, K experts per token, E experts, D hidden, F width.

pytestmark = pytest.mark.skipif(
    (library := native()) is None or not library.has_tiles,
    reason="no AMX, or QIUSUO_KERNELS leaves it out",
)

ROUNDED = 0.008  # of a tensor's norm
FEW_ROUNDED = 0.02  # of one that may be a few numbers


def equation(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def network(tokens: int, hidden: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (tokens, hidden), (width, hidden), (width, hidden), (hidden, width)
    sizes = 1, hidden**0.5, hidden**0.5, width**0.5
    return [
        (normal(*shape, seed=seed) / size).to(dtype)
        for seed, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
    ]


def mixture(tokens: int, choices: int, experts: int, hidden: int, width: int) -> list[Tensor]:
    return [
        normal(tokens, hidden),
        normal(tokens, choices, seed=1).sigmoid(),
        normal(experts, 2 * width, hidden, seed=2) / hidden**0.5,
        normal(experts, hidden, width, seed=3) / width**0.5,
    ]


def some_indices(tokens: int, choices: int, experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).topk(choices).indices


def assert_near(
    kernel: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: list[Tensor]
) -> None:
    """Value and all gradients, over whole tensors; types as they came, the value in bfloat16."""
    found = value_and_grads(kernel, *tensors)
    expected = value_and_grads(plain, *(x.double() for x in tensors))
    assert found[0].dtype is torch.bfloat16
    assert [x.dtype for x in found[1:]] == [x.dtype for x in tensors]
    for number, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert torch.isfinite(f).all(), number
        error = (f.double() - e).norm() / e.norm().clamp_min(1e-9)
        assert error < (ROUNDED if e.numel() > 500 else FEW_ROUNDED), (number, float(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "hidden", "width"),
    [
        (1, 8, 8), (33, 17, 31), (64, 32, 32), (257, 40, 100), (300, 96, 520), (513, 264, 33),
    ],
)  # fmt: skip
def test_a_network(tokens: int, hidden: int, width: int, dtype: torch.dtype) -> None:
    assert_near(tile_mlp, equation, network(tokens, hidden, width, dtype))


@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "hidden", "width"),
    [
        (1, 1, 1, 8, 8), (40, 2, 3, 17, 33), (300, 4, 16, 96, 40), (70, 3, 64, 40, 24),
        (600, 1, 2, 264, 300),
    ],
)  # fmt: skip
def test_a_mixture(tokens: int, choices: int, experts: int, hidden: int, width: int) -> None:
    indices_MK = some_indices(tokens, choices, experts)

    def through(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, gate_up, down: kernel(x, w, indices_MK, gate_up, down)

    tensors = mixture(tokens, choices, experts, hidden, width)
    assert_near(through(tile_experts), through(experts_reference), tensors)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 140), st.integers(8, 70), st.integers(8, 70), st.integers(0, 99))
def test_any_shape(tokens: int, hidden: int, width: int, seed: int) -> None:
    tensors = network(tokens, hidden, width, torch.float32)
    tensors[0] = normal(tokens, hidden, seed=seed)
    assert_near(tile_mlp, equation, tensors)


def test_an_expert_without_tokens_gets_zeros() -> None:
    x, weights, gate_up, down = mixture(50, 2, 6, 32, 16)
    indices_MK = some_indices(50, 2, 4)  # never experts 4 and 5
    grads = value_and_grads(lambda *t: tile_experts(t[0], t[1], indices_MK, *t[2:]), x, weights,
                            gate_up, down)[3:]  # fmt: skip
    for grad in grads:
        assert not grad[4:].any()
        assert grad[:4].flatten(1).any(1).all()


def test_the_same_bits_for_any_number_of_threads() -> None:
    tensors = network(700, 256, 600, torch.float32)
    routed, indices_MK = mixture(300, 3, 8, 64, 48), some_indices(300, 3, 8)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(
                value_and_grads(tile_mlp, *tensors)
                + value_and_grads(lambda x, w, g, d: tile_experts(x, w, indices_MK, g, d), *routed)
            )
    finally:
        torch.set_num_threads(threads)
    for one, other in pairwise(found):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_numbers_that_overflow_stay_visible() -> None:
    tensors = network(64, 32, 32, torch.float32)
    tensors[0][3, 5] = torch.nan
    out = tile_mlp(*tensors)
    assert out[3].isnan().all()
    assert torch.isfinite(out[4:]).all()
    tensors[0][3, 5] = -1e30  # the sigmoid of a huge number is 0 or 1
    assert not tile_mlp(*tensors)[4:].isnan().any()


def test_what_does_not_fit_is_refused() -> None:
    x, gate, up, down = network(40, 32, 16, torch.float32)
    with pytest.raises(ValueError, match="rows of 31"):
        tile_mlp(x[:, :31], gate, up, down)
    with pytest.raises(ValueError, match="do not fit"):
        tile_mlp(x, gate, up[:8], down)
    with pytest.raises(ValueError, match="do not fit"):
        tile_experts(x, torch.ones(40, 2), some_indices(39, 2, 4), gate[None], down[None])


class TestWhenItIsTaken:
    """The model asks for it only where it means what the layers say."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        made: list[str] = []

        def counted(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *tensors: (made.append(name), kernel(*tensors))[1]

        monkeypatch.setattr(layers, "tile_mlp", counted("mlp", tile_mlp))
        monkeypatch.setattr(experts_room, "tile_experts", counted("experts", tile_experts))
        return made

    def test_under_autocast(self, calls: list[str]) -> None:
        mlp, x = MLP(32, 16), normal(40, 32)
        with torch.autocast("cpu", torch.bfloat16):
            mlp(x)
            with torch.no_grad():
                mlp(x)
            x_MD, weights_MK, gate_up, down = (
                p.requires_grad_() for p in mixture(40, 2, 4, 32, 16)
            )
            experts_grouped(x_MD, weights_MK, some_indices(40, 2, 4), gate_up, down)
        assert calls == ["mlp", "mlp", "experts"]

    def test_not_elsewhere(self, calls: list[str]) -> None:
        mlp, x = MLP(32, 16), normal(40, 32)
        mlp(x)  # float32
        with torch.autocast("cpu", torch.bfloat16):
            mlp(x[:3])  # a few rows
            mlp.down_proj.weight.requires_grad_(False)  # somebody does not learn
            mlp(x)
        assert not calls

    def test_not_past_a_hook(self, calls: list[str]) -> None:
        """An adapter, or a calibration, stands at a projection: it must be called."""
        mlp, x, seen = MLP(32, 16), normal(40, 32), []
        mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        with torch.autocast("cpu", torch.bfloat16):
            mlp(x)
        assert seen
        assert not calls

    def test_not_for_other_layers(self, calls: list[str]) -> None:
        mlp, x = MLP(32, 16), normal(40, 32)
        mlp.gate_proj = nn.Linear(32, 16)  # type: ignore[assignment]
        with torch.autocast("cpu", torch.bfloat16):
            mlp(x)
        assert not calls

    def test_large_matrices_go_another_way(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert tiles_learn(normal(64, 32))
            assert fit_tiles(torch.empty(512, 1024, requires_grad=True))
            assert not fit_tiles(torch.empty(513, 1024, requires_grad=True))
