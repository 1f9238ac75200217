"""A law as one HTML file that can be mailed: law, intervals, data, findings, backtest, forecasts, plots, provenance.

The file needs no other file, no host and no script: its plots are inside, and everything that people wrote (names,
sources, findings, reasons) is escaped. What is not known is a sentence, not a gap.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from escala.laws.law import Law

REFUSED_ROWS = 50  # of which a reader sees each
LISTED = 12  # ids of a list in the provenance
DPI = 110
NO_BACKTEST = (
    "the law has no intervals, too few points for a refit to the smaller ones, or is of an escala before 0.3."
)


@dataclass(frozen=True)
class BacktestLine:
    """One refit to the smaller runs. Errors are relative; `covered`: share inside the 90 % interval, None: none."""

    fitted: str  # to what, e.g. "compute_flops <= 1e19"
    train_points: int
    test_points: int
    beyond: float  # how far the farthest larger run lies beyond the fitted ones, as a factor
    error: float
    bias: float | None  # of the prediction: its mean signed error
    covered: float | None


@dataclass(frozen=True)
class ForecastLine:
    """One prediction that was made before its run finished. Losses in nats per token; None: not known yet."""

    name: str
    sealed_at: float | None  # Unix seconds; None: it was not sealed
    beyond: float | None  # the farthest input's factor beyond the data; 1 is inside
    predicted: float
    low: float | None  # of the 90 % interval
    high: float | None
    obtained: float | None = None


@dataclass(frozen=True)
class TrackRecord:
    """What is known of a law besides its own fit and backtests."""

    forecasts: Sequence[ForecastLine] = ()


@dataclass(frozen=True)
class Plot:
    """A figure: its title, and a PNG as base64."""

    title: str
    png: str


@dataclass(frozen=True)
class LawReport:
    """The report's content as texts: what the template shows and nothing else."""

    reference: str
    healthy: bool
    subtitle: str
    formula: str
    size: str
    parameters: list[tuple[str, str, str, str]]
    no_intervals: str
    points: int
    ranges: list[tuple[str, str, str]]
    refused: list[tuple[str, str]]
    findings: tuple[str, ...]
    backtests: list[tuple[str, ...]]
    no_backtest: str
    forecasts: list[tuple[str, ...]]
    coverage: str
    plots: list[Plot]
    provenance: list[tuple[str, str]]
    made: str


def html(
    law: Law,
    reference: str,
    provenance: Mapping[str, Any],
    evidence: TrackRecord | None = None,
    pngs: Mapping[str, bytes] | None = None,
) -> str:
    """The report as a document.

    Args:
        reference: name@version.
        provenance: of `Stored.provenance`.
        evidence: forecasts; None: none is known.
        pngs: the plots by name, where they are drawn already; None: they are drawn.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("escala.laws", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    content = report(
        law, reference, provenance, evidence or TrackRecord(), drawn(law) if pngs is None else pngs
    )
    return environment.get_template("report.html.j2").render(r=content, refused_rows=REFUSED_ROWS)


def report(
    law: Law, reference: str, provenance: Mapping[str, Any], evidence: TrackRecord, pngs: Mapping[str, bytes]
) -> LawReport:
    """The content of `html`. Args as there."""
    by, when = provenance.get("by"), _day(provenance.get("created_at"))
    return LawReport(
        reference=reference,
        healthy=law.healthy,
        subtitle=", ".join(text for text in (by and f"fitted by {by}", when) if text),
        formula=law.form.formula,
        size=law.size,
        parameters=_parameters(law),
        no_intervals="" if law.has_intervals else "This law has no intervals; its findings say why.",
        points=len(law.points),
        ranges=[(name, _number(low), _number(high)) for name, (low, high) in law.ranges.items()],
        refused=[(str(row), reason) for row, reason in law.refusals],
        findings=law.findings,
        backtests=[_backtest(line) for line in backtest_lines(law)],
        no_backtest=NO_BACKTEST,
        forecasts=[_forecast(line) for line in evidence.forecasts],
        coverage=_coverage(evidence.forecasts),
        plots=[Plot(name.replace("_", " "), base64.b64encode(png).decode()) for name, png in pngs.items()],
        provenance=_provenance(provenance),
        made=f"Made by escala {version('escala')} on {_day(time.time())}.",
    )


def _parameters(law: Law) -> list[tuple[str, str, str, str]]:
    intervals = law.intervals(0.9) if law.has_intervals else {}
    absent = {term.exponent for term in law.form.terms if not law.parameters[term.coefficient]}
    rows = []
    for name, value in law.parameters.items():
        if name in absent:
            rows.append((name, "not identified", "", ""))
        elif name in intervals:
            low, high = intervals[name]
            rows.append((name, _number(value), _number(low), _number(high)))
        else:
            rows.append((name, _number(value), "none", ""))
    return rows


def backtest_lines(law: Law) -> list[BacktestLine]:
    """The law's rolling backtests, a line a refit."""
    cuts = () if law.rolling is None else law.rolling.cuts
    return [
        BacktestLine(
            f"{cut.by} <= {_number(cut.largest)}",
            cut.train_points,
            len(cut.rows),
            max(cut.factors),
            sum(map(abs, cut.errors)) / len(cut.rows),
            -sum(cut.errors) / len(cut.rows),
            sum(cut.inside) / len(cut.rows),
        )
        for cut in cuts
    ]


def _backtest(line: BacktestLine) -> tuple[str, ...]:
    return (
        line.fitted,
        str(line.train_points),
        str(line.test_points),
        f"{line.beyond:.3g}x",
        _percent(line.error),
        _signed(line.bias),
        "no interval" if line.covered is None else f"{line.covered:.0%}",
    )


def _forecast(line: ForecastLine) -> tuple[str, ...]:
    inside = _inside(line)
    verdict = {None: "open" if line.obtained is None else "no interval", True: "inside", False: "OUTSIDE"}
    return (
        line.name,
        _day(line.sealed_at) or "no",
        "" if line.beyond is None else f"{line.beyond:.3g}x",
        *(_number(value) for value in (line.predicted, line.low, line.high, line.obtained)),
        "" if line.obtained is None else _signed(line.obtained / line.predicted - 1),
        verdict[inside],
    )


def _inside(line: ForecastLine) -> bool | None:
    """Whether the loss was inside the interval; None where one of them is not known."""
    if line.obtained is None or line.low is None or line.high is None:
        return None
    return line.low <= line.obtained <= line.high


def _coverage(lines: Sequence[ForecastLine]) -> str:
    known = [inside for line in lines if (inside := _inside(line)) is not None]
    if not known:
        return "No forecast has been compared with its run yet."
    return f"{sum(known)} of {len(known)} runs that finished were inside the 90 % predictive interval."


def drawn(law: Law) -> dict[str, bytes]:
    """The law's plots as PNG, by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from escala.laws.plots import figures

    found = {}
    for name, figure in figures(law).items():
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI, format="png")
        found[name] = buffer.getvalue()
    return found


def _provenance(plain: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = list[tuple[str, str]]()
    for key, value in plain.items():
        if key == "created_at":
            rows.append((key, _day(value)))
        elif isinstance(value, Mapping):
            rows += [(f"{key}.{name}", _said(each)) for name, each in _flat(value).items()]
        elif value not in (None, []):
            rows.append((key, _said(value)))
    return rows


def _flat(plain: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings with dotted keys."""
    found = dict[str, Any]()
    for key, value in plain.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


def _said(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    more = f", and {len(value) - LISTED} more" if len(value) > LISTED else ""
    return ", ".join(map(str, value[:LISTED])) + more


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2%}"


def _signed(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:+.2%}"


def _day(seconds: float | None) -> str:
    """The UTC minute; empty where it is not known."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
