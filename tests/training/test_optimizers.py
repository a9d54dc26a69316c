"""Muon against torch's own, stacks of matrices against single ones, and who optimizes what."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qiusuo.model.transformer import Transformer
from qiusuo.training.optimizers import Muon, build_optimizers, orthogonalize
from qiusuo.training.sections import OptimizerSection
from tests.model.shapes import tiny_model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "shape", [(1, 24, 64), (1, 64, 24), (5, 16, 48), (5, 48, 16), (3, 32, 32), (2, 1, 7)]
)
def test_orthogonalize_evens_out_singular_values(shape: tuple[int, ...]) -> None:
    matrices = normal(*shape) * torch.logspace(-3, 3, shape[0])[:, None, None]  # of any size
    found = orthogonalize(matrices)
    assert found.shape == shape
    assert found.dtype == torch.bfloat16
    sizes = torch.linalg.svdvals(found.float())
    # The quintic's five steps bring what is not tiny to within 0.68 and 1.2.
    assert sizes.max() < 1.25
    if shape[1] != shape[2]:  # square normal matrices have singular values near zero
        assert sizes.min() > 0.6
    # The directions are the matrix's own: U Vᵀ, not some other orthogonal matrix.
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    nearest = left @ right
    likeness = (found.float() * nearest).flatten(1).sum(1) / min(shape[1:])
    assert (likeness > 0.65).all()


def test_orthogonalize_takes_each_matrix_by_itself() -> None:
    matrices = normal(4, 12, 20)
    together = orthogonalize(matrices)
    for number in range(4):
        alone = orthogonalize(matrices[number : number + 1])[0]
        torch.testing.assert_close(together[number], alone, rtol=0, atol=0.02)


def test_orthogonalize_of_nothing_is_nothing() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 6)).any()


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int) -> None:
    for step in range(count):
        for number, parameter in enumerate(parameters):
            parameter.grad = normal(*parameter.shape, seed=100 * step + number)
        optimizer.step()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=["tall", "wide", "square"])
def test_muon_is_torchs_on_matrices(shape: tuple[int, int]) -> None:
    ours, theirs = nn.Parameter(normal(*shape)), nn.Parameter(normal(*shape))
    before = ours.detach().clone()
    steps(Muon([ours], lr=0.05, momentum=0.9, weight_decay=0.2), [ours], 6)
    peer = torch.optim.Muon(
        [theirs], lr=0.05, momentum=0.9, weight_decay=0.2, nesterov=True, adjust_lr_fn="original"
    )
    steps(peer, [theirs], 6)
    moved = (theirs - before).abs().max()
    assert moved > 0.05
    assert (ours - theirs).abs().max() <= 0.02 * moved


def test_muon_decay_is_decoupled() -> None:
    parameter = nn.Parameter(normal(8, 8))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    torch.testing.assert_close(parameter.detach(), before * 0.95)


def test_muon_scales_tall_matrices_by_their_shape() -> None:
    tall, wide = nn.Parameter(torch.zeros(64, 4)), nn.Parameter(torch.zeros(4, 64))
    tall.grad, wide.grad = normal(64, 4), normal(4, 64)
    Muon([tall, wide], lr=1.0, momentum=0.0, weight_decay=0.0).step()
    assert torch.linalg.svdvals(tall.detach()).mean() == pytest.approx(4.0, rel=0.25)
    assert torch.linalg.svdvals(wide.detach()).mean() == pytest.approx(1.0, rel=0.25)


def test_stacked_experts_are_updated_as_their_matrices() -> None:
    """gate_up_proj [E, 2F, D] as 2E matrices [F, D], down_proj [E, D, F] as E."""
    model = tiny_model()
    section = OptimizerSection(learning_rate=0.03, weight_decay=0.1)
    muon = build_optimizers(model, section)[-1]
    experts = model.model.layers[1].mlp.experts
    width = model.config.moe_intermediate_size
    parts: list[tuple[Tensor, nn.Parameter]] = []  # (place in the stack, a matrix of its own)
    for gate_up, down in zip(experts.gate_up_proj.data, experts.down_proj.data, strict=True):
        for place in (gate_up[:width], gate_up[width:], down):
            parts.append((place, nn.Parameter(place.clone())))
    before = [alone.detach().clone() for _, alone in parts]
    singles = [alone for _, alone in parts]
    peer = Muon(singles, lr=0.03, momentum=section.momentum, weight_decay=0.1)
    for step in range(3):
        experts.gate_up_proj.grad = normal(*experts.gate_up_proj.shape, seed=step)
        experts.down_proj.grad = normal(*experts.down_proj.shape, seed=10 + step)
        grads = []
        for gate_up, down in zip(experts.gate_up_proj.grad, experts.down_proj.grad, strict=True):
            grads += [gate_up[:width], gate_up[width:], down]
        for alone, grad in zip(singles, grads, strict=True):
            alone.grad = grad.clone()
        muon.step()
        peer.step()
    for (place, alone), was in zip(parts, before, strict=True):
        moved = (alone - was).abs().max()
        assert moved > 0.005
        assert (place - alone).abs().max() <= 0.02 * moved


def names_in(model: Transformer, optimizers: list[torch.optim.Optimizer]) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in optimizers
    ]


MODELS = {
    "v3": {"num_nextn_predict_layers": 2},
    "tied": {"tie_word_embeddings": True},
    "v2": {"model_type": "deepseek_v2", "q_lora_rank": None},
    "dense": {"n_routed_experts": 0},
}


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_every_parameter_is_in_exactly_one_optimizer(changes: dict, kind: str) -> None:
    model = tiny_model(**changes)
    optimizers = build_optimizers(model, OptimizerSection(kind=kind))
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(parameters) == len({id(p) for p in parameters})
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
    assert len(optimizers) == (2 if kind == "muon" else 1)


def test_who_optimizes_what() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    adamw, muon = names_in(model, build_optimizers(model, OptimizerSection()))
    aside = ("norm.weight", ".gate.weight", "embed_tokens.weight", "lm_head.weight")
    kept = {name for name in adamw | muon if name.endswith(aside)}
    assert adamw == kept
    assert "model.layers.3.eh_proj.weight" in muon
    assert "model.layers.1.mlp.gate.weight" in adamw
    assert "model.layers.1.mlp.experts.gate_up_proj" in muon


def test_rates_and_decay_come_from_the_recipe() -> None:
    model = tiny_model()
    section = OptimizerSection(
        learning_rate=0.03, adamw_learning_rate=0.004, weight_decay=0.2, beta1=0.8, beta2=0.9
    )
    adamw, muon = build_optimizers(model, section)
    assert [group["peak_lr"] for group in adamw.param_groups] == [0.004, 0.004]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.2, 0.0]
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert [p.ndim for p in adamw.param_groups[1]["params"]] == [1] * len(
        adamw.param_groups[1]["params"]
    )
    assert (muon.param_groups[0]["peak_lr"], muon.param_groups[0]["weight_decay"]) == (0.03, 0.2)
    [alone] = build_optimizers(model, OptimizerSection(kind="adamw", adamw_learning_rate=0.05))
    assert alone.param_groups[0]["peak_lr"] == 0.05


def test_saved_state_continues_identically(tmp_path) -> None:
    def advance(model: Transformer, optimizers: list[torch.optim.Optimizer], first: int) -> None:
        for step in range(first, first + 3):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = normal(*parameter.shape, seed=1000 * step + number)
            for optimizer in optimizers:
                optimizer.step()

    model = tiny_model(num_nextn_predict_layers=1)
    optimizers = build_optimizers(model, OptimizerSection())
    advance(model, optimizers, 0)
    torch.save([optimizer.state_dict() for optimizer in optimizers], tmp_path / "o.pt")
    twin = copy.deepcopy(model)
    twins = build_optimizers(twin, OptimizerSection())
    for optimizer, saved in zip(twins, torch.load(tmp_path / "o.pt"), strict=True):
        optimizer.load_state_dict(saved)
    advance(model, optimizers, 3)
    advance(twin, twins, 3)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name
    # Without the saved state it would not have been the same.
    fresh = copy.deepcopy(tiny_model(num_nextn_predict_layers=1))
    fresh.load_state_dict(model.state_dict())
    advance(fresh, build_optimizers(fresh, OptimizerSection()), 6)
    advance(model, optimizers, 6)
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.weight)
