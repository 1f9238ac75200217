"""The closed-form split of a budget between N and D (docs/theory D.4; Hoffmann et al. 2022, eq. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from escala.contract.errors import LawError

if TYPE_CHECKING:  # numpy is not needed to say what a form is
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Value = TypeVar("Value", float, Floats)
else:
    Value = TypeVar("Value")

LARGEST_LOG = 600.0  # of N and of D: beyond e^709 a float is infinite


@dataclass(frozen=True)
class Optimum:
    """The cheapest split of a budget under a law. `multiplier` is N_total/N_active."""

    size: float
    tokens: float
    loss_nats: float
    multiplier: float
    residual: (
        float  # first-order condition, relative: alpha a N^-alpha / (beta b D^-beta) - 1, of the joined terms
    )


@dataclass(frozen=True)
class TwoTerms(Generic[Value]):
    """A law of N and D, its other inputs held, in nats per token:
    loss = constant + ((a N^-alpha)^(1/gamma) + (b D^-beta)^(1/gamma))^gamma.
    """

    constant: Value
    a: Value
    alpha: Value
    b: Value
    beta: Value
    gamma: Value | float = 1.0


def best_split(law: TwoTerms[float], compute_flops: float, kappa: float, multiplier: float) -> Optimum:
    """Minimise the loss over N and D at C = kappa N D. Raises LawError where the optimum lies at a boundary."""
    power = 1.0 / law.gamma  # the least sum of the powers is the least loss
    a, alpha, b, beta = law.a**power, law.alpha * power, law.b**power, law.beta * power
    if min(a, b, alpha, beta) <= 0.0:
        raise LawError(
            "The law has no interior optimum: the term of N or of D is zero.",
            "Measure runs that vary both N and D, and fit again.",
        )
    budget = compute_flops / kappa
    log_n = (math.log(alpha * a) - math.log(beta * b) + beta * math.log(budget)) / (alpha + beta)
    if max(abs(log_n), abs(math.log(budget) - log_n)) > LARGEST_LOG:
        raise LawError(
            f"The law has no optimum that a number holds: alpha {law.alpha:.2g} and beta {law.beta:.2g} leave N and D "
            "without a bound.",
            "Measure runs that vary both N and D further, and fit again.",
        )
    size, tokens = math.exp(log_n), math.exp(math.log(budget) - log_n)
    by_n, by_d = a * size**-alpha, b * tokens**-beta
    residual = alpha * by_n / (beta * by_d) - 1.0
    return Optimum(size, tokens, law.constant + (by_n + by_d) ** law.gamma, multiplier, residual)


def check_budget(compute_flops: float, kappa: float) -> None:
    """Raises LawError unless both are positive numbers."""
    if not (math.isfinite(compute_flops) and compute_flops > 0 and math.isfinite(kappa) and kappa > 0):
        raise LawError(f"compute_flops {compute_flops} and kappa {kappa} must be positive.", "Say e.g. 1e21.")
