"""GRPO's loss and its relatives: make good responses likelier, but not by too much at once.

With ρ = π/π_old of a token, advantage A of its response, w for a sampler that was not π_old, and
k3 the estimate of KL(π‖π_ref) from one sample (http://joschu.net/blog/kl-approx.html):

    token      ℓ = −w·min(ρA, clip(ρ)A) + β·k3          DeepSeekMath eq. 3-4, DAPO eq. 8
    sequence   the same with ρ = exp(mean of log ρ)     GSPO, arXiv:2507.18071 eq. 5-7
    cispo      ℓ = −w·sg(clip(ρ))·A·log π + β·k3        MiniMax-M1, arXiv:2506.13585 eq. 4-5

Sums are divided by totals of the whole batch that are given from outside. So losses, gradients and
measures of micro-batches add up to those of the batch, however it is cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# B responses, T places; places that are no token of a response are masked and may hold anything.


@dataclass(frozen=True)
class PolicyOptions:
    """``clip_low``, ``clip_high``: ρ beyond 1 − low and 1 + high earns nothing more (None: no clip
    on that side). ``dual_clip``: for A < 0 the loss grows no more once ρ is above this (> 1;
    arXiv:1912.09729 eq. 5).

    ``aggregation``: "token", the mean over all tokens; "sequence", over responses of their mean;
    "constant", the sum over tokens divided by responses × the longest allowed (Dr.GRPO).

    ``kl``: β. ``kl_importance``: k3 times ρ, whose gradient is that of the KL itself also for
    tokens that π_old drew (V3.2, arXiv:2512.02556 §3.1).

    ``importance_cap``: C of w = min(π_old/π_rollout, C) (None: w = 1). ``drop_beyond``: δ, leave
    out responses with A < 0 where log(π_rollout/π) is above δ on average (V3.2 §3.1; None: none);
    their KL term stays."""

    ratio: Literal["token", "sequence", "cispo"] = "token"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.28
    dual_clip: float | None = None
    aggregation: Literal["token", "sequence", "constant"] = "token"
    kl: float = 0.0
    kl_importance: bool = False
    importance_cap: float | None = None
    drop_beyond: float | None = None

    def __post_init__(self) -> None:
        if self.ratio not in ("token", "sequence", "cispo"):
            raise ValueError(f"ratio {self.ratio!r}: token, sequence or cispo")
        if self.aggregation not in ("token", "sequence", "constant"):
            raise ValueError(f"aggregation {self.aggregation!r}: token, sequence or constant")
        for name in ("clip_low", "clip_high", "importance_cap", "drop_beyond"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value}: above 0, or None")
        if not self.kl >= 0:
            raise ValueError(f"kl {self.kl}: 0 or above")
        if self.dual_clip is not None:
            if not self.dual_clip > 1:
                raise ValueError(f"dual_clip {self.dual_clip}: above 1, or None")
            if self.ratio == "cispo":
                raise ValueError("dual_clip: cispo's weight is clipped on both sides of A already")


class Totals(NamedTuple):
    """Of the whole batch: tokens and responses that count, and the most tokens one may have."""

    tokens: int
    responses: int
    longest: int


class Tokens(NamedTuple):
    """What is known of a micro-batch's responses. ``old``: log p by the weights the update began
    with; ``rollout``: as the sampler told it; ``reference``: by the reference, where β > 0."""

    logprobs_BT: Tensor  # with gradient
    old_BT: Tensor
    rollout_BT: Tensor
    advantages_B: Tensor
    mask_BT: Tensor  # bool: tokens that count
    reference_BT: Tensor | None = None


class PolicyMeasures(NamedTuple):
    """Shares of the batch's tokens (``dropped``: of its responses) and means over them, in nats.

    ``clip_low``: A < 0 and ρ under its bound; ``clip_high``: A > 0 and ρ above; ``clip_dual``. In
    cispo, whose weight is clipped whatever A: ρ beyond the bound. ``kl``: k3 to the reference.
    ``mismatch_k1``, ``mismatch_k3``: estimates of KL(π_rollout‖π_old); ``mismatch_max``: the
    largest |log π_old − log π_rollout| of a token. ``weight``: w."""

    clip_low: float
    clip_high: float
    clip_dual: float
    kl: float
    mismatch_k1: float
    mismatch_k3: float
    mismatch_max: float
    weight: float
    dropped: float


def policy_loss(
    tokens: Tokens, options: PolicyOptions, totals: Totals
) -> tuple[Tensor, PolicyMeasures]:
    """This micro-batch's share of the batch's loss, with gradient, and of its measures.

    ValueError where β > 0 and there is no reference, or shapes do not fit."""
    mask_BT = tokens.mask_BT.bool()
    _check(tokens, options, totals)
    zero = ~mask_BT
    logprobs_BT = tokens.logprobs_BT.masked_fill(zero, 0)
    old_BT = tokens.old_BT.detach().masked_fill(zero, 0)
    rollout_BT = tokens.rollout_BT.detach().masked_fill(zero, 0)
    advantages_B1 = tokens.advantages_B.detach()[:, None].to(logprobs_BT.dtype)
    counts_B1 = mask_BT.sum(1, keepdim=True).clamp_min(1)

    weights_BT = torch.ones_like(old_BT)
    if options.importance_cap is not None:
        weights_BT = (old_BT - rollout_BT).exp().clamp_max(options.importance_cap)
    kept_B1 = torch.ones_like(advantages_B1, dtype=torch.bool)
    if options.drop_beyond is not None:
        drift_B1 = (rollout_BT - logprobs_BT.detach()).sum(1, keepdim=True) / counts_B1
        kept_B1 = ~((advantages_B1 < 0) & (drift_B1 > options.drop_beyond))

    log_ratio_BT = logprobs_BT - old_BT
    ratio_BT = log_ratio_BT.exp()
    objective_BT, clipped = _objective(logprobs_BT, log_ratio_BT, advantages_B1, counts_B1, options)
    loss_BT = -weights_BT * kept_B1 * objective_BT
    kl_BT = torch.zeros_like(old_BT)
    if tokens.reference_BT is not None:
        reference_BT = tokens.reference_BT.detach().masked_fill(zero, 0)
        kl_BT = k3(logprobs_BT, reference_BT)
        if options.kl:
            loss_BT = loss_BT + options.kl * kl_BT * (ratio_BT if options.kl_importance else 1)

    loss = _aggregate(loss_BT * mask_BT, counts_B1, options, totals)
    measures = _measures(
        mask_BT, clipped, kl_BT.detach(), old_BT - rollout_BT, weights_BT, kept_B1, totals
    )
    return loss, measures


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """e^Δ − Δ − 1 with Δ = log π_ref − log π: never negative, and KL(π‖π_ref) on average."""
    delta = reference - logprobs
    return delta.expm1() - delta


def add_measures(parts: Iterable[PolicyMeasures]) -> PolicyMeasures:
    """Those of a batch from those of its micro-batches."""
    columns = dict(zip(PolicyMeasures._fields, zip(*parts, strict=True), strict=True))
    if not columns:
        raise ValueError("measures of no micro-batch at all")
    return PolicyMeasures(
        **{name: max(of) if name == "mismatch_max" else sum(of) for name, of in columns.items()}
    )


class _Clipped(NamedTuple):
    """Which tokens stood beyond a bound [B, T]."""

    low_BT: Tensor
    high_BT: Tensor
    dual_BT: Tensor


def _objective(
    logprobs_BT: Tensor,
    log_ratio_BT: Tensor,
    advantages_B1: Tensor,
    counts_B1: Tensor,
    options: PolicyOptions,
) -> tuple[Tensor, _Clipped]:
    """What is to grow, for each token: masked places have log ratio 0."""
    if options.ratio == "sequence":  # every token of a response has the response's ratio
        mean_B1 = log_ratio_BT.sum(1, keepdim=True) / counts_B1
        log_ratio_BT = mean_B1.expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.exp()
    lowest = None if options.clip_low is None else 1 - options.clip_low
    highest = None if options.clip_high is None else 1 + options.clip_high
    clipped_BT = ratio_BT
    if lowest is not None or highest is not None:
        clipped_BT = ratio_BT.clamp(lowest, highest)
    below_BT, above_BT = ratio_BT < clipped_BT, ratio_BT > clipped_BT
    never_BT = torch.zeros_like(below_BT)
    if options.ratio == "cispo":
        objective_BT = clipped_BT.detach() * advantages_B1 * logprobs_BT
        return objective_BT, _Clipped(below_BT, above_BT, never_BT)
    objective_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    dual_BT = never_BT
    if options.dual_clip is not None:
        dual_BT = (advantages_B1 < 0) & (ratio_BT > options.dual_clip)
        objective_BT = torch.where(dual_BT, options.dual_clip * advantages_B1, objective_BT)
    low_BT, high_BT = below_BT & (advantages_B1 < 0), above_BT & (advantages_B1 > 0)
    return objective_BT, _Clipped(low_BT, high_BT, dual_BT)


def _aggregate(
    loss_BT: Tensor, counts_B1: Tensor, options: PolicyOptions, totals: Totals
) -> Tensor:
    if options.aggregation == "token":
        return loss_BT.sum() / max(1, totals.tokens)
    if options.aggregation == "sequence":
        return (loss_BT / counts_B1).sum() / max(1, totals.responses)
    return loss_BT.sum() / max(1, totals.responses * totals.longest)


def _measures(
    mask_BT: Tensor,
    clipped: _Clipped,
    kl_BT: Tensor,
    mismatch_BT: Tensor,
    weights_BT: Tensor,
    kept_B1: Tensor,
    totals: Totals,
) -> PolicyMeasures:
    def share(values_BT: Tensor) -> float:
        return float((values_BT * mask_BT).sum(dtype=torch.float64)) / max(1, totals.tokens)

    dropped_B = ~kept_B1[:, 0] & mask_BT.any(1)
    return PolicyMeasures(
        clip_low=share(clipped.low_BT),
        clip_high=share(clipped.high_BT),
        clip_dual=share(clipped.dual_BT),
        kl=share(kl_BT),
        mismatch_k1=share(-mismatch_BT),
        mismatch_k3=share(mismatch_BT.exp() - mismatch_BT - 1),
        mismatch_max=float(mismatch_BT.abs().max()) if mismatch_BT.numel() else 0.0,
        weight=share(weights_BT),
        dropped=int(dropped_B.sum()) / max(1, totals.responses),
    )


def _check(tokens: Tokens, options: PolicyOptions, totals: Totals) -> None:
    if options.kl and tokens.reference_BT is None:
        raise ValueError(f"kl {options.kl}: wants log-probabilities by a reference")
    shape = tokens.logprobs_BT.shape
    given = [*tokens._asdict().items()]
    for name, value in given:
        wanted = shape[:1] if name == "advantages_B" else shape
        if value is not None and value.shape != wanted:
            raise ValueError(f"{name} {tuple(value.shape)}: {tuple(wanted)} wanted")
    counted = int(tokens.mask_BT.sum())
    if counted > totals.tokens:
        raise ValueError(f"{counted} tokens here, {totals.tokens} told for the whole batch")
