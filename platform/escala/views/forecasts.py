"""Sealed forecasts: what was said before a run, what it obtained, how often the intervals held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from escala.views.base import View

if TYPE_CHECKING:
    from escala.laws.forecasts import Forecast


class ForecastView(View):
    """A sealed forecast. Losses in nats per token; `extrapolation`: by input, the factor beyond the law's data.

    `obtained_nats`, `inside`, `error` (relative): None while its run has not ended, or where `reason` says why it has
    no loss that can be compared.
    """

    id: str
    number: int  # of its entry in the chain
    law: str
    name: str
    point: dict[str, float]
    loss_nats: float
    low_nats: float
    high_nats: float
    level: float
    extrapolation: dict[str, float]
    factor: float  # the largest of them
    configuration: str | None
    text: dict[str, str]
    code_fingerprint: str
    git_commit: str | None
    sealed_at: float
    run_id: str | None
    obtained_nats: float | None
    inside: bool | None
    error: float | None
    reason: str | None
    recipe: dict[str, Any] | None

    @classmethod
    def of_forecast(cls, found: Forecast) -> ForecastView:
        """Of one."""
        score = found.score
        return cls(
            id=found.id,
            number=found.number,
            **asdict(found.sealed),
            factor=found.factor,
            run_id=None if score is None else score.run_id,
            obtained_nats=found.obtained_nats,
            inside=found.inside,
            error=found.error,
            reason=None if score is None else score.reason,
        )


class CoverageView(View):
    """Scored forecasts together. `coverage_low`, `coverage_high`: 95 % Wilson interval of the true coverage."""

    label: str
    scored: int
    inside: int
    coverage_low: float | None
    coverage_high: float | None
    median_error: float | None
    median_width: float | None


class ForecastsView(View):
    """Forecasts, oldest first, and how they fared: all together, and by factor beyond the law's data."""

    forecasts: tuple[ForecastView, ...]
    together: CoverageView
    by_factor: tuple[CoverageView, ...]

    @classmethod
    def of_forecasts(cls, found: Sequence[Forecast]) -> ForecastsView:
        """Of some."""
        from escala.laws.forecasts import by_factor, coverage

        return cls(
            forecasts=tuple(ForecastView.of_forecast(each) for each in found),
            together=CoverageView.of(coverage("all", found)),
            by_factor=tuple(CoverageView.of(each) for each in by_factor(found)),
        )


class ChainView(View):
    """What `escala forecasts verify` found. `problems`: in plain words, empty where the chain is whole."""

    entries: int
    forecasts: int
    head: str | None  # the last hash
    kept: int  # of these entries the head in MLflow covers so many
    problems: tuple[str, ...]
