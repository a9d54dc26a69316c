"""A token's bits do not depend on its neighbours, in bfloat16 and in the batch-invariant mode."""

from dataclasses import replace

import pytest
import torch

from qiusuo.engine.core import Engine
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import Request, Sequence
from qiusuo.engine.sampling import Sampling
from qiusuo.model.transformer import Transformer
from tests.model.shapes import tiny_model

SHAPES = {
    "v3": dict(
        hidden_size=160,
        intermediate_size=352,
        moe_intermediate_size=72,
        num_attention_heads=5,
        kv_lora_rank=64,
        q_lora_rank=96,
        initializer_range=0.05,
    ),
    "qwen2": dict(model_type="qwen2", hidden_size=192, num_key_value_heads=2),
}
LIMITS = Limits(cache_bytes=4 << 20, page_tokens=8, batch_invariant=True)
PROMPTS = [[(7 * i * i + 3 * j) % 97 for i in range(3 + 11 * j)] for j in range(6)]


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def model(request) -> Transformer:
    model = tiny_model(**request.param).bfloat16()
    for router in model.routers().values():
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    return model


def answers(model: Transformer, prompts: list[list[int]], limits: Limits) -> list[Sequence]:
    engine = Engine(model, limits)
    asked = [Request(tuple(prompt), Sampling(max_tokens=20)) for prompt in prompts]
    sequences = [engine.submit(request)[0] for request in asked]
    while not engine.idle:
        engine.step()
    return sequences


def bits(sequence: Sequence) -> list[tuple[int, float]]:
    return [(drawn.token, drawn.logprob) for drawn in sequence.drawn]


def test_the_same_bits_alone_in_company_and_in_chunks(model):
    alone = [bits(answers(model, [prompt], LIMITS)[0]) for prompt in PROMPTS]
    assert [bits(s) for s in answers(model, PROMPTS, LIMITS)] == alone
    chunked = replace(LIMITS, step_tokens=9, page_tokens=4, prefix_cache=False)
    assert [bits(s) for s in answers(model, PROMPTS, chunked)] == alone
    crowded = replace(LIMITS, cache_bytes=10 * Engine(model, LIMITS).page_bytes)  # preemption
    assert [bits(s) for s in answers(model, PROMPTS[::-1], crowded)] == alone[::-1]


def test_without_the_mode_bits_do_differ(model):
    """The test above would notice."""
    free = replace(LIMITS, batch_invariant=False)
    alone = [bits(answers(model, [prompt], free)[0]) for prompt in PROMPTS]
    assert [bits(s) for s in answers(model, PROMPTS, free)] != alone


@torch.no_grad()
def test_the_mode_computes_the_same_model(model):
    model.float()
    free = replace(LIMITS, batch_invariant=False)
    for one, other in zip(
        answers(model, PROMPTS, LIMITS), answers(model, PROMPTS, free), strict=True
    ):
        assert list(one.answer) == list(other.answer)
        for drawn, expected in zip(one.drawn, other.drawn, strict=True):
            assert drawn.logprob == pytest.approx(expected.logprob, abs=1e-4)
