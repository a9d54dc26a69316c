"""Which modules of a model compute in FP8, and for how long."""

from __future__ import annotations

import pytest
import torch

from qiusuo.checkpoint.fp8 import is_quantized_name
from qiusuo.checkpoint.tensors import disk_shapes
from qiusuo.kernels.fp8 import PLAIN, Scales
from qiusuo.model.fp8 import POWERS, fp8_modules, in_fp8
from qiusuo.model.layers import Linear
from qiusuo.model.moe import Experts
from tests.model.shapes import FAMILIES, tiny_model

every_family = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
TOKENS = torch.arange(12).view(2, 6)


@every_family
def test_what_computes_in_fp8_is_what_deepseek_stores_in_fp8(changes: dict) -> None:
    mtp = 0 if "llama" in str(changes) or "qwen" in str(changes) else 1
    model = tiny_model(**changes, num_nextn_predict_layers=mtp)
    chosen = fp8_modules(model)
    stacks = {name for name, module in chosen.items() if isinstance(module, Experts)}
    expected = set()
    for name in disk_shapes(model.config):
        if is_quantized_name(name):
            before, experts, _ = name.partition(".mlp.experts")
            expected.add(before + experts if experts else name.removesuffix(".weight"))
    assert chosen.keys() == expected
    assert bool(stacks) == bool(model.routers())


def scales_of(model) -> dict[str, object]:
    return {
        name: module.fp8
        for name, module in model.named_modules()
        if isinstance(module, Linear | Experts)
    }


def test_the_paper_s_powers_of_two_and_everywhere() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    with in_fp8(model, "fp8"):
        found = scales_of(model)
    assert found["model.layers.1.self_attn.o_proj"] == Scales(inputs=True)
    assert found["model.layers.1.self_attn.kv_b_proj"] == PLAIN
    assert found["model.layers.1.mlp.shared_experts.down_proj"] == PLAIN
    assert found["model.layers.1.mlp.experts"] == (Scales(inputs=True), Scales(gradients=True))
    assert found["lm_head"] is found["model.layers.3.eh_proj"] is None
    with in_fp8(model, "fp8_ue8m0"):
        found = scales_of(model)
    assert found["model.layers.0.mlp.up_proj"] == POWERS
    assert found["model.layers.3.mlp.experts"] == (POWERS, POWERS)


@every_family
def test_outside_it_is_the_model_it_was(changes: dict) -> None:
    model, other = tiny_model(**changes), tiny_model(**changes)
    before = model(TOKENS).x_BTD
    with in_fp8(model, "fp8"):
        within = model(TOKENS).x_BTD
        assert torch.equal(other(TOKENS).x_BTD, before)  # another model is not concerned
    with pytest.raises(RuntimeError, match="on purpose"), in_fp8(model, "fp8"):
        raise RuntimeError("on purpose")
    assert not any(scales_of(model).values())
    assert torch.equal(model(TOKENS).x_BTD, before)
    error = (within - before).norm() / before.norm()
    assert error > 0.001  # a router sees other numbers, so there is no telling how far


def test_the_backward_pass_may_run_outside() -> None:
    model = tiny_model()
    grads = []
    for outside in (True, False):
        model.zero_grad()
        with in_fp8(model, "fp8"):
            loss = model(TOKENS).x_BTD.square().sum()
            if not outside:
                loss.backward()
        if outside:
            loss.backward()
        grads.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
