"""Losses that keep a router's experts evenly used, and the figures that tell whether they are (docs/theory B.3 to B.6).

All losses are of one layer and one micro-batch. p_E is the mean routing probability over its tokens (it sums to 1) and
u = 1/E. Losses on p have gradients; hard counts have none. p alone is blind to collapse: a gate with logits 0.01 in
favour of one expert has p almost even and sends every token to it. So the figure for collapse is the hard load.

Dimensions: N tokens, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from escala.schema.moe import BalanceConfig


def log_mean_probability(log_g_NE: Tensor) -> Tensor:
    """log p_E of the mean over tokens of g, given log g; finite where p itself would underflow."""
    return log_g_NE.logsumexp(dim=0) - math.log(len(log_g_NE))


def switch(log_p_E: Tensor, load_E: Tensor) -> Tensor:
    """E sum_r f_r p_r with hard fractions f (Fedus et al. 2022, equation 4, f over all choices); 1 when even. Its
    gradient is piecewise: f is constant, so a step may raise V.
    """
    fraction_E = load_E / load_E.sum()
    return len(log_p_E) * (fraction_E * log_p_E.exp()).sum()


def quadratic(log_p_E: Tensor) -> Tensor:
    """E |p - u|^2: Switch's form less 1, with p in place of f."""
    return len(log_p_E) * (log_p_E.exp() - 1 / len(log_p_E)).square().sum()


def symmetric_kl(log_p_E: Tensor) -> Tensor:
    """V = KL(p|u) + KL(u|p) = sum_r (p_r - u) log p_r, in nats; 0 when even."""
    return ((log_p_E.exp() - 1 / len(log_p_E)) * log_p_E).sum()


def load_ratio(load_E: Tensor) -> Tensor:
    """The hard-load ratio max_r load_r / mean load: 1 when even, E/k when all tokens choose the same k."""
    return load_E.max() * len(load_E) / load_E.sum()


def balance_loss(config: BalanceConfig, log_p_E: Tensor, load_E: Tensor) -> tuple[Tensor, Tensor]:
    """(weighted loss, weight). The weight lambda falls to `balanced_fraction` of itself while the hard load is
    balanced: a function of this micro-batch alone, so that a resumed run needs no memory of it.
    """
    if config.kind == "switch":
        loss = switch(log_p_E, load_E)
    else:
        loss = quadratic(log_p_E) if config.kind == "quadratic" else symmetric_kl(log_p_E)
    is_even = load_ratio(load_E) <= config.balanced_load_ratio
    weight = torch.where(is_even, config.weight * config.balanced_fraction, config.weight).to(loss.dtype)
    return weight * loss, weight


def z_loss(logits_NE: Tensor) -> Tensor:
    """Mean square of the logits' log-sum-exp (Zoph et al. 2022, equation 5)."""
    return logits_NE.logsumexp(dim=-1).square().mean()


def margin_loss(logits_NE: Tensor, k: int, margin: float) -> Tensor:
    """E[max(0, margin - (z_(k) - z_(k+1)))]: a choice that small changes don't overturn."""
    top = logits_NE.topk(k + 1, dim=-1).values
    return (margin - (top[:, k - 1] - top[:, k])).clamp(min=0).mean()


def capacity_hinge(log_p_E: Tensor, choices: int, limit: int) -> Tensor:
    """sum_r max(0, load_r - C_r) / sum_r C_r on the differentiable load_r = choices x p_r (choices = N k)."""
    return (choices * log_p_E.exp() - limit).clamp(min=0).sum() / (limit * len(log_p_E))


def entropy(log_g_NE: Tensor) -> Tensor:
    """Mean entropy of a token's gate g, given log g; in nats."""
    return -(log_g_NE.exp() * log_g_NE).sum() / len(log_g_NE)
