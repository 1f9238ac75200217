"""The losses of preference training and of PPO: pure functions of log-probabilities, rewards and values.

Policy and value losses are means over the mask. Over micro-batches and ranks they add up to one large batch's when
each is weighted by `loss_count` of its mask: valid tokens, or sequences for `sequence_mean` and `gspo`.

Dimensions: B batch, T response tokens, V vocabulary. Log-probabilities in nats.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from escala.contract.errors import SpecError
from workloads.alignment.kl import ProportionalKL, ThresholdKL, kl, kl_loss
from workloads.alignment.masked import masked_mean, same_shape, sequence_mean, wide
from workloads.training.loss import chunk_rows

__all__ = [
    "ProportionalKL",
    "ThresholdKL",
    "bradley_terry",
    "clip_fraction",
    "dpo_loss",
    "entropy",
    "importance_weights",
    "kl",
    "kl_loss",
    "loss_count",
    "policy_loss",
    "value_loss",
]

LOG_RATIO_MAX = 20.0  # e^20 = 5e8: beyond it fp32 gradients of the unclipped branch overflow. docs/theory C.3

Mode = Literal["token", "sequence_mean", "gspo"]


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), the mean over pairs, a scalar (docs/theory C.7; Bradley & Terry 1952,
    margin as in Touvron et al. 2023, section 3.2.2).

    Args:
        chosen_B, rejected_B: rewards of the preferred response and of the other one.
        margin: by how much chosen should win, one number or one a pair (B,).
    """
    same_shape(chosen_B=chosen_B, rejected_B=rejected_B)
    if isinstance(margin, Tensor) and margin.dim():
        same_shape(chosen_B=chosen_B, margin=margin)
    return -F.logsigmoid(wide(chosen_B) - wide(rejected_B) - margin).mean()


def dpo_loss(
    logp_chosen_B: Tensor,
    logp_rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    beta_dpo: float,
) -> Tensor:
    """-log sigmoid(beta_dpo [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)]), the mean over pairs, a scalar
    (docs/theory C.9; Rafailov et al. 2023, eq. 7).

    Args:
        logp_chosen_B, logp_rejected_B: the policy's log-probabilities, summed over each response's tokens.
        ref_chosen_B, ref_rejected_B: the reference's; no gradient flows to them.
    """
    same_shape(logp_chosen_B=logp_chosen_B, logp_rejected_B=logp_rejected_B, ref_chosen_B=ref_chosen_B,
               ref_rejected_B=ref_rejected_B)  # fmt: skip
    chosen_B = wide(logp_chosen_B) - wide(ref_chosen_B).detach()
    rejected_B = wide(logp_rejected_B) - wide(ref_rejected_B).detach()
    return -F.logsigmoid(beta_dpo * (chosen_B - rejected_B)).mean()


def loss_count(mask_BT: Tensor, mode: Mode = "token") -> Tensor:
    """What a loss of this mode divides by, and so a micro-batch's weight: valid tokens, or sequences with one.
    An integer scalar.
    """
    return mask_BT.bool().sum() if mode == "token" else mask_BT.bool().any(-1).sum()


def _mean(x_BT: Tensor, keep: Tensor, mode: Mode) -> Tensor:
    return masked_mean(x_BT, keep) if mode == "token" else sequence_mean(x_BT, keep)


def _ratio(logp_BT: Tensor, logp_old_BT: Tensor, keep: Tensor, mode: Mode) -> Tensor:
    """pi/pi_old per token (B, T), or its geometric mean over a sequence (B, 1) for gspo."""
    if mode not in ("token", "sequence_mean", "gspo"):
        raise SpecError(f"unknown mode of the policy loss {mode!r}", "use token, sequence_mean or gspo")
    log_ratio = torch.where(keep, wide(logp_BT) - wide(logp_old_BT).detach(), 0.0)
    if mode == "gspo":
        log_ratio = log_ratio.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def policy_loss(
    logp_BT: Tensor,
    logp_old_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    mode: Mode = "token",
) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), a scalar (docs/theory C.3; Schulman et al. 2017, eq. 7).

    rho = pi/pi_old with log rho clamped at +-20. The gradient is zero where the clipped branch is active.

    Args:
        logp_BT: the learner's log-probabilities of the sampled tokens.
        logp_old_BT: the same before the first step on this rollout, by the learner at the sampling temperature.
        advantages_BT: A, taken as constants; for GRPO and the like a sequence's own on each of its tokens.
        dual_clip: for A < 0 the loss is at most dual_clip * |A| (Ye et al. 2020, eq. 5); None: off.
        mode: "token": mean over the valid tokens. "sequence_mean": mean over sequences of each one's mean.
            "gspo": that, with one rho a sequence, the geometric mean of its tokens' (Zheng et al. 2025, eq. 5-7);
            log rho is clamped after the mean. Where A varies within a sequence the gradient is this value's own,
            not that of the paper's GSPO-token. Weight micro-batches by `loss_count(mask_BT, mode)`. The last two
            modes take a row for a sequence: packed rows need "token".

    Raises:
        SpecError: an unknown mode, or dual_clip not above 1.
        ValueError: shapes differ.
    """
    same_shape(logp_BT=logp_BT, logp_old_BT=logp_old_BT, advantages_BT=advantages_BT, mask_BT=mask_BT)
    if dual_clip is not None and not dual_clip > 1:
        raise SpecError(f"dual_clip {dual_clip} is not above 1", "leave it out, or take 3")
    keep = mask_BT.bool()
    ratio = _ratio(logp_BT, logp_old_BT, keep, mode)
    advantages = torch.where(keep, wide(advantages_BT).detach(), 0.0)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return _mean(loss, keep, mode)


@torch.no_grad()
def clip_fraction(
    logp_BT: Tensor, logp_old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor,
    clip_low: float, clip_high: float, mode: Mode = "token",
) -> Tensor:  # fmt: skip
    """The share where policy_loss takes the clipped branch, averaged and weighted as the loss is; a scalar."""
    keep = mask_BT.bool()
    ratio = _ratio(logp_BT, logp_old_BT, keep, mode)
    too_high = (advantages_BT > 0) & (ratio > 1.0 + clip_high)
    too_low = (advantages_BT < 0) & (ratio < 1.0 - clip_low)
    return _mean((too_high | too_low).to(ratio.dtype), keep, mode)


@torch.no_grad()
def importance_weights(logp_BT: Tensor, logp_engine_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """min(pi/pi_engine, cap) per token (B, T), 0 where masked: multiply the advantages by it, so that the loss is
    corrected for what the engine, with older weights or another precision, really sampled from (Espeholt et al.
    2018, truncated; Yao et al. 2025).

    Args:
        logp_BT: the learner's own, before the first step on this rollout (policy_loss's logp_old_BT).
    """
    keep = mask_BT.bool()
    return torch.where(keep, _ratio(logp_BT, logp_engine_BT, keep, "token").clamp(max=cap), 0.0)


def value_loss(
    values_BT: Tensor, values_old_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float | None = None
) -> Tensor:
    """Half the mean over the mask of max((V - R)^2, (clip(V, V_old +- clip) - R)^2), a scalar (docs/theory C.4).
    Weight micro-batches by `loss_count(mask_BT)`.

    Args:
        values_BT: the critic's values before each token; values_old_BT the same before the first step.
        returns_BT: what they should be; neither it nor values_old_BT gets a gradient.
        clip: None: no clipping, half the mean squared error.

    Raises:
        SpecError: a clip that is not above 0.
        ValueError: shapes differ.
    """
    same_shape(values_BT=values_BT, values_old_BT=values_old_BT, returns_BT=returns_BT, mask_BT=mask_BT)
    if clip is not None and not clip > 0:
        raise SpecError(f"the value clip {clip} is not above 0", "leave it out, or take 0.2")
    keep = mask_BT.bool()
    values, old, returns = (torch.where(keep, wide(x), 0.0) for x in (values_BT, values_old_BT, returns_BT))
    old, returns = old.detach(), returns.detach()
    loss = (values - returns).square()
    if clip is not None:
        clipped = torch.clamp(values, old - clip, old + clip)
        loss = torch.maximum(loss, (clipped - returns).square())
    return 0.5 * masked_mean(loss, keep)


class _Entropy(torch.autograd.Function):
    """Entropy of the softmax of some rows (rows, V). Backward computes the softmax again, chunk by chunk, where
    autograd would hold two more tensors of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(logits, rows)
        parts = torch.split(rows, chunk_rows(logits))
        return torch.cat([torch.special.entr(wide(logits[part]).softmax(-1)).sum(-1) for part in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, rows = ctx.saved_tensors
        size = chunk_rows(logits)
        result = torch.zeros_like(logits)
        for part, weight in zip(torch.split(rows, size), torch.split(grad, size), strict=True):
            p = wide(logits[part]).softmax(-1)
            terms = torch.special.entr(p)
            gradient = terms.addcmul_(p, terms.sum(-1, keepdim=True), value=-1).mul_(weight.unsqueeze(-1))
            result[part] = gradient.to(logits.dtype)
        return result, None


def entropy(logits_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean entropy in nats over the mask of softmax(logits), a scalar, differentiable: a bonus and a metric.

    Only valid rows are computed. A logit of -infinity is a token of probability 0. For the entropy of what was
    sampled, divide the logits by the temperature first. Weight micro-batches by `loss_count(mask_BT)`.
    """
    rows = mask_BT.bool().flatten().nonzero().squeeze(-1)
    # torch annotates no `apply`.
    entropies_N: Tensor = _Entropy.apply(logits_BTV.flatten(0, 1), rows)  # type: ignore[no-untyped-call]
    return entropies_N.sum() / max(1, len(rows))
