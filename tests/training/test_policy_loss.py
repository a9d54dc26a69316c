"""GRPO's loss against the equations written out in numpy, one token at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qiusuo.training.rl.policy_loss import (
    PolicyOptions,
    Tokens,
    Totals,
    add_measures,
    policy_loss,
)
from qiusuo.training.rl.policy_presets import PRESETS

OPTIONS = {name: preset.loss for name, preset in PRESETS.items()} | {
    "dual": PolicyOptions(dual_clip=1.5, kl=0.1),
    "no clip": PolicyOptions(clip_low=None, clip_high=None),
    "v3.2": PolicyOptions(
        clip_low=0.2, clip_high=0.2, aggregation="sequence", kl=0.3, kl_importance=True,
        drop_beyond=0.05,
    ),
    "truncated": PolicyOptions(importance_cap=1.1, kl=0.2),
    "gspo wide": PolicyOptions(ratio="sequence", clip_low=0.05, clip_high=0.05, dual_clip=1.2),
    "cispo narrow": PolicyOptions(
        ratio="cispo", clip_low=0.1, clip_high=0.1, importance_cap=1.1, aggregation="constant"
    ),
}  # fmt: skip
LONGEST = 9


def batch(seed: int = 0, spread: float = 0.3, responses: int = 6, places: int = 7) -> Tokens:
    """Random log-probabilities near each other; one response masked, garbage behind masks."""
    generator = torch.Generator().manual_seed(seed)

    def near(other: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(other.shape, generator=generator, dtype=torch.float64)
        return other + spread * noise

    base = -2 * torch.rand(responses, places, generator=generator, dtype=torch.float64) - 0.5
    mask = torch.rand(responses, places, generator=generator) < 0.75
    mask[:, 0] = True
    mask[1] = False
    advantages = torch.randn(responses, generator=generator, dtype=torch.float64)
    tensors = [near(base) for _ in range(4)]
    for one in tensors[1:]:
        one[~mask] = float("nan")
    return Tokens(*tensors[:3], advantages, mask, tensors[3])


def totals_of(tokens: Tokens) -> Totals:
    mask = tokens.mask_BT
    return Totals(int(mask.sum()), int(mask.any(1).sum()), LONGEST)


def oracle(tokens: Tokens, options: PolicyOptions, totals: Totals, moved=None, frozen=None):
    """The loss, by the equations. What a gradient does not see is read from ``frozen``."""
    numbers = [None if one is None else one.detach().numpy() for one in tokens]
    logprobs, old, rollout, advantages, mask, reference = numbers
    logprobs = logprobs if moved is None else moved
    frozen = logprobs if frozen is None else frozen
    loss = 0.0
    for b in range(len(mask)):
        places = np.flatnonzero(mask[b])
        if not len(places):
            continue
        a = advantages[b]
        terms = []
        mean_ratio = np.exp(np.mean([logprobs[b, t] - old[b, t] for t in places]))
        drift = np.mean([rollout[b, t] - frozen[b, t] for t in places])
        dropped = options.drop_beyond is not None and a < 0 and drift > options.drop_beyond
        for t in places:
            rho = np.exp(logprobs[b, t] - old[b, t])
            low = -np.inf if options.clip_low is None else 1 - options.clip_low
            high = np.inf if options.clip_high is None else 1 + options.clip_high
            if options.ratio == "cispo":
                weight = min(max(np.exp(frozen[b, t] - old[b, t]), low), high)
                gain = weight * a * logprobs[b, t]
            else:
                r = mean_ratio if options.ratio == "sequence" else rho
                gain = min(r * a, min(max(r, low), high) * a)
                if options.dual_clip is not None and a < 0:
                    gain = max(gain, options.dual_clip * a)
            w = 1.0
            if options.importance_cap is not None:
                w = min(np.exp(old[b, t] - rollout[b, t]), options.importance_cap)
            term = 0.0 if dropped else -w * gain
            if options.kl:
                delta = reference[b, t] - logprobs[b, t]
                k3 = np.exp(delta) - delta - 1
                term += options.kl * k3 * (rho if options.kl_importance else 1)
            terms.append(term)
        if options.aggregation == "token":
            loss += sum(terms) / totals.tokens
        elif options.aggregation == "sequence":
            loss += np.mean(terms) / totals.responses
        else:
            loss += sum(terms) / (totals.responses * totals.longest)
    return loss


def loss_and_gradient(tokens: Tokens, options: PolicyOptions, totals: Totals | None = None):
    leaf = tokens.logprobs_BT.clone().requires_grad_()
    loss, measures = policy_loss(
        tokens._replace(logprobs_BT=leaf), options, totals or totals_of(tokens)
    )
    loss.backward()
    return loss.detach(), leaf.grad, measures


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_are_the_equations(name, seed):
    options, tokens = OPTIONS[name], batch(seed)
    totals = totals_of(tokens)
    loss, gradient, _ = loss_and_gradient(tokens, options)
    assert float(loss) == pytest.approx(oracle(tokens, options, totals), rel=1e-12)
    here = tokens.logprobs_BT.numpy()
    step, differences = 1e-6, np.zeros_like(here)
    for place in np.ndindex(here.shape):
        values = []
        for sign in (1, -1):
            moved = here.copy()
            moved[place] += sign * step
            values.append(oracle(tokens, options, totals, moved, frozen=here))
        differences[place] = (values[0] - values[1]) / (2 * step)
    np.testing.assert_allclose(gradient.numpy(), differences, rtol=1e-6, atol=1e-8)
    assert np.abs(differences).max() > 1e-4 or name == "gspo"  # there is something to compare


@given(st.integers(0, 1000), st.sampled_from(sorted(OPTIONS)), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_micro_batches_add_up_to_the_batch(seed, name, cut):
    tokens, options = batch(seed), OPTIONS[name]
    totals = totals_of(tokens)
    loss, gradient, measures = loss_and_gradient(tokens, options)
    parts = [
        loss_and_gradient(Tokens(*(one[rows] for one in tokens)), options, totals)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), gradient)
    assert add_measures(part[2] for part in parts) == pytest.approx(measures, rel=1e-9, abs=1e-15)


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=20, deadline=None)
def test_at_ratio_one_every_kind_is_the_plain_policy_gradient(seed, token_mean):
    """No clip bites, so the gradient is −A/N for each token, whatever the options."""
    tokens = batch(seed)
    same = tokens.logprobs_BT.clone()
    tokens = tokens._replace(old_BT=same, rollout_BT=same)
    totals = totals_of(tokens)
    mask = tokens.mask_BT
    share = torch.full_like(same, 1 / totals.tokens)
    if not token_mean:
        counts = mask.sum(1, keepdim=True).clamp_min(1)
        share = 1 / (counts * totals.responses).double().expand_as(same)
    expected = -tokens.advantages_B[:, None] * share * mask
    for options in OPTIONS.values():
        if options.ratio == "sequence" and token_mean:
            continue  # one ratio for all of a response: each token has the mean's share
        plain = replace(options, kl=0.0, aggregation="token" if token_mean else "sequence")
        _, gradient, measures = loss_and_gradient(tokens, plain)
        torch.testing.assert_close(gradient, expected)
        shares = measures.clip_low, measures.clip_high, measures.clip_dual, measures.dropped
        assert shares == (0, 0, 0, 0)
        assert measures.weight == pytest.approx(1)


def test_measures_are_what_they_say():
    tokens = batch(4)
    totals = totals_of(tokens)
    options = PolicyOptions(importance_cap=1.05, dual_clip=1.3, drop_beyond=0.02)
    measures = policy_loss(tokens, options, totals)[1]
    mask = tokens.mask_BT.numpy()
    logprobs, old, rollout, reference = (
        one.numpy()[mask]
        for one in (tokens.logprobs_BT, tokens.old_BT, tokens.rollout_BT, tokens.reference_BT)
    )
    a = np.broadcast_to(tokens.advantages_B.numpy()[:, None], mask.shape)[mask]
    rho, gap, delta = np.exp(logprobs - old), old - rollout, reference - logprobs
    assert measures.clip_low == pytest.approx(np.mean((rho < 0.8) & (a < 0)))
    assert measures.clip_high == pytest.approx(np.mean((rho > 1.28) & (a > 0)))
    assert measures.clip_dual == pytest.approx(np.mean((rho > 1.3) & (a < 0)))
    assert min(measures.clip_low, measures.clip_high, measures.clip_dual) > 0
    assert measures.kl == pytest.approx(np.mean(np.exp(delta) - delta - 1))
    assert measures.mismatch_k1 == pytest.approx(np.mean(-gap))
    assert measures.mismatch_k3 == pytest.approx(np.mean(np.exp(gap) - gap - 1))
    assert measures.mismatch_max == pytest.approx(np.abs(gap).max())
    assert measures.weight == pytest.approx(np.minimum(np.exp(gap), 1.05).mean())
    assert 0 < measures.dropped < 1


def test_masked_responses_and_their_garbage_do_not_matter():
    tokens = batch(2)
    _, gradient, _ = loss_and_gradient(tokens, PolicyOptions(kl=0.1, importance_cap=2.0))
    assert gradient.isfinite().all()
    assert not gradient[~tokens.mask_BT].any()
    assert gradient[tokens.mask_BT].any()


def test_a_batch_in_which_nothing_counts_has_loss_zero():
    tokens = batch(2)
    tokens = tokens._replace(mask_BT=torch.zeros_like(tokens.mask_BT))
    for options in OPTIONS.values():
        loss, gradient, _ = loss_and_gradient(tokens, options, Totals(0, 0, LONGEST))
        assert float(loss) == 0
        assert not gradient.any()


def test_what_does_not_fit_is_refused():
    tokens = batch()
    totals = totals_of(tokens)
    with pytest.raises(ValueError, match="wants log-probabilities by a reference"):
        policy_loss(tokens._replace(reference_BT=None), PolicyOptions(kl=0.1), totals)
    with pytest.raises(ValueError, match=r"old_BT \(6, 6\): \(6, 7\) wanted"):
        policy_loss(tokens._replace(old_BT=tokens.old_BT[:, 1:]), PolicyOptions(), totals)
    with pytest.raises(ValueError, match="1 told for the whole batch"):
        policy_loss(tokens, PolicyOptions(), Totals(1, 1, 1))
    for wrong in (
        {"ratio": "word"},
        {"aggregation": "mean"},
        {"clip_low": 0.0},
        {"kl": -1.0},
        {"dual_clip": 1.0},
        {"ratio": "cispo", "dual_clip": 3.0},
    ):
        with pytest.raises(ValueError, match=next(reversed(wrong))):
            PolicyOptions(**wrong)


def test_every_value_of_a_preset_has_its_place():
    assert set(PRESETS) == {"ours", "r1", "dr_grpo", "dapo", "cispo", "gspo"}
    wanted = {"clip", "aggregation", "scale", "group_size", "updates", "same_groups", "overlong"}
    for preset in PRESETS.values():
        told = {one for key in preset.sources for one in key.split(", ")}
        assert wanted <= told
        assert "kl" in told or not preset.loss.kl
