"""How far the policy is from its reference, and how hard it is pulled back. docs/theory C.5.

Dimensions: B batch, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from escala.contract.errors import Diverged, SpecError
from workloads.alignment.masked import masked_mean, same_shape, wide

K3_MAX = 10.0
# Where k3's exponent is cut, so that its backward never meets 0 * infinity. k3 is above K3_MAX already at d = -2.6
# and d = 11, so no value changes.
D_MAX = 20.0


def kl(logp_BT: Tensor, logp_ref_BT: Tensor, kind: str) -> Tensor:
    """Per-token estimate (B, T) of KL(policy|reference) in nats, on tokens that the policy sampled.

    With d = logp - logp_ref: k1 = d, k2 = d^2/2, k3 = e^-d - 1 + d clamped to [0, 10] (Schulman 2020, "Approximating
    KL divergence"). All three are metrics; in the reward use k1, in the loss `kl_loss`.

    Raises:
        SpecError: another kind.
    """
    same_shape(logp_BT=logp_BT, logp_ref_BT=logp_ref_BT)
    d = wide(logp_BT) - wide(logp_ref_BT).detach()
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        d = d.clamp(-D_MAX, D_MAX)
        return (torch.expm1(-d) + d).clamp(0.0, K3_MAX)
    raise SpecError(f"unknown KL estimator {kind!r}", "use k1, k2 or k3")


def kl_loss(logp_BT: Tensor, logp_ref_BT: Tensor, mask_BT: Tensor, kind: str) -> Tensor:
    """Mean of k2 or k3 over the mask: a scalar for the loss. Weight micro-batches by their mask count.

    k2 has the gradient of KL(policy|reference) while the samples are the policy's own; k3 that of
    KL(reference|policy), as in GRPO (Shao et al. 2024, eq. 4).

    Raises:
        SpecError: k1, whose gradient E[d log pi] is zero on average, or an unknown kind.
    """
    if kind == "k1":
        raise SpecError(
            "k1 in the loss trains nothing but noise: the expectation of its gradient is zero",
            "put k1 into the reward, or k2 or k3 into the loss",
        )
    same_shape(logp_BT=logp_BT, logp_ref_BT=logp_ref_BT, mask_BT=mask_BT)
    keep = mask_BT.bool()
    logp_BT, logp_ref_BT = torch.where(keep, logp_BT, 0.0), torch.where(keep, logp_ref_BT, 0.0)
    return masked_mean(kl(logp_BT, logp_ref_BT, kind), keep)


def _check(kl_coef: float, target: float) -> None:
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise SpecError(f"kl_coef {kl_coef} is not a number from 0 up", "set it to 0 or more")
    if not (math.isfinite(target) and target > 0):
        raise SpecError(f"the KL target {target} is not above 0", "set it to nats per response above 0")


def _finite(kl: float) -> float:
    kl = float(kl)
    if not math.isfinite(kl):
        raise Diverged(f"the KL between policy and reference is {kl}", "lower the learning rate")
    return kl


@dataclass
class ProportionalKL:
    """kl_coef *= 1 + clip(kl/target - 1, -0.2, 0.2) n/horizon (Ziegler et al. 2019, section 2.2).

    `target` in the unit of the kl given to `update`, `horizon` in episodes. `kl_coef` is the whole state: a
    checkpoint stores it and a resume sets it. Raises SpecError for a negative coefficient, or a target or horizon
    not above 0.
    """

    kl_coef: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        _check(self.kl_coef, self.target)
        if not self.horizon > 0:
            raise SpecError(
                f"the KL horizon {self.horizon} is not above 0", "set it to some episodes, say 10000"
            )

    def update(self, kl: float, n_episodes: int) -> float:
        """The new coefficient after `n_episodes` of mean `kl`.

        Raises:
            Diverged: kl is not finite.
            SpecError: so short a horizon that the coefficient would not stay above 0.
        """
        error = min(max(_finite(kl) / self.target - 1.0, -0.2), 0.2)
        factor = 1.0 + error * n_episodes / self.horizon
        if factor <= 0:
            raise SpecError(
                f"a KL horizon of {self.horizon} episodes turns kl_coef negative after {n_episodes}",
                "set the horizon well above a fifth of the episodes of one iteration",
            )
        self.kl_coef *= factor
        return self.kl_coef


@dataclass
class ThresholdKL:
    """Above high * target multiply kl_coef by `factor`, below low * target divide by it (Schulman et al. 2017,
    section 4). `kl_coef` is the whole state. Raises SpecError unless low < high and factor > 1.
    """

    kl_coef: float
    target: float
    high: float = 2.0
    low: float = 0.5
    factor: float = 1.5

    def __post_init__(self) -> None:
        _check(self.kl_coef, self.target)
        if not (self.low < self.high and self.factor > 1):
            raise SpecError(
                f"a KL controller needs low < high and factor > 1, not {self.low}, {self.high}, {self.factor}",
                "the usual ones are 0.5, 2 and 1.5",
            )

    def update(self, kl: float) -> float:
        """The new coefficient after mean `kl`, in the unit of the target.

        Raises:
            Diverged: kl is not finite.
        """
        kl = _finite(kl)
        if kl > self.high * self.target:
            self.kl_coef *= self.factor
        elif kl < self.low * self.target:
            self.kl_coef /= self.factor
        return self.kl_coef
