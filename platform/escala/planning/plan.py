"""Where to spend a budget: the one result of `laws plan`, and what `propose` and `explore` aim at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The best split. Intervals are at 90 %: of the loss PREDICTIVE, of N, D and T over the replicates whose
    terms of N and D are not zero; None without a bootstrap.

    The loss is the law's at D' (`effective_tokens`); `extrapolation` is at the real D. `hours` are the
    training's; `usd` and `kwh` include inference demand; None where the speed cannot tell. `residuals`:
    relative first-order residuals of "N" and "T", absent for what lies at a bound or a corner of two.
    """

    n_active: float
    n_total: float
    tokens: float
    context_tokens: float | None
    loss_nats: float
    low_nats: float | None
    high_nats: float | None
    n_active_low: float | None
    n_active_high: float | None
    tokens_low: float | None
    tokens_high: float | None
    context_tokens_low: float | None  # of T, where it was chosen
    context_tokens_high: float | None
    compute_flops: float  # training
    inference_flops: float
    effective_tokens: float  # D'
    epochs: float  # D over the unique tokens used; 1 without repeats
    chi: float
    hours: float | None
    usd: float | None
    kwh: float | None
    binding: tuple[str, ...]
    residuals: dict[str, float]
    extrapolation: dict[str, float]
    advice: tuple[str, ...]

    @property
    def tokens_per_parameter(self) -> float:
        """D/N_active."""
        return self.tokens / self.n_active

    def point(self, size: str) -> dict[str, float]:
        """What a law of N = `size` reads of this plan: its loss is the law's here (at D', not at D)."""
        point = {"n_active": self.n_active, "n_total": self.n_total, size: self.n_active}
        if self.context_tokens is not None:
            point["context_tokens"] = self.context_tokens
        return {**point, "tokens": self.effective_tokens}


@dataclass(frozen=True)
class Target:
    """The least compute that reaches a loss, and its split; `plan.tokens_low` and `_high` are of D*(loss).

    Intervals (90 %) are of the fit: where the law's mean reaches the loss. An end is None where the law has
    no bootstrap, or where the replicates there never reach the loss; `reached` is the share that do.
    """

    plan: Plan
    compute_low_flops: float | None
    compute_high_flops: float | None
    reached: float | None
