"""What a plan may spend and how fast it is spent: Limits, Speed, the cost of attention, and budgets as FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from escala.contract.errors import LawError
from escala.laws.powers import Floats
from escala.planning.curve import Curve

BUDGETS = ("compute_flops", "usd", "hours", "kwh")
MEMORY, DOCUMENTS = "device memory", "document length"  # how a plan names them where they bind
FLAT = 0.1  # dln(chi - 1)/dlnT below which more T costs next to nothing
NEEDED = {"usd": "usd_per_hour", "kwh": "watts"}  # of the speed, for a budget


@dataclass(frozen=True)
class Speed:
    """The whole cluster at its achieved (not peak) speed; inference demand is charged at the same speed."""

    flops_per_second: float
    usd_per_hour: float | None = None
    watts: float | None = None

    def __post_init__(self) -> None:
        _check_positive(self)

    def spending(self, flops: float) -> dict[str, float | None]:
        """Hours, dollars and kWh of so many FLOPs; None where the speed cannot tell."""
        hours = flops / self.flops_per_second / 3600.0
        usd = None if self.usd_per_hour is None else hours * self.usd_per_hour
        return {
            "hours": hours,
            "usd": usd,
            "kwh": None if self.watts is None else hours * self.watts / 1000.0,
        }


@dataclass(frozen=True)
class Chi:
    """chi(N, T) = 1 + scale g(T) N^-exponent (docs/theory D.2): what attention adds to kappa N D. Scale 0: nothing.

    L H d_h / N = scale N^-exponent: 1/3 where depth and width grow together, 1/2 at a fixed depth. `growth` is g, None
    where it is T, as of exact attention; of a window or a hybrid it saturates.
    """

    scale: float = 0.0
    exponent: float = 1 / 3
    growth: Curve | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0 and 0 <= self.exponent <= 1):
            raise LawError(
                f"chi = 1 + {self.scale} T N^-{self.exponent} is no cost of attention.",
                "Give scale >= 0 and an exponent from 0 to 1 (1/3 where depth and width grow together).",
            )

    @property
    def saturates(self) -> bool:
        """Whether attention's cost stops growing with T."""
        return self.growth is not None and self.growth.slopes[-1] < FLAT

    def excess(self, log_n: Floats, log_t: Floats) -> Floats:
        """chi - 1."""
        return self.at(log_n, log_t)[0]

    def at(self, log_n: Floats, log_t: Floats) -> tuple[Floats, Floats]:
        """(chi - 1, dln(chi - 1)/dlnT): the slope is 1 where attention costs in proportion to T, 0 where more T costs
        nothing.
        """
        log_g, slope = (log_t, np.ones_like(log_t)) if self.growth is None else self.growth.at(log_t)
        return self.scale * np.exp(log_g - self.exponent * log_n), np.maximum(slope, 0.0)


@dataclass(frozen=True)
class Limits:
    """What may be spent, and what there is. At least one of the first four; the least binds.

    compute_flops, usd and kwh cover training and inference demand, kappa N D chi + 2 N D_inference (Sardana
    et al. 2023); hours cover training only. max_params bounds N_total. data_tokens are unique tokens: more
    are repeats, at a discount. n_total_over_active bounds a mixture of experts (docs/theory D.3).
    """

    compute_flops: float | None = None
    usd: float | None = None
    hours: float | None = None
    kwh: float | None = None
    max_params: float | None = None
    max_params_reason: str = "max_params"  # how a plan names this limit when it binds, e.g. "memory"
    data_tokens: float | None = None
    inference_tokens: float | None = None
    max_context_tokens: float | None = None
    max_context_reason: str = "max_context_tokens"  # likewise, e.g. the documents' length
    n_total_over_active: float = 64.0

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.n_total_over_active < 1:
            raise LawError(
                f"N_total/N_active cannot be {self.n_total_over_active}: experts add to N_total.",
                "Give a ratio >= 1.",
            )

    @property
    def has_budget(self) -> bool:
        """Whether any of the four budgets is given."""
        return any(getattr(self, name) is not None for name in BUDGETS)

    def budgets_flops(self, speed: Speed | None) -> dict[str, float]:
        """Every budget as a bound in FLOPs. Raises LawError where the speed lacks what that takes."""
        given = {name: float(getattr(self, name)) for name in BUDGETS if getattr(self, name) is not None}
        lacking = [name for name in given if name != "compute_flops"]
        if lacking and speed is None:
            raise LawError(
                f"A budget in {', '.join(lacking)} needs the cluster's speed.",
                "Name a --cluster; in Python give speed=Speed(flops_per_second, usd_per_hour, watts).",
            )
        prices = {"compute_flops": 1.0} | (speed.spending(1.0) if speed else {})  # of one FLOP
        return {name: budget / _known(prices[name], name) for name, budget in given.items()}


@dataclass(frozen=True)
class Budget:
    """What `allocate` splits: limits, and what a FLOP of a run is. The fields are its arguments beside the law.

    `memory`: the largest N_total whose training fits at T, up to the longest T that trains at all; for a T that is
    chosen.
    """

    limits: Limits
    kappa: float = 6.0  # FLOPs per active parameter and token, attention apart
    chi: Chi = Chi()
    speed: Speed | None = None
    context_tokens: float | None = None  # None: chosen, where the law has T
    memory: Curve | None = None


def _known(price: float | None, budget: str) -> float:
    if price is None:
        field = NEEDED[budget]
        raise LawError(
            f"A budget in {budget} needs the speed's {field}.",
            f"Name a --cluster whose file has it; in Python Speed({field}=).",
        )
    return price


def _check_positive(given: Speed | Limits) -> None:
    for name, value in vars(given).items():
        if isinstance(value, (int, float)) and not (math.isfinite(value) and value > 0):
            raise LawError(f"{name} = {value} must be a positive number.", "Leave it out for no limit.")
