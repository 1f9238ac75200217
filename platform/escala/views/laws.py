"""Laws: one in full, a fit, a prediction, two side by side, past predictions against what was obtained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from escala.views.base import View

if TYPE_CHECKING:
    from escala.laws.drift import Calibration, Checked
    from escala.laws.intervals import Prediction
    from escala.laws.law import Law
    from escala.laws.queries import Preview
    from escala.laws.reference import Stored
    from escala.laws.registry import LawVersion
    from escala.laws.rolling import Rolling

Interval = tuple[float, float]


class RefusedPointView(View):
    """A row of the table that gives no point, and why."""

    row: Any
    reason: str


class CutView(View):
    """One refit to the points whose `by` is at most `largest`, and how it foresaw the larger ones."""

    by: str  # an input, or compute_flops
    largest: float
    train_points: int
    test_points: int
    factor: float  # the farthest tested point's factor beyond the refit's data
    error: float  # mean absolute relative error of the tested points
    bias: float  # mean signed one: obtained over predicted - 1
    inside: int  # tested points within their 90 % interval


class RollingView(View):
    """A law's rolling backtests. `bias`: the form's relative error at e times the data that they leave likely (half the
    width of its central 68 %). `coverage_low`, `coverage_high`: 95 % interval of the true coverage.
    """

    points: int  # different points, predicted from smaller ones
    predictions: int  # a point may be predicted from several cuts
    coverage: float | None
    coverage_low: float
    coverage_high: float
    error: float | None  # mean absolute relative error
    bias: float | None
    cuts: tuple[CutView, ...]

    @classmethod
    def of_rolling(cls, found: Rolling) -> RollingView:
        """Of a law's backtests."""
        low, high = found.coverage_interval()
        cuts = tuple(
            CutView(
                by=cut.by,
                largest=cut.largest,
                train_points=cut.train_points,
                test_points=len(cut.rows),
                factor=max(cut.factors),
                error=sum(map(abs, cut.errors)) / len(cut.rows),
                bias=sum(cut.errors) / len(cut.rows),
                inside=sum(cut.inside),
            )
            for cut in found.cuts
        )
        return cls(
            points=found.points,
            predictions=found.predictions,
            coverage=found.coverage,
            coverage_low=low,
            coverage_high=high,
            error=found.error,
            bias=found.bias,
            cuts=cuts,
        )


class FitView(View):
    """A fitted law, whoever stores it. Parameters are those of the formula in nats, parameters, tokens."""

    form: str
    formula: str
    size: str  # the N of the law: n_active, n_total or n_non_embedding
    parameters: dict[str, float]
    intervals_90: dict[str, Interval] | None  # by parameter; None: the law has none
    not_identified: tuple[str, ...]  # parameters that the points do not determine
    objective: dict[str, Any]  # space of the residuals, huber_delta
    objective_value: float
    ranges: dict[str, Interval]  # smallest and largest measured value of each input
    healthy: bool
    findings: tuple[str, ...]
    backtest: RollingView | None  # None: the law has no intervals, or is of an escala before 0.3
    refused: tuple[RefusedPointView, ...]
    settings: dict[str, Any]


class LawView(FitView):
    """A law as it was registered. `law`: name@version. `provenance`: by whom, when, from which runs, code, data."""

    law: str
    name: str
    version: int
    provenance: dict[str, Any]

    @classmethod
    def of_stored(cls, stored: Stored) -> LawView:
        """Of a law in the registry."""
        known = {"law": stored.reference, "name": stored.name, "version": stored.version}
        return cls(**known, **_fit(stored.law), provenance=stored.provenance)


class FittedLawView(LawView):
    """A law just stored, and which version of its name is champion now (None: no healthy one yet)."""

    champion: int | None

    @classmethod
    def of_fit(cls, stored: Stored, champion: int | None) -> FittedLawView:
        """Of a law that has just been stored."""
        return cls(**dict(LawView.of_stored(stored)), champion=champion)


class LawPreviewView(FitView):
    """A law that was fitted and not stored. `understood`: how its table was read."""

    understood: dict[str, Any]

    @classmethod
    def of_preview(cls, found: Preview) -> LawPreviewView:
        """Of a fit that was not stored."""
        return cls(**_fit(found.law), understood=found.understood)


class LawVersionView(View):
    """One row of the registry."""

    law: str  # name@version
    name: str
    version: int
    champion: bool
    healthy: bool
    form: str
    size: str
    points: int
    by: str
    created_at: float  # Unix seconds
    run_id: str  # of the law's own run

    @classmethod
    def of_row(cls, row: LawVersion) -> LawVersionView:
        """Of a row of the registry."""
        return cls(law=row.reference, **asdict(row))


class LawAnswerView(View):
    """What every answer of a law says of itself. `assumed`: what the question left open."""

    law: str  # name@version
    healthy: bool
    findings: tuple[str, ...]
    assumed: tuple[str, ...]
    extrapolation: dict[str, float]  # by input, the factor beyond the data; 1 is inside
    farthest: float  # the largest of them


class PredictionView(LawAnswerView):
    """The loss at a point with its predictive interval (None for a law without intervals)."""

    loss_nats: float
    low_nats: float | None
    high_nats: float | None
    level: float  # of the interval

    @classmethod
    def of_answer(cls, stored: Stored, found: Prediction, assumed: Sequence[str]) -> PredictionView:
        """Of a law and its prediction."""
        return cls(**about(stored, found.extrapolation, assumed), **_without(asdict(found), "extrapolation"))


class LawComparisonView(View):
    """Two laws side by side. `disagreement`: the median of |second / first - 1| of their losses over both laws' points;
    None where one lacks an input of the other.
    """

    first: LawView
    second: LawView
    disagreement: float | None
    largest_disagreement: float | None


class CheckedPredictionView(View):
    """One run against one law; losses in nats per token."""

    law: str  # name@version
    run_id: str
    name: str
    at: float  # Unix seconds
    compute_flops: float | None
    farthest: float  # of the inputs' factors beyond the data; 1 is inside
    loss_nats: float  # predicted
    low_nats: float  # of the 90 % interval
    high_nats: float
    alarm_low_nats: float
    alarm_high_nats: float
    obtained_loss_nats: float
    error: float  # relative: obtained / predicted - 1
    inside: bool  # of the 90 % interval
    alarm: bool  # outside of the interval of the alarm
    difference: dict[str, list[str]] | None  # of an alarm: key -> [the law's, the run's]

    @classmethod
    def of_check(cls, check: Checked) -> CheckedPredictionView:
        """Of a run that was compared with a law."""
        kept = ("law", "run_id", "name", "at", "compute_flops", "error", "inside", "alarm")
        return cls(
            **{name: getattr(check, name) for name in (*kept, "difference")},
            farthest=check.extrapolation,
            loss_nats=check.predicted,
            low_nats=check.low,
            high_nats=check.high,
            alarm_low_nats=check.alarm_low,
            alarm_high_nats=check.alarm_high,
            obtained_loss_nats=check.obtained,
        )


class CalibrationView(View):
    """Past predictions together. `coverage_low`, `coverage_high`: 95 % interval of the true coverage."""

    checks: tuple[CheckedPredictionView, ...]
    coverage: float | None
    coverage_low: float | None
    coverage_high: float | None
    median_error: float | None  # relative, absolute value
    median_width: float | None  # of the interval, relative to the prediction
    alarms: int
    expected_alarms: float

    @classmethod
    def of_checks(cls, found: Calibration) -> CalibrationView:
        """Of a law's record."""
        checks = tuple(CheckedPredictionView.of_check(check) for check in found.checks)
        return cls(checks=checks, **_without(vars(found), "checks"))


def about(stored: Stored, extrapolation: dict[str, float], assumed: Sequence[str]) -> dict[str, Any]:
    """The fields of LawAnswerView."""
    return {
        "law": stored.reference,
        "healthy": stored.law.healthy,
        "findings": tuple(stored.law.findings),
        "assumed": tuple(assumed),
        "extrapolation": extrapolation,
        "farthest": max(extrapolation.values(), default=1.0),
    }


def _fit(law: Law) -> dict[str, Any]:
    absent = {term.exponent for term in law.form.terms if not law.parameters[term.coefficient]}
    return {
        "form": law.form_name,
        "formula": law.form.formula,
        "size": law.size,
        "parameters": law.parameters,
        "intervals_90": law.intervals(0.9) if law.has_intervals else None,
        "not_identified": tuple(name for name in law.parameters if name in absent),
        "objective": asdict(law.objective),
        "objective_value": law.objective_value,
        "ranges": law.ranges,
        "healthy": law.healthy,
        "findings": tuple(law.findings),
        "backtest": None if law.rolling is None else RollingView.of_rolling(law.rolling),
        "refused": tuple(RefusedPointView(row=row, reason=reason) for row, reason in law.refusals),
        "settings": law.settings,
    }


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}
