"""Experts that were chosen at sampling are taken again: the choice only, not its weights."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qiusuo.engine.core import Engine
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import Request
from qiusuo.engine.sampling import Sampling
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.kernels.token_logprobs import token_logprobs
from qiusuo.model.transformer import Transformer
from tests.engine.oracle import run
from tests.kernels.gradients import assert_all_close
from tests.model.shapes import tiny_model

# B texts, T tokens, L MoE layers, K experts of a token.
TOKENS = torch.randint(97, (3, 11), generator=torch.Generator().manual_seed(0))


def chosen(model: Transformer, tokens_BT: Tensor, **given: Tensor) -> Tensor:
    """[B, T, L, K], in the engine's type."""
    with torch.no_grad():
        routings = model(tokens_BT, **given).routings
    layers = [routings[layer].indices_MK for layer in sorted(routings)]
    return torch.stack(layers, 1).unflatten(0, tokens_BT.shape).to(torch.int16)


def value_and_gradients(model: Transformer, experts: Tensor | None) -> list[Tensor]:
    model.zero_grad()
    out = model(TOKENS, experts_BTLK=experts).x_BTD
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    grads = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    return [out.detach(), *grads]


@pytest.mark.parametrize("variant", [{}, {"model_type": "deepseek_v2"}, {"norm_topk_prob": False}])
def test_the_same_choice_gives_the_same_bits(variant):
    model = tiny_model(**variant)
    live = value_and_gradients(model, None)
    experts = chosen(model, TOKENS)
    assert experts.shape == (3, 11, 2, 3)
    for given in (experts, torch.full_like(experts, -1)):
        assert all(map(torch.equal, live, value_and_gradients(model, given)))


def test_other_experts_are_taken_with_live_weights_that_learn():
    """Against the same model made to choose them by its biases, which no weight feels."""
    model = tiny_model(n_group=1, topk_group=1)
    other = torch.tensor([6, 1, 4])
    experts = other.expand(3, 11, 2, 3).to(torch.int16)
    live = chosen(model, TOKENS)
    assert not torch.equal(live, experts)
    assert torch.equal(chosen(model, TOKENS, experts_BTLK=experts), experts)
    replayed = value_and_gradients(model, experts)
    for router in model.routers().values():
        router.e_score_correction_bias.zero_()
        router.e_score_correction_bias[other] = 10.0
    forced = value_and_gradients(model, None)
    assert_all_close(replayed, forced, 2e-6)  # of the largest: sums run in another order
    gates = [router.weight.grad for router in model.routers().values()]
    assert all(gate[other].abs().sum() > 0 for gate in gates)


def test_tokens_without_experts_choose_now():
    model = tiny_model()
    experts = (chosen(model, TOKENS) + 1) % 8
    experts[:, 4:] = -1
    taken = chosen(model, TOKENS, experts_BTLK=experts)
    assert torch.equal(taken[:, :4], experts[:, :4])
    assert (taken >= 0).all()
    # The first layer of experts stands before all that replay changes, the second behind it.
    assert torch.equal(taken[:, 4:, 0], chosen(model, TOKENS)[:, 4:, 0])
    later = model(TOKENS, experts_BTLK=experts)
    again = model(TOKENS, experts_BTLK=taken)
    assert torch.equal(later.x_BTD, again.x_BTD)


def test_mtp_modules_choose_by_themselves():
    model = tiny_model(num_nextn_predict_layers=1)
    experts = chosen(model, TOKENS)
    assert experts.shape[2] == 2
    hidden = model(TOKENS, experts_BTLK=experts)
    ahead = model.predict_ahead(hidden.x_BTD, TOKENS, 0, model.context(TOKENS))
    assert list(ahead.routings) == [3]


@pytest.mark.parametrize("model_seed", [0, 3])
def test_what_the_engine_sampled_is_computed_again_as_it_was(model_seed):
    """Sampled with chunks and a shared cache, then one forward pass over padded rows."""
    model = tiny_model(model_seed)
    engine = Engine(model, Limits(cache_bytes=1 << 20, page_tokens=4, step_tokens=7))
    answers = []
    for number, length in enumerate((5, 14, 9)):
        prompt = tuple((7 * i + number) % 97 for i in range(length))
        sampling = Sampling(max_tokens=8 + number, temperature=1.0, seed=number, logprobs=0)
        answers += engine.submit(Request(prompt, sampling, n=2, keep_experts=True))
    run(engine)
    texts = [torch.tensor(one.tokens) for one in answers]
    tokens_BT = pad_sequence(texts, batch_first=True)
    told = [torch.cat([*one.experts, one.experts[0].new_full((1, 2, 3), -1)]) for one in answers]
    experts = pad_sequence(told, batch_first=True, padding_value=-1)

    assert torch.equal(
        chosen(model, tokens_BT, experts_BTLK=experts)[experts >= 0], experts[experts >= 0]
    )
    live = chosen(model, tokens_BT).sort(-1).values  # in float32 they agree by themselves
    replayed = experts >= 0
    assert torch.equal(live[replayed], experts.sort(-1).values[replayed])

    hidden = model(tokens_BT, experts_BTLK=experts)
    labels_BT = torch.full_like(tokens_BT, IGNORE)
    labels_BT[:, :-1] = tokens_BT[:, 1:]
    logprobs_M, _ = token_logprobs(
        hidden.x_BTD.flatten(0, 1), model.lm_head.weight, labels_BT.flatten()
    )
    logprobs_BT = logprobs_M.view_as(tokens_BT)
    for row, one in enumerate(answers):
        place = len(one.tokens) - len(one.answer) - 1
        ours = logprobs_BT[row, place : place + len(one.answer)]
        theirs = torch.tensor([drawn.logprob for drawn in one.drawn])
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-4)


def test_after_an_update_the_old_choice_still_holds():
    """The case replay is for: other weights would choose others."""
    old, new = tiny_model(0), tiny_model(0)
    experts = chosen(old, TOKENS)
    for router in new.routers().values():
        router.weight.data += 0.5 * torch.randn(
            router.weight.shape, generator=torch.Generator().manual_seed(2)
        )
    assert not torch.equal(chosen(new, TOKENS), experts)
    assert torch.equal(chosen(new, TOKENS, experts_BTLK=experts), experts)


def test_what_does_not_fit_is_refused():
    model = tiny_model()
    experts = chosen(model, TOKENS)
    with pytest.raises(ValueError, match=r"\(3, 10, 2, 3\): \(3, 11, 2, 3\) wanted"):
        model(TOKENS, experts_BTLK=experts[:, 1:])
    with pytest.raises(ValueError, match=r"number 8, but the model has 8"):
        model(TOKENS, experts_BTLK=experts.clamp_min(8))
    with pytest.raises(ValueError, match="this model has none"):
        tiny_model(model_type="llama")(TOKENS, experts_BTLK=experts)
