"""How far a student's next-token distribution q is from a teacher's p, over the whole vocabulary.

    forward   KL(p‖q) = Σ p (log p − log q)       covers all the teacher does
    reverse   KL(q‖p) = Σ q (log q − log p)       keeps to what the teacher would do
    jsd       λ KL(p‖m) + (1−λ) KL(q‖m),  m = λp + (1−λ)q      between them (GKD, arXiv:2306.13649)

All three have a gradient for the logits in closed form: q·(g − Σ q g) with g = ∂/∂q. So, as in
``cross_entropy.py``, value and gradients of a chunk of tokens are made in one go and no [tokens,
vocabulary] matrix stays; the weight of each token must be known beforehand for that.

A teacher is given in one of three ways: whole rows; hidden states and its head, which is what V4
caches because they are small; or the k likeliest tokens. Of these only the forward divergence can
be told, with all other tokens as one bucket: a lower bound of the whole, with a tail that learns.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qiusuo.kernels.token_logprobs import HeadGradients, chunk_rows, in_product_type, logits_of

# M tokens, D student's hidden, E teacher's hidden, W vocabulary, K likeliest, C tokens of a chunk.

CHUNK_ELEMENTS = 1 << 22  # logits of a chunk: 16 MiB in float32
LEAST = -100.0  # log p below this is this: a zero in the teacher costs much and not infinity

Divergence = Literal["forward", "reverse", "jsd"]


class TeacherRows(NamedTuple):
    """Log-probabilities of every token of the vocabulary, in any float type; made to sum to one."""

    logprobs_MW: Tensor

    def logprobs(self, rows_C: Tensor) -> Tensor:
        rows_CW = self.logprobs_MW[rows_C]
        rows_CW = rows_CW.to(torch.promote_types(rows_CW.dtype, torch.float32))
        return rows_CW.log_softmax(-1).clamp_min_(LEAST)


class TeacherStates(NamedTuple):
    """Hidden states behind the final norm, and the head they go through."""

    x_ME: Tensor
    head_WE: Tensor

    def logprobs(self, rows_C: Tensor) -> Tensor:
        return logits_of(self.x_ME[rows_C], self.head_WE).log_softmax(-1).clamp_min_(LEAST)


class TeacherTop(NamedTuple):
    """The k likeliest tokens (distinct) and their log-probabilities; the rest is one bucket."""

    ids_MK: Tensor
    logprobs_MK: Tensor


Teacher = TeacherRows | TeacherStates | TeacherTop


def distribution_match_reference(
    x_MD: Tensor,
    head_WD: Tensor,
    teacher: Teacher,
    weights_M: Tensor,
    divergence: Divergence = "forward",
    teacher_share: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' divergences, and each one unweighted [M, detached], in nats.
    ``teacher_share``: λ of jsd. ValueError where teacher and divergence do not fit."""
    _check(head_WD, teacher, len(x_MD), divergence, teacher_share)
    q_MW = logits_of(x_MD, head_WD).log_softmax(-1)
    everything_M = torch.arange(len(x_MD), device=x_MD.device)
    if isinstance(teacher, TeacherTop):
        inside_MW = torch.zeros_like(q_MW, dtype=torch.bool).scatter(1, teacher.ids_MK, True)
        p_MK = teacher.logprobs_MK.to(q_MW.dtype).clamp_min(LEAST)
        divergence_M = (p_MK.exp() * (p_MK - q_MW.gather(1, teacher.ids_MK))).sum(-1)
        rest_M = (1 - p_MK.exp().sum(-1)).clamp_min(0)
        q_rest_M = q_MW.masked_fill(inside_MW, -math.inf).logsumexp(-1).clamp_min(LEAST)
        divergence_M = divergence_M + rest_M * (rest_M.clamp_min(1e-30).log() - q_rest_M)
    else:
        p_MW = teacher.logprobs(everything_M)
        if divergence == "forward":
            divergence_M = (p_MW.exp() * (p_MW - q_MW)).sum(-1)
        elif divergence == "reverse":
            divergence_M = (q_MW.exp() * (q_MW - p_MW)).sum(-1)
        else:
            m_MW = (teacher_share * p_MW.exp() + (1 - teacher_share) * q_MW.exp()).log()
            divergence_M = teacher_share * (p_MW.exp() * (p_MW - m_MW)).sum(-1)
            divergence_M = divergence_M + (1 - teacher_share) * (q_MW.exp() * (q_MW - m_MW)).sum(-1)
    return (weights_M * divergence_M).sum(), divergence_M.detach().masked_fill(weights_M == 0, 0)


def distribution_match(
    x_MD: Tensor,
    head_WD: Tensor,
    teacher: Teacher,
    weights_M: Tensor,
    divergence: Divergence = "forward",
    teacher_share: float = 0.5,
    float32_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """As ``distribution_match_reference``, a chunk at a time; tokens of weight 0 are not computed
    and told as 0. Gradients go to the student's states and head, none to weights and teacher.
    Types of the products as in ``token_logprobs``."""
    _check(head_WD, teacher, len(x_MD), divergence, teacher_share)
    x_MD, head_WD = in_product_type(x_MD, head_WD, float32_head)
    if isinstance(teacher, TeacherStates):
        teacher = TeacherStates(*in_product_type(teacher.x_ME, teacher.head_WE, float32_head))
    with torch.autocast(x_MD.device.type, enabled=False):
        loss, each_M = _DistributionMatch.apply(
            x_MD, head_WD, teacher, weights_M, divergence, teacher_share
        )
    return loss, each_M


class _DistributionMatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        head_WD: Tensor,
        teacher: Teacher,
        weights_M: Tensor,
        divergence: Divergence,
        teacher_share: float,
    ) -> tuple[Tensor, Tensor]:
        gradients = HeadGradients(x_MD, head_WD, ctx.needs_input_grad)
        training = any(ctx.needs_input_grad[:2])
        dtype = torch.promote_types(x_MD.dtype, torch.float32)
        each_M = x_MD.new_zeros(len(x_MD), dtype=dtype)
        kept = torch.where(weights_M != 0)[0]
        for rows_C in kept.split(chunk_rows(head_WD, CHUNK_ELEMENTS)):
            x_CD = x_MD[rows_C]
            q_CW = logits_of(x_CD, head_WD).log_softmax(-1)
            if isinstance(teacher, TeacherTop):
                top = teacher.ids_MK[rows_C], teacher.logprobs_MK[rows_C].to(dtype)
                each_M[rows_C], grad_CW = _match_top(*top, q_CW)
            else:
                p_CW = teacher.logprobs(rows_C)
                each_M[rows_C], grad_CW = _match(p_CW, q_CW, divergence, teacher_share)
            if training:
                gradients.add(rows_C, x_CD, grad_CW.mul_(weights_M[rows_C, None]))
        ctx.save_for_backward(*gradients.finished())
        ctx.mark_non_differentiable(each_M)
        return (weights_M * each_M).sum(), each_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if one is None else one * grads[0].to(one.dtype) for one in ctx.saved_tensors
        )
        return *scaled, None, None, None, None


def _match(
    p_CW: Tensor, q_CW: Tensor, divergence: Divergence, teacher_share: float
) -> tuple[Tensor, Tensor]:
    """Divergence of each row of log-probabilities, and its gradient for the student's logits."""
    q_probs_CW = q_CW.exp()
    if divergence == "forward":
        p_probs_CW = p_CW.exp()
        return torch.linalg.vecdot(p_probs_CW, p_CW - q_CW), q_probs_CW.sub_(p_probs_CW)
    if divergence == "reverse":
        slope_CW = q_CW - p_CW  # ∂/∂q but for a constant, which the subtraction below removes
        value_C = torch.linalg.vecdot(q_probs_CW, slope_CW)
        return value_C, slope_CW.sub_(value_C[:, None]).mul_(q_probs_CW)
    p_probs_CW = p_CW.exp()
    m_CW = torch.lerp(q_probs_CW, p_probs_CW, teacher_share).clamp_min_(1e-37).log_()
    slope_CW = (q_CW - m_CW).mul_(1 - teacher_share)  # the mixture's own share of ∂/∂q is constant
    student_C = torch.linalg.vecdot(q_probs_CW, slope_CW)
    value_C = teacher_share * torch.linalg.vecdot(p_probs_CW, p_CW - m_CW) + student_C
    return value_C, slope_CW.sub_(student_C[:, None]).mul_(q_probs_CW)


def _match_top(ids_CK: Tensor, p_CK: Tensor, q_CW: Tensor) -> tuple[Tensor, Tensor]:
    """As ``_match`` for the forward divergence between k tokens and a bucket of all others.

    The bucket's probability is summed from its members, not taken as one minus the others: for a
    sure student the difference would be rounding."""
    p_CK = p_CK.clamp_min(LEAST)
    p_probs_CK = p_CK.exp()
    rest_C = (1 - p_probs_CK.sum(-1)).clamp_min_(0)
    q_rest_C = q_CW.scatter(1, ids_CK, -math.inf).logsumexp(-1).clamp_min_(LEAST)
    value_C = torch.linalg.vecdot(p_probs_CK, p_CK - q_CW.gather(1, ids_CK))
    value_C += rest_C * (rest_C.clamp_min(1e-30).log() - q_rest_C)
    # q Σp − p for the k; for a token of the bucket its share of the bucket's p instead of p.
    q_probs_CW = q_CW.exp()
    q_probs_CK = q_probs_CW.gather(1, ids_CK)
    total_C = p_probs_CK.sum(-1) + rest_C
    grad_CW = q_probs_CW.mul_((total_C - rest_C * (-q_rest_C).exp())[:, None])
    grad_CW.scatter_(1, ids_CK, q_probs_CK * total_C[:, None] - p_probs_CK)
    return value_C, grad_CW


def _check(
    head_WD: Tensor, teacher: Teacher, tokens: int, divergence: str, teacher_share: float
) -> None:
    if divergence not in ("forward", "reverse", "jsd"):
        raise ValueError(f"divergence {divergence!r}: forward, reverse or jsd")
    if divergence == "jsd" and not 0 < teacher_share < 1:
        raise ValueError(f"teacher_share {teacher_share}: between 0 and 1; the ends are kl's")
    if len(teacher[0]) != tokens:
        raise ValueError(f"the teacher tells of {len(teacher[0])} tokens, the student of {tokens}")
    words = head_WD.shape[0]
    if isinstance(teacher, TeacherTop):
        if divergence != "forward":
            raise ValueError(f"{divergence}: a teacher's top-k tells the forward divergence only")
        return
    if isinstance(teacher, TeacherStates):
        taught = teacher.head_WE.shape[0]
    else:
        taught = teacher.logprobs_MW.shape[1]
    if taught != words:
        raise ValueError(
            f"the teacher knows {taught} tokens, the student {words}: not one vocabulary"
        )
