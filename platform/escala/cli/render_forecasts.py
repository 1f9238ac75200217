"""Printing sealed forecasts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from escala.cli.render import as_json, note, number, raw, table

if TYPE_CHECKING:
    from escala.views.forecasts import ChainView, CoverageView, ForecastsView, ForecastView


def sealed(found: ForecastView) -> None:
    """A line about a forecast that was just sealed; on stderr."""
    note(
        f"sealed {found.id}: {found.law} predicts {found.loss_nats:.4f} "
        f"({found.level:.0%} from {found.low_nats:.4f} to {found.high_nats:.4f})"
    )


def forecasts(found: ForecastsView, json: bool) -> None:
    """A row a forecast, then how they fared."""
    if json:
        as_json(found)
        return
    columns = ("id", "law", "of", "N", "D", "beyond", "predicted", "90 % from", "to", "obtained", "error", "")
    table(columns, [_row(each) for each in found.forecasts])
    if not found.forecasts:
        note("no forecast is sealed: add --seal to laws plan, laws predict, submit --law or sweep")
        return
    if found.together.scored == 0:
        note("none has been scored: their runs have not ended")
        return
    for each in (found.together, *found.by_factor):
        _fared(each)


def _row(each: ForecastView) -> tuple[str, ...]:
    size = each.point.get("n_active", each.point.get("n_total", each.point.get("n_non_embedding")))
    verdict = "open" if each.inside is None else "" if each.inside else "outside"
    return (
        each.id,
        each.law,
        each.name,
        number(size),
        number(each.point.get("tokens")),
        f"{each.factor:.3g}x",
        number(each.loss_nats),
        number(each.low_nats),
        number(each.high_nats),
        number(each.obtained_nats),
        "-" if each.error is None else f"{each.error:+.2%}",
        "not scored" if each.reason else verdict,
    )


def _fared(each: CoverageView) -> None:
    raw(
        f"{each.label:18} {each.inside} of {each.scored} within 90 % (the truth: {each.coverage_low or 0:.0%} to "
        f"{each.coverage_high or 0:.0%}), median error {each.median_error or 0:.2%}, "
        f"median width {each.median_width or 0:.2%}"
    )


def forecast(found: ForecastView, json: bool) -> None:
    """One in full."""
    if json:
        as_json(found)
        return
    raw(f"{found.id}  {found.name}, by {found.law}, entry {found.number} of the chain")
    rows = [
        ("sealed", datetime.fromtimestamp(found.sealed_at, UTC).isoformat(" ", "seconds")),
        ("point", ", ".join(f"{name} {number(value)}" for name, value in found.point.items())),
        ("beyond the data", ", ".join(f"{name} {value:.3g}x" for name, value in found.extrapolation.items())),
        (
            "predicted",
            f"{found.loss_nats:.4f}, {found.level:.0%} from {found.low_nats:.4f} to {found.high_nats:.4f}",
        ),
        ("obtained", _obtained(found)),
        ("run", found.run_id or "-"),
        ("configuration", found.configuration or "any run at that point"),
        ("text", ", ".join(f"{name} {value[:16]}" for name, value in found.text.items()) or "-"),
        ("code", f"{found.code_fingerprint[:16]}, git {found.git_commit or '-'}"),
    ]
    for name, text in rows:
        raw(f"  {name:16} {text}")


def _obtained(found: ForecastView) -> str:
    if found.reason:
        return f"not scored: {found.reason}"
    if found.obtained_nats is None:
        return "its run has not ended"
    where = "inside" if found.inside else "outside"
    return f"{found.obtained_nats:.4f}, {where}, {found.error or 0:+.2%} off"


def chain(found: ChainView, json: bool) -> None:
    """What is wrong with the chain, or that nothing is."""
    if json:
        as_json(found)
        return
    for problem in found.problems:
        raw(f"BROKEN  {problem}")
    if not found.problems:
        newer = found.entries - found.kept
        raw(
            f"whole: {found.entries} entries, {found.forecasts} forecasts; MLflow keeps the hash of entry {found.kept}"
            + (f", and {newer} newer scores" if newer else "")
        )
