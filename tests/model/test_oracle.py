"""Our logits against the papers' equations, from what stands on disk."""

import numpy as np
import pytest
import torch

from qiusuo.model.rope_scaling import YarnScaling
from tests.model import oracle
from tests.model.saved import save_and_read
from tests.model.shapes import VARIANTS, tiny_model

TOKENS = [5, 96, 0, 17, 17, 42, 3, 88, 61, 2, 30]

MORE: dict[str, dict[str, object]] = {
    "other-eps": {"rms_norm_eps": 0.05},  # the latent norms keep 1e-6
    "no-shared": {"n_shared_experts": 0},
    "all-moe": {"first_k_dense_replace": 0, "num_hidden_layers": 2},
    "all-dense": {"first_k_dense_replace": 3},
    "one-of-two-groups": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    "wide-values": {"v_head_dim": 24},
    "other-theta": {"rope_theta": 37.0},
    "yarn-long-ramp": {
        "rope_theta": 37.0,
        "rope_scaling": YarnScaling(
            factor=6.0, original_max_position_embeddings=40, beta_fast=4.0, beta_slow=0.5
        ),
    },
    "yarn-two-magnitudes": {
        "rope_scaling": YarnScaling(
            factor=6.0,
            original_max_position_embeddings=9,
            beta_fast=3.0,
            beta_slow=0.5,
            mscale=1.3,
            mscale_all_dim=0.4,
        )
    },
}


def assert_same(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Float32 against float64: within 2e-5 of the largest logit."""
    largest = np.abs(expected).max()
    assert largest > 0.1  # else nothing is compared
    np.testing.assert_allclose(
        actual.detach().double().numpy(), expected, rtol=0, atol=2e-5 * largest
    )


@pytest.mark.parametrize("changes", (VARIANTS | MORE).values(), ids=VARIANTS | MORE)
def test_logits(changes, tmp_path):
    model = tiny_model(**changes)
    tensors, config = save_and_read(model, tmp_path / "m")
    hidden, logits = oracle.forward(tensors, config, TOKENS)
    ours = model(torch.tensor([TOKENS]))
    assert_same(ours.x_BTD[0], hidden)
    assert_same(model.logits(ours.x_BTD)[0], logits)


@pytest.mark.parametrize("name", ["v3", "v3-yarn", "v3-tied", "v2-groups"])
def test_logits_of_mtp_modules_in_a_chain(name, tmp_path):
    model = tiny_model(**VARIANTS[name], num_nextn_predict_layers=2)
    tensors, config = save_and_read(model, tmp_path / "m")
    tokens = torch.tensor([TOKENS])
    expected, _ = oracle.forward(tensors, config, TOKENS)
    x = model(tokens).x_BTD
    assert_same(x[0], expected)
    for depth in range(2):
        expected, logits = oracle.predict_ahead(tensors, config, TOKENS, expected, depth)
        following = tokens[:, depth + 1 :]
        ahead = model.predict_ahead(x[:, :-1], following, depth, model.context(following))
        x = ahead.x_BTD
        assert x.shape[1] == len(TOKENS) - depth - 1
        assert list(ahead.routings) == [model.config.num_hidden_layers + depth]
        assert_same(x[0], expected)
        assert_same(model.logits(x)[0], logits)


def test_routing_that_is_handed_out(tmp_path):
    """The experts and weights of ``routings`` are those that the equations choose."""
    model = tiny_model(negative_biases=True, num_hidden_layers=2, q_lora_rank=None)
    tensors, config = save_and_read(model, tmp_path / "m")
    seen = []
    model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    routing = model(torch.tensor([TOKENS])).routings[1]
    for row, x in enumerate(seen[0].detach().double().numpy()):
        chosen = dict(oracle.route(tensors, config, "model.layers.1.mlp.", x))
        assert set(routing.indices_MK[row].tolist()) == set(chosen)
        for expert, weight in zip(
            routing.indices_MK[row].tolist(), routing.weights_MK[row].tolist(), strict=True
        ):
            assert weight == pytest.approx(chosen[expert], rel=1e-4)
