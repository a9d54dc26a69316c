"""One update of the policy, against GRPO as its papers write it, a rollout at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qiusuo.training.rl import reinforce
from qiusuo.training.rl.policy_loss import Tokens
from qiusuo.training.rl.reinforce import Reinforcement
from qiusuo.training.rl.rollouts import Rollout
from qiusuo.training.rl.update import Paid, row_logprobs, rows_of
from tests.training import tasks
from tests.training.tasks import Make


def naive(work: Reinforcement, one: Rollout, *, replay: bool = True) -> Tensor:
    """Log p of the answer's tokens, of this rollout alone and by the whole softmax."""
    tokens = torch.tensor([[*one.prompt, *one.answer]])
    experts = None
    if replay and one.experts is not None:
        experts = one.experts[None, : tokens.shape[1] - 1]
    model = work.state.model
    hidden = model(tokens[:, :-1], experts_BTLK=experts).x_BTD
    logprobs_TW = model.logits(hidden)[0].log_softmax(-1)
    place = len(one.prompt) - 1
    return logprobs_TW[place:].gather(1, torch.tensor(one.answer)[:, None])[:, 0]


def rollouts_of(work: Reinforcement) -> list[Rollout]:
    return [one for group in work.ask()[0] for one in group.rollouts]


# Rows


def test_rows_hold_answers_where_they_are_predicted() -> None:
    short = Rollout([5, 6, 7], [8, 9], [-0.1, -0.2], None, 0, True, "", tasks.rollout().verdict)
    long = Rollout([5], [6, 7, 8, 9], [-1.0] * 4, None, 0, True, "", tasks.rollout().verdict)
    unpaid = Paid(long, 3.0, counted=False)
    rows = rows_of([Paid(short, -0.5), Paid(long, 2.0), unpaid], True, torch.device("cpu"))
    assert rows.inputs_BT.tolist() == [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]]
    no = -100
    assert rows.labels_BT.tolist() == [[no, no, 8, 9], [6, 7, 8, 9], [no] * 4]
    assert rows.rollout_logprobs_BT[0].tolist() == pytest.approx([0, 0, -0.1, -0.2])
    assert rows.advantages_B.tolist() == [-0.5, 2.0, 3.0]
    assert rows.mask_BT.sum(1).tolist() == [2, 4, 0]
    assert rows.experts_BTLK is None


@pytest.mark.parametrize("replay", [True, False])
def test_row_logprobs_are_those_of_each_rollout_alone(trying: Make, replay: bool) -> None:
    work = trying()
    found = rollouts_of(work)
    assert len({len(one.answer) for one in found}) > 1  # so that there is padding
    if replay:  # experts that the model would not have chosen
        count = work.state.model.config.n_routed_experts
        found = [Rollout(**vars(one) | {"experts": (one.experts + 1) % count}) for one in found]
    rows = rows_of([Paid(one, 1.0) for one in found], replay, torch.device("cpu"))
    assert (rows.experts_BTLK is not None) == replay
    with torch.no_grad():
        logprobs_BT, entropy_BT, _ = row_logprobs(work.state.model, rows, 1.0)
        plain = rows_of([Paid(one, 1.0) for one in found], False, torch.device("cpu"))
        unreplayed_BT, _, _ = row_logprobs(work.state.model, plain, 1.0)
        for row, one in enumerate(found):
            expected = naive(work, one, replay=replay)
            torch.testing.assert_close(logprobs_BT[row][rows.mask_BT[row]], expected)
    assert not logprobs_BT[~rows.mask_BT].any()
    assert not entropy_BT[~rows.mask_BT].any()
    assert (entropy_BT[rows.mask_BT] > 0).all()
    assert torch.equal(logprobs_BT, unreplayed_BT) != replay


def test_a_temperature_is_that_of_the_sampler(trying: Make) -> None:
    work = trying()
    one = rollouts_of(work)[0]
    rows = rows_of([Paid(one, 1.0)], True, torch.device("cpu"))
    model = work.state.model
    with torch.no_grad():
        found, _, _ = row_logprobs(model, rows, 0.5)
        logits = model.logits(model(rows.inputs_BT, experts_BTLK=rows.experts_BTLK).x_BTD)[0]
    expected = (logits / 0.5).log_softmax(-1)[rows.mask_BT[0]]
    expected = expected.gather(1, torch.tensor(one.answer)[:, None])[:, 0]
    torch.testing.assert_close(found[rows.mask_BT], expected)


def test_the_engine_says_what_the_trainer_says(trying: Make) -> None:
    """The same weights, the same experts: in float32 the same log-probabilities."""
    work = trying(prompts=6)
    with torch.no_grad():
        for one in rollouts_of(work):
            told = torch.tensor(one.logprobs)
            assert one.experts is not None
            assert float((naive(work, one) - told).abs().max()) < 1e-4
            assert len(one.experts) == len(one.prompt) + len(one.answer) - 1


# The gradient


def caught_gradients(work: Reinforcement) -> tuple[float, dict[str, Tensor], list[list[Paid]]]:
    """Of one step: the loss, the gradients before clipping, and what was learnt from."""
    found: dict[str, Tensor] = {}
    seen: list[list[Paid]] = []
    model = work.state.model
    learn = work.learn

    def keep(loss: float) -> float:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()
                parameter.grad = None
        return 1.0

    def spy(groups: list[list[Paid]]) -> Any:
        seen.extend(groups)
        return learn(groups)

    work.apply_gradients, work.learn = keep, spy  # type: ignore[method-assign]
    return work.one_step().loss, found, seen


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    return (reference - logprobs).exp() - (reference - logprobs) - 1


@pytest.mark.parametrize("preset", ["ours", "dr_grpo", "r1"])
def test_the_gradient_is_the_equations(trying: Make, preset: str) -> None:
    """−1/N Σ ρ(r − mean r), N the tokens; Dr.GRPO's constant; GRPO's mean of means with a KL."""
    overlong = {"overlong": "reward"}
    work = trying(
        preset=preset, group=4, updates=1, prompts=4, micro_batch_size=5, same_groups="drop",
        **overlong,
    )  # fmt: skip
    reference: dict[int, Tensor] = {}
    if work.reference is not None:
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in work.reference.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    loss, found, groups = caught_gradients(work)
    assert groups
    if work.reference is not None:
        policy, work.state.model = work.state.model, work.reference
        with torch.no_grad():
            reference = {
                id(paid): naive(work, paid.rollout, replay=False)
                for group in groups
                for paid in group
            }
        work.state.model = policy

    terms, responses, tokens = [], 0, 0
    for group in groups:
        rewards = torch.tensor([paid.rollout.verdict.reward for paid in group])
        scale = rewards.std() + 1e-4 if preset == "r1" else 1.0
        for paid, advantage in zip(group, (rewards - rewards.mean()) / scale, strict=True):
            assert paid.advantage == pytest.approx(float(advantage), abs=1e-6)
            logprobs = naive(work, paid.rollout)
            ratio = (logprobs - logprobs.detach()).exp()
            term = -ratio * advantage
            if preset == "r1":
                term = (term + 0.001 * k3(logprobs, reference[id(paid)])).mean()
            terms.append(term.sum())
            responses += 1
            tokens += len(paid.rollout.answer)
    divisor = {"ours": tokens, "dr_grpo": responses * work.stage.max_tokens, "r1": responses}
    total = torch.stack(terms).sum() / divisor[preset]
    assert loss == pytest.approx(total.item(), abs=1e-6)
    named = {n: p for n, p in work.state.model.named_parameters() if n in found}
    expected = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    largest = 0.0
    for name, gradient in zip(named, expected, strict=True):
        if gradient is None:
            assert not found[name].any(), name
            continue
        scale = float(gradient.abs().max())
        largest = max(largest, scale)
        assert float((found[name] - gradient).abs().max()) <= 1e-4 * scale + 1e-8, name
    assert largest > 1e-3


def test_later_updates_are_measured_from_where_the_first_began(
    trying: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = trying(group=4, prompts=4, updates=2, same_groups="keep", overlong="reward",
                  optimizer={"adamw_learning_rate": 0.01})  # fmt: skip
    seen: list[Tokens] = []
    policy_loss = reinforce.policy_loss

    def spy(tokens: Tokens, *rest: Any) -> Any:
        seen.append(tokens)
        return policy_loss(tokens, *rest)

    monkeypatch.setattr(reinforce, "policy_loss", spy)
    asked, _ = work.ask()
    paid = work.pay(asked).paid
    with torch.no_grad():
        before = {id(one): naive(work, one.rollout) for group in paid for one in group}
    work.learn(paid)
    assert work.state.optimizers[0].state[work.state.model.lm_head.weight]["step"] == 2
    assert len(seen) == 2
    assert sum(len(tokens.mask_BT) for tokens in seen) == 16  # every rollout, once
    first, second = seen
    torch.testing.assert_close(first.logprobs_BT.detach(), first.old_BT)
    moved = (second.logprobs_BT.detach() - second.old_BT)[second.mask_BT]
    assert float(moved.abs().max()) > 1e-3
    # What is old in the second update is what the weights before the first one said.
    expected = sorted(float(logprobs.sum()) for logprobs in before.values())
    olds = sorted(float(row.sum()) for tokens in seen for row in tokens.old_BT)
    assert olds == pytest.approx(expected, abs=1e-3)


# The reference


def equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_reference_stays_and_is_renewed(trying: Make) -> None:
    work = trying(
        loss={"kl": 0.1}, reference_steps=2, steps=5, optimizer={"adamw_learning_rate": 1e-3}
    )
    told: list[dict[str, Any]] = []
    work.record = told.append
    renewed = []

    def after_step() -> bool:
        assert work.reference is not None
        renewed.append(equal_weights(work.reference, work.state.model))
        return False

    assert work.reference is not work.state.model
    work.run(after_step)
    assert renewed == [False, True, False, True, False]
    kl = [record["kl"] for record in told if record["kind"] == "rollout"]
    assert [value > 1e-6 for value in kl] == [False, True, False, True, False]


def test_without_a_kl_there_is_no_reference(trying: Make) -> None:
    assert trying().reference is None
    assert trying(loss={"kl": 0.1}).reference is not None
