"""Laws as text and JSON, with the tables of render.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala.cli.render import ago, as_json, note, number, page, pairs, raw, table
from escala.contract.errors import LawError
from escala.laws.forms import get_form
from escala.laws.inputs import SIZE

if TYPE_CHECKING:
    from escala.views.laws import (
        CalibrationView,
        FittedLawView,
        FitView,
        LawAnswerView,
        LawComparisonView,
        LawPreviewView,
        LawVersionView,
        LawView,
        PredictionView,
        RollingView,
    )
    from escala.views.run_records import RunDetailsView

INSIDE = 1.0005  # a factor that prints as 1
REFUSED_ROWS = 20  # of which a person sees each; --json has all


def preview(found: LawPreviewView, json: bool) -> None:
    """A law that was not stored: how its table was understood, what was refused, what came of it."""
    if json:
        as_json(found)
        return
    raw("understood")
    said = {key: value for key, value in found.understood.items() if value not in (None, {}, [], 0, False)}
    first = said.pop("first_rows", {})
    files = said.pop("files", [])
    pairs({key: _said(value) for key, value in said.items()})
    for each in files:
        raw(f"\n{each['file']}")
        pairs({key: _said(value) for key, value in each.items() if value not in (None, {}, [], 0, False)})
    raw("\nfirst rows, as read")
    rows = [(row, *(number(value) for value in values.values())) for row, values in first.items()]
    table(("row", *next(iter(first.values()), {})), rows)
    raw("")
    _law("not stored", found)


def _said(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def fitted(found: FittedLawView, json: bool) -> None:
    """The law that was stored, and what its name answers with now."""
    if json:
        as_json(found)
        return
    _law(found.law, found)
    raw("")
    if found.champion == found.version:
        raw(f"stored as {found.law}, champion of {found.name}")
    elif found.champion is None:
        raw(f"stored as {found.law}; not healthy, so {found.name} has no champion")
    else:
        raw(f"stored as {found.law}; champion is still {found.name}@{found.champion}")
        note(f"next: escala laws compare {found.name} {found.law}")


def laws(rows: Sequence[LawVersionView], json: bool) -> None:
    """Versions, a row each."""
    if json:
        as_json(rows)
        return
    columns = ("law", "champion", "healthy", "form", "N", "points", "by", "fitted")
    cells = [
        (
            row.law,
            "yes" if row.champion else "",
            "yes" if row.healthy else "no",
            row.form,
            row.size,
            row.points,
            row.by,
            ago(row.created_at),
        )
        for row in rows
    ]
    table(columns, cells)
    if not rows:
        note("no laws yet; `escala laws fit --points FILE.csv --name NAME` makes one")


def law(found: LawView, json: bool) -> None:
    """A law in full, its points apart."""
    if json:
        as_json(found)
        return
    _law(found.law, found)
    raw("\nprovenance")
    told = {k: v for k, v in found.provenance.items() if v not in (None, []) and not isinstance(v, dict)}
    pairs({key: ago(value) if key == "created_at" else _listed(value) for key, value in told.items()})


def _law(name: str, law: FitView) -> None:
    size = f"   (N is {law.size})" if SIZE in get_form(law.form).inputs else ""
    raw(f"{name}   loss = {law.formula}{size}")
    table(("parameter", "value", "90 % from", "to"), parameter_rows(law))
    for column, (low, high) in law.ranges.items():
        raw(f"  measured  {column} {number(low)} to {number(high)}")
    for line in backtest_lines(law.backtest):
        raw(f"  {line}")
    raw(f"  healthy   {'yes' if law.healthy else 'no'}")
    for finding in law.findings:
        raw(f"  finding   {finding}")
    for each in law.refused[:REFUSED_ROWS]:
        raw(f"  refused   row {each.row}: {each.reason}")
    if len(law.refused) > REFUSED_ROWS:
        raw(f"  refused   {len(law.refused) - REFUSED_ROWS} more; --json lists them all")


def backtest_lines(found: RollingView | None) -> list[str]:
    """How the smaller points foresaw the larger ones: a line per quantity they were cut along, then all together."""
    if found is None or found.coverage is None:
        return []
    lines = []
    for by in dict.fromkeys(cut.by for cut in found.cuts):
        cuts = [cut for cut in found.cuts if cut.by == by]
        asked = sum(cut.test_points for cut in cuts)
        error = sum(cut.error * cut.test_points for cut in cuts) / asked
        bias = sum(cut.bias * cut.test_points for cut in cuts) / asked
        refits = f"{len(cuts)} refit{'s' if len(cuts) > 1 else ''} to {cuts[0].train_points}"
        refits += f" to {cuts[-1].train_points} points" if len(cuts) > 1 else " points"
        lines.append(
            f"backtest  smaller {by}, {refits}: up to {max(cut.factor for cut in cuts):.3g}x beyond, error {error:.2%} "
            f"(obtained {bias:+.2%}), {sum(cut.inside for cut in cuts)} of {asked} inside"
        )
    lines.append(
        f"coverage  {found.coverage:.0%} of {found.predictions} predictions of {found.points} points within 90 % "
        f"(the truth: {found.coverage_low:.0%} to {found.coverage_high:.0%})"
    )
    if found.bias is not None:
        at_seven = found.bias * 2**0.5  # as the root of the distance's log
        lines.append(
            f"bias      {found.bias:.2%} of the loss likely at 2.7x the data, {at_seven:.2%} at 7.4x"
        )
    return lines


def parameter_rows(law: FitView) -> list[tuple[str, str, str, str]]:
    """Each parameter with its 90 % interval, as text; "none" where there is no interval."""
    intervals, absent, rows = law.intervals_90 or {}, law.not_identified, []
    for name, value in law.parameters.items():
        low, high = (number(end) for end in intervals[name]) if name in intervals else ("none", "")
        rows.append((name, "not identified", "", "") if name in absent else (name, number(value), low, high))
    return rows


def prediction(found: PredictionView, json: bool) -> None:
    """A loss, its interval and its distance from the data."""
    if json:
        as_json(found)
        return
    bounds = interval(found.low_nats, found.high_nats, f"{found.level * 100:g} % predictive interval")
    raw(f"loss            {number(found.loss_nats)} nats per token  ({bounds})")
    caveats(found)


def refusal(why: LawError) -> None:
    """A law that gives no plan: an answer, too."""
    raw(f"no plan         {why.message}")
    raw(f"hint            {why.hint}")


def verdict(found: PredictionView, record: RunDetailsView) -> None:
    """What a law said of a run beforehand, and what the run obtained."""
    loss = record.held_out_loss_nats
    bounds = interval(found.low_nats, found.high_nats, "90 % predictive interval")
    raw(f"predicted       {number(found.loss_nats)} nats per token  ({bounds})")
    if loss is not None and found.low_nats is not None and found.high_nats is not None:
        inside = "inside" if found.low_nats <= loss <= found.high_nats else "OUTSIDE"
        raw(f"obtained        {number(loss)} nats per token  ({inside}; {loss / found.loss_nats - 1:+.2%})")
    raw(f"before          {number(record.initial_held_out_loss_nats)} nats per token, without training")
    raw(f"extrapolation   {_distance(found.extrapolation)}")
    size, tokens, flops = record.n_total, record.train_tokens, record.compute_flops
    raw(f"run             {number(size)} parameters, {number(tokens)} tokens, {number(flops)} FLOPs")
    page(record.url)
    raw(f"next            escala laws show {found.law}; escala laws calibration")


def interval(low: float | None, high: float | None, what: str) -> str:
    """A law's interval in words; an end that is None is not known (of an allocation: never reached)."""
    if low is None and high is None:
        return f"{what}: none"
    return f"{what} {number(low)} to {number(high)}"


def caveats(found: LawAnswerView) -> None:
    """Which law, what was assumed, how far it extrapolates, and whether it is healthy."""
    raw(f"extrapolation   {_distance(found.extrapolation)}")
    for text in found.assumed:
        raw(f"assumed         {text}")
    raw(f"law             {found.law}, {'healthy' if found.healthy else 'NOT HEALTHY'}")
    for finding in () if found.healthy else found.findings:
        raw(f"finding         {finding}")


def _distance(extrapolation: Mapping[str, float]) -> str:
    far = sorted(((v, k) for k, v in extrapolation.items() if v > INSIDE), reverse=True)
    return (
        ", ".join(f"{name} {factor:.3g}x beyond the data" for factor, name in far) or "none: inside the data"
    )


def comparison(found: LawComparisonView, json: bool) -> None:
    """Parameters side by side, and how much the losses disagree."""
    a, b = found.first, found.second
    if json:
        as_json(found)
        return
    rows: list[tuple[str, ...]] = [("form", a.form, b.form), ("N", a.size, b.size)]
    names = dict.fromkeys([*a.parameters, *b.parameters])
    rows += [(name, _value(a, name), _value(b, name)) for name in names]
    rows += [("points", *(str(s.provenance["points"]) for s in (a, b)))]
    rows += [("healthy", *("yes" if s.healthy else "no" for s in (a, b)))]
    table(("", a.law, b.law), rows)
    median, most = found.disagreement, found.largest_disagreement
    if median is None or most is None:
        raw("\ntheir losses cannot be compared: a law reads an input that the other's points lack")
    else:
        raw(f"\ntheir losses differ by {median:.2%} at the median point, {most:.2%} at most")


def _value(law: FitView, name: str) -> str:
    if name not in law.parameters:
        return "-"
    value = number(law.parameters[name])
    if law.intervals_90 is None:
        return value
    low, high = law.intervals_90[name]
    return f"{value}  ({number(low)} to {number(high)})"


def calibration(found: CalibrationView, json: bool) -> None:
    """Predicted against obtained, a row a run; then how often the intervals held."""
    if json:
        as_json(found)
        return
    columns = (
        "law",
        "run",
        "name",
        "FLOPs",
        "beyond",
        "predicted",
        "90 % from",
        "to",
        "obtained",
        "error",
        "",
    )
    rows = [
        (
            c.law,
            c.run_id[:8],
            c.name,
            number(c.compute_flops),
            f"{c.farthest:.3g}x",
            *(number(value) for value in (c.loss_nats, c.low_nats, c.high_nats, c.obtained_loss_nats)),
            f"{c.error:+.2%}",
            "ALARM" if c.alarm else "" if c.inside else "outside",
        )
        for c in found.checks
    ]
    table(columns, rows)
    for c in found.checks:
        for key, (theirs, ours) in (c.difference or {}).items():
            raw(f"  {c.run_id[:8]}  {key}: {theirs} in the law's runs, {ours} here")
    if found.coverage is None:
        note("no run has finished while a law was champion and read the same text")
        return
    low, high = found.coverage_low or 0.0, found.coverage_high or 0.0
    raw(
        f"\ncoverage   {found.coverage:.0%} of {len(found.checks)} within 90 % (the truth: {low:.0%} to {high:.0%})"
    )
    raw(f"error      {found.median_error:.2%}, median")
    raw(f"width      {found.median_width:.2%} of the prediction, median")
    raw(f"alarms     {found.alarms}; {found.expected_alarms:.2g} expected of laws that are right")


def files(paths: Sequence[Path], json: bool) -> None:
    """The files that were written."""
    if json:
        as_json([str(path) for path in paths])
        return
    for path in paths:
        raw(str(path))


def _listed(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return ", ".join(map(str, value[:5])) + (f", and {len(value) - 5} more" if len(value) > 5 else "")
