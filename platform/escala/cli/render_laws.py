"""Laws as text and JSON. With render.py, whose tables it uses, the only module that prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala.cli.render import ago, as_json, note, number, page, pairs, raw, table
from escala.contract.errors import LawError
from escala.contract.records import RunRecord

if TYPE_CHECKING:
    from escala.laws.drift import Calibration
    from escala.laws.law import Law
    from escala.laws.queries import Fitted, Forecast, LawComparison, Preview
    from escala.laws.reference import Stored
    from escala.laws.registry import LawVersion

INSIDE = 1.0005  # a factor that prints as 1
REFUSED_ROWS = 20  # of which a person sees each; --json has all


def preview(found: Preview, json: bool) -> None:
    """A law that was not stored: how its table was understood, what was refused, what came of it."""
    law = found.law
    if json:
        as_json(
            {
                "understood": found.understood,
                "refused": _refused(law),
                "parameters": law.parameters,
                "intervals": _intervals(law),
                "findings": list(law.findings),
                "healthy": law.healthy,
            }
        )
        return
    raw("understood")
    pairs({key: _said(value) for key, value in found.understood.items() if value not in (None, {}, [], 0)})
    raw("")
    _law("not stored", law)


def _said(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {each}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def fitted(found: Fitted, json: bool) -> None:
    """The law that was stored, and what its name answers with now."""
    stored = found.stored
    if json:
        as_json({**_plain(stored), "champion": found.champion})
        return
    _law(stored.reference, stored.law)
    raw("")
    if found.champion == stored.version:
        raw(f"stored as {stored.reference}, champion of {stored.name}")
    elif found.champion is None:
        raw(f"stored as {stored.reference}; not healthy, so {stored.name} has no champion")
    else:
        raw(f"stored as {stored.reference}; champion is still {stored.name}@{found.champion}")
        note(f"next: escala laws compare {stored.name} {stored.reference}")


def laws(rows: Sequence[LawVersion], json: bool) -> None:
    """Versions, a row each."""
    if json:
        as_json([asdict(row) for row in rows])
        return
    columns = ("law", "champion", "healthy", "form", "N", "points", "by", "fitted")
    cells = [
        (
            row.reference,
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


def law(stored: Stored, json: bool) -> None:
    """A law in full, its points apart."""
    if json:
        as_json(_plain(stored))
        return
    _law(stored.reference, stored.law)
    raw("\nprovenance")
    told = {k: v for k, v in stored.provenance.items() if v not in (None, []) and not isinstance(v, dict)}
    pairs({key: ago(value) if key == "created_at" else _listed(value) for key, value in told.items()})


def _law(name: str, law: Law) -> None:
    raw(f"{name}   loss = {law.form.formula}   (N is {law.size})")
    table(("parameter", "value", "90 % from", "to"), parameter_rows(law))
    for column, (low, high) in law.ranges.items():
        raw(f"  measured  {column} {number(low)} to {number(high)}")
    raw(f"  healthy   {'yes' if law.healthy else 'no'}")
    for finding in law.findings:
        raw(f"  finding   {finding}")
    refused = law.refusals
    for row, reason in refused[:REFUSED_ROWS]:
        raw(f"  refused   row {row}: {reason}")
    if len(refused) > REFUSED_ROWS:
        raw(f"  refused   {len(refused) - REFUSED_ROWS} more; --json lists them all")


def parameter_rows(law: Law) -> list[tuple[str, str, str, str]]:
    """Each parameter with its 90 % interval, as text; "none" where there is no interval."""
    intervals = _intervals(law) or {}
    absent = {term.exponent for term in law.form.terms if not law.parameters[term.coefficient]}
    rows = []
    for name, value in law.parameters.items():
        low, high = (number(end) for end in intervals[name]) if name in intervals else ("none", "")
        rows.append((name, "not identified", "", "") if name in absent else (name, number(value), low, high))
    return rows


def _refused(law: Law) -> list[dict[str, Any]]:
    return [{"row": row, "reason": reason} for row, reason in law.refusals]


def _intervals(law: Law) -> dict[str, tuple[float, float]] | None:
    return law.intervals(0.9) if law.has_intervals else None


def prediction(answer: Forecast, json: bool) -> None:
    """A loss, its interval and its distance from the data."""
    if json:
        as_json(answer.plain())
        return
    found = answer.prediction
    bounds = interval(found.low_nats, found.high_nats, f"{found.level * 100:g} % predictive interval")
    raw(f"loss            {number(found.loss_nats)} nats per token  ({bounds})")
    caveats(answer.law, answer.extrapolation, answer.assumed)


def refusal(why: LawError) -> None:
    """A law that gives no plan: an answer, too."""
    raw(f"no plan         {why.message}")
    raw(f"hint            {why.hint}")


def verdict(answer: Forecast, record: RunRecord, url: str) -> None:
    """What a law said of a run beforehand, and what the run obtained."""
    found = answer.prediction
    loss = record.held_out_loss_nats
    bounds = interval(found.low_nats, found.high_nats, "90 % predictive interval")
    raw(f"predicted       {number(found.loss_nats)} nats per token  ({bounds})")
    if loss is not None and found.low_nats is not None and found.high_nats is not None:
        inside = "inside" if found.low_nats <= loss <= found.high_nats else "OUTSIDE"
        raw(f"obtained        {number(loss)} nats per token  ({inside}; {loss / found.loss_nats - 1:+.2%})")
    raw(f"before          {number(record.initial_held_out_loss_nats)} nats per token, without training")
    raw(f"extrapolation   {_distance(answer.extrapolation)}")
    size, tokens, flops = record.n_total, record.train_tokens, record.compute_flops
    raw(f"run             {number(size)} parameters, {number(tokens)} tokens, {number(flops)} FLOPs")
    page(url)
    raw(f"next            escala laws show {answer.law.reference}; escala laws calibration")


def interval(low: float | None, high: float | None, what: str) -> str:
    """A law's interval in words; an end that is None is not known (of an allocation: never reached)."""
    if low is None and high is None:
        return f"{what}: none"
    return f"{what} {number(low)} to {number(high)}"


def caveats(stored: Stored, extrapolation: Mapping[str, float], assumed: Sequence[str]) -> None:
    """Which law, what was assumed, how far it extrapolates, and whether it is healthy."""
    raw(f"extrapolation   {_distance(extrapolation)}")
    for text in assumed:
        raw(f"assumed         {text}")
    law = stored.law
    raw(f"law             {stored.reference}, {'healthy' if law.healthy else 'NOT HEALTHY'}")
    for finding in () if law.healthy else law.findings:
        raw(f"finding         {finding}")


def _distance(extrapolation: Mapping[str, float]) -> str:
    far = sorted(((v, k) for k, v in extrapolation.items() if v > INSIDE), reverse=True)
    return (
        ", ".join(f"{name} {factor:.3g}x beyond the data" for factor, name in far) or "none: inside the data"
    )


def comparison(found: LawComparison, json: bool) -> None:
    """Parameters side by side, and how much the losses disagree."""
    a, b = found.first, found.second
    if json:
        keys = ("disagreement", "largest_disagreement")
        sides = {"first": _plain(a), "second": _plain(b)}
        as_json({**sides, **{key: getattr(found, key) for key in keys}})
        return
    rows: list[tuple[str, ...]] = [("form", a.law.form_name, b.law.form_name), ("N", a.law.size, b.law.size)]
    names = dict.fromkeys([*a.law.parameters, *b.law.parameters])
    rows += [(name, _value(a.law, name), _value(b.law, name)) for name in names]
    rows += [("points", *(str(s.provenance["points"]) for s in (a, b)))]
    rows += [("healthy", *("yes" if s.law.healthy else "no" for s in (a, b)))]
    table(("", a.reference, b.reference), rows)
    median, most = found.disagreement, found.largest_disagreement
    if median is None or most is None:
        raw("\ntheir losses cannot be compared: a law reads an input that the other's points lack")
    else:
        raw(f"\ntheir losses differ by {median:.2%} at the median point, {most:.2%} at most")


def _value(law: Law, name: str) -> str:
    if name not in law.parameters:
        return "-"
    value = number(law.parameters[name])
    if not law.has_intervals:
        return value
    low, high = law.intervals(0.9)[name]
    return f"{value}  ({number(low)} to {number(high)})"


def calibration(found: Calibration, json: bool) -> None:
    """Predicted against obtained, a row a run; then how often the intervals held."""
    if json:
        as_json(asdict(found))
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
            f"{c.extrapolation:.3g}x",
            *(number(value) for value in (c.predicted, c.low, c.high, c.obtained)),
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


def _plain(stored: Stored) -> dict[str, Any]:
    law = stored.law
    return {
        "law": stored.reference,
        "form": law.form_name,
        "formula": law.form.formula,
        "size": law.size,
        "parameters": law.parameters,
        "intervals_90": _intervals(law),
        "objective": asdict(law.objective),
        "objective_value": law.objective_value,
        "ranges": law.ranges,
        "healthy": law.healthy,
        "findings": list(law.findings),
        "refused": _refused(law),
        "settings": law.settings,
        "provenance": stored.provenance,
    }


def _listed(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return ", ".join(map(str, value[:5])) + (f", and {len(value) - 5} more" if len(value) > 5 else "")
