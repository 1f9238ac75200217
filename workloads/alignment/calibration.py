"""How good a reward model, a judge or a critic is: who is preferred, how surely, what return comes.

Dimensions: B batch (pairs), T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from escala.contract.errors import DataError
from workloads.alignment.masked import moments, same_shape, wide


@dataclass(frozen=True)
class Bin:
    """The predictions whose probability lies in [lower, upper), the last bin's upper end included."""

    lower: float
    upper: float
    count: int
    probability: float  # mean of what was predicted
    outcome: float  # mean of what happened


def accuracy(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """The share of pairs whose preferred response has the higher reward, a tie for half; a float64 scalar. For DPO
    the reward is log pi - log pi_ref, summed over the response.
    """
    same_shape(chosen_B=chosen_B, rejected_B=rejected_B)
    return 0.5 * ((chosen_B > rejected_B).double() + (chosen_B >= rejected_B).double()).mean()


def calibration_curve(probability: Tensor, outcome: Tensor, bins: int) -> list[Bin]:
    """The non-empty ones of `bins` equally wide bins of probability, in order.

    Of a pair (chosen, rejected) give one order drawn at random, or both, (p, 1) and (1 - p, 0): with chosen always
    first the outcome is always 1, and a model that is right as often as it says looks uncalibrated.

    Args:
        probability: predicted, each in [0, 1], shape (B,).
        outcome: whether it happened, 0 or 1 (or a share of raters), shape (B,).

    Raises:
        DataError: nothing to count, or a probability or outcome outside [0, 1] or NaN.
        ValueError: shapes differ, or fewer than one bin.
    """
    same_shape(probability=probability, outcome=outcome)
    if bins < 1:
        raise ValueError(f"{bins} bins")
    p, happened = probability.detach().double(), outcome.double()
    if not p.numel():
        raise DataError("no predictions, so no calibration", "give it held-out pairs")
    if not all(bool(((x >= 0) & (x <= 1)).all()) for x in (p, happened)):
        raise DataError("a probability or an outcome is not within [0, 1]", "a logit needs a sigmoid first")
    index = (p * bins).long().clamp(max=bins - 1)
    count, sum_p, sum_happened = (
        torch.zeros(bins, dtype=torch.float64, device=p.device).index_add_(0, index, x).tolist()
        for x in (torch.ones_like(p), p, happened)
    )
    return [
        Bin(i / bins, (i + 1) / bins, int(count[i]), sum_p[i] / count[i], sum_happened[i] / count[i])
        for i in range(bins)
        if count[i]
    ]


def expected_calibration_error(curve: list[Bin]) -> float:
    """Mean of |predicted - happened| over bins, weighted by their counts (Naeini et al. 2015). Finer bins add
    noise: with n predictions a bin of n/bins is off by about 0.5 / sqrt(n/bins) by chance alone.
    """
    total = sum(entry.count for entry in curve)
    return sum(entry.count * abs(entry.probability - entry.outcome) for entry in curve) / total


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask of all ranks, a float64 scalar: 1 is a perfect
    critic, 0 one no better than a constant. NaN where the returns do not vary. A collective call.
    """
    same_shape(values_BT=values_BT, returns_BT=returns_BT, mask_BT=mask_BT)
    _, _, unexplained = moments(wide(returns_BT) - wide(values_BT), mask_BT)
    _, _, whole = moments(wide(returns_BT), mask_BT)
    return torch.where(whole > 0, 1.0 - unexplained / whole, torch.nan)
