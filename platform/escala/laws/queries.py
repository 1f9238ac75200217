"""Laws, as `escala.client` offers them: fit a file and store it, predict, compare."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala.contract.errors import LawError
from escala.laws.audit import AuditedPoint, findings
from escala.laws.inputs import SIZE
from escala.laws.intervals import Prediction
from escala.laws.law import Law
from escala.laws.reference import Cache, Stored, parse
from escala.report import Report
from escala.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from escala.laws.drift import Calibration
    from escala.laws.files import PointsFile
    from escala.laws.powers import Floats
    from escala.laws.priors import Priors
    from escala.laws.registry import LawVersion, Registry
    from escala.laws.report import TrackRecord

FIRST_ROWS = 3  # of a table, that a preview shows
Files = str | Path | Sequence[str | Path]  # of a table; each may end in ::COLUMN=NUMBER,...


@dataclass(frozen=True)
class Fitted:
    """A law just stored, and which version of its name is champion now (None: no healthy one yet)."""

    stored: Stored
    champion: int | None


@dataclass(frozen=True)
class Preview:
    """A law that was fitted and not stored. `understood`: how its table was read, as plain data."""

    law: Law
    understood: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A prediction with the law that gave it. `assumed`: what the question left open."""

    law: Stored
    prediction: Prediction
    asked: dict[str, float]  # the point, with what was assumed
    assumed: tuple[str, ...]

    @property
    def extrapolation(self) -> dict[str, float]:
        """Per input, the factor beyond the data; 1 is inside."""
        return self.prediction.extrapolation

    def plain(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        law = self.law.law
        return {
            "law": self.law.reference,
            **asdict(self.prediction),
            "farthest": self.prediction.farthest,
            "assumed": list(self.assumed),
            "healthy": law.healthy,
            "findings": list(law.findings),
        }


@dataclass(frozen=True)
class LawComparison:
    """Two laws side by side. `disagreement`: the median of |B/A - 1| over both laws' points; None where one of
    them lacks an input of the other. Parameters can differ much while the losses agree.
    """

    first: Stored
    second: Stored
    disagreement: float | None
    largest_disagreement: float | None


def fit_file(
    settings: Settings,
    file: Files,
    name: str,
    *,
    rename: Mapping[str, str] | None = None,
    form: str = "nd",
    group: str | None = None,
    size: str = "n_active",
    bootstrap: int = 1000,
    seed: int = 0,
    priors: Priors | None = None,
    report: Report | None = None,
) -> Fitted:
    """Fit a law to the table in `file` (CSV, or JSON: a list of records) or in several files, and store it as the
    next version of `name`. `FILE::n_active=1.2e8,tokens=2e9` states what the file does not: a value of all its rows.

    Args:
        rename: {column of the file: column of a law's points}, e.g. {"params": "n_active"}.
        form, group, size, bootstrap, seed, priors: see `fit_law`.
        report: told what is being done.

    Raises NotFoundError, LawError, ClusterError.
    """
    parse(name)  # a bad name is an error before the file is read
    read, group = _read(file, rename or {}, group)
    return fit_points(
        settings,
        read.points,
        name,
        sources=[read.source],
        form=form,
        group=group,
        size=size,
        bootstrap=bootstrap,
        seed=seed,
        priors=priors,
        report=report,
    )


def preview_file(
    file: Files,
    *,
    rename: Mapping[str, str] | None = None,
    form: str = "nd",
    group: str | None = None,
    size: str = "n_active",
    bootstrap: int = 1000,
    seed: int = 0,
    priors: Priors | None = None,
    report: Report | None = None,
) -> Preview:
    """The law of `fit_file`, and how the file was understood; stores nothing and asks no tracker.

    Raises NotFoundError, LawError.
    """
    read, group = _read(file, rename or {}, group)
    law = _fitted(
        read.points,
        report,
        form=form,
        group=group,
        size=size,
        bootstrap=bootstrap,
        seed=seed,
        priors=priors,
    )
    return Preview(law, {**read.understood, **_understood(law, read.points)})


def preview_points(
    points: pd.DataFrame,
    *,
    sources: Sequence[str],
    form: str = "nd",
    group: str | None = None,
    size: str = "n_active",
    bootstrap: int = 1000,
    seed: int = 0,
    priors: Priors | None = None,
    report: Report | None = None,
    audited: Sequence[AuditedPoint] = (),
) -> Preview:
    """The law of `fit_points`; stores nothing. Args and errors as there."""
    law = _fitted(
        points,
        report,
        form=form,
        group=group,
        size=size,
        bootstrap=bootstrap,
        seed=seed,
        priors=priors,
    )
    law = _with_audit(law, audited)
    columns = [str(name) for name in points.columns]
    understood = {"sources": list(sources), "columns": columns, "rows": len(points)}
    return Preview(law, {**understood, **_understood(law, points)})


def fit_points(
    settings: Settings,
    points: pd.DataFrame,
    name: str,
    *,
    sources: Sequence[str],
    form: str = "nd",
    group: str | None = None,
    size: str = "n_active",
    bootstrap: int = 1000,
    seed: int = 0,
    priors: Priors | None = None,
    report: Report | None = None,
    configuration: Mapping[str, Any] | None = None,
    audited: Sequence[AuditedPoint] = (),
    stated: Sequence[str] = (),
) -> Fitted:
    """Fit a law to `points` and store it as the next version of `name`.

    Args:
        sources: where the points came from, in words.
        form, group, size, bootstrap, seed, priors: see `fit_law`.
        report: told what is being done.
        configuration: what all points' runs have in common, nested; a drift alarm compares a run with it.
        audited: where the recipe of the points' runs was audited; kept, and among the law's findings.
        stated: the dotted keys of it that the space of the sweep states, so that no recipe decides them.

    Raises LawError, ClusterError.
    """
    parse(name)  # a bad name is an error before the fit
    law = _fitted(
        points,
        report,
        form=form,
        group=group,
        size=size,
        bootstrap=bootstrap,
        seed=seed,
        priors=priors,
    )
    law = _with_audit(law, audited)
    if report is not None:
        report("storing the law in the tracker")
    registry = _registry(settings)
    version = registry.save(
        law,
        name,
        experiment=law_experiment(settings),
        by=_user(),
        sources=sources,
        configuration=configuration,
        audited=audited,
        stated=stated,
    )
    return Fitted(registry.load(f"{name}@{version}"), registry.champion(name))


def _with_audit(law: Law, audited: Sequence[AuditedPoint]) -> Law:
    """The law with what the audit of its recipe found: a recipe that leaves too much on the table is not healthy."""
    wrong, said = findings(audited)
    return replace(law, findings=(*wrong, *law.findings, *said), healthy=law.healthy and not wrong)


def _read(files: Files, rename: Mapping[str, str], group: str | None) -> tuple[PointsFile, str | None]:
    """The table of one or more files, and the column that it is resampled by: where a row is one of several of a run
    that is known to be such (escala's own runs, a trainer_state.json), run_id.
    """
    from escala.laws.files import read_points_file, together, with_constants

    read = together(
        [
            read_points_file(path, rename, [group] if group else [], constants)
            for path, constants in map(with_constants, [files] if isinstance(files, str | Path) else files)
        ]
    )
    group = read.understood["mapping"].get(group, group)  # --group may say the file's own name
    known = read.understood.get("runs_of_escala") or read.understood.get("checkpoints_of_runs")
    if (
        group is None
        and known
        and "run_id" in read.points
        and read.points["run_id"].dropna().duplicated().any()
    ):
        group = "run_id"
    return read, group


def _fitted(points: pd.DataFrame, report: Report | None, **settings: Any) -> Law:
    from escala.laws.fit import fit_law

    def progress(done: int, total: int) -> None:
        if report is not None:
            report(f"{done:,} of {total:,} bootstrap replicates")

    if report is not None:
        report(f"{len(points):,} points")
    return fit_law(points, progress=progress, **settings)


def _understood(law: Law, points: pd.DataFrame) -> dict[str, Any]:
    """What the fit made of the table."""
    derived = {}
    if "compute_flops" in law.ranges and "compute_flops" not in points:
        size = next(name for name in ("n_active", law.size, "n_total") if name in points)
        derived["compute_flops"] = f"6 {size} tokens"
    return {
        "form": law.form_name,
        "formula": law.form.formula,
        "size": law.size,
        "group": law.settings["group"],
        "derived": derived,
        "used": len(law.points),
        "first_rows": _first_rows(law),
    }


def _first_rows(law: Law) -> dict[str, dict[str, float]]:
    """The first rows as they were read: row -> {column of a law's points: value}."""
    rows = law.points[[*law.inputs, "loss_nats"]].head(FIRST_ROWS)
    return {
        str(row): {name: float(value) for name, value in rows.loc[row].items()} for row in rows.index.unique()
    }


def laws(settings: Settings, name: str | None = None) -> list[LawVersion]:
    """Every stored version, by name, newest first. Raises ClusterError, NotFoundError for an unknown name."""
    close_abandoned(settings)
    return _registry(settings).versions(name)


def close_abandoned(settings: Settings) -> None:
    """End the laws' runs in MLflow that a client which died left RUNNING. Raises ClusterError."""
    _registry(settings).close_abandoned(law_experiment(settings))


def law(settings: Settings, reference: str, refresh: bool = False) -> Stored:
    """A law with its provenance: NAME@VERSION, or NAME for the champion. Raises as `load_law`."""
    # Asked here before the registry, whose imports are a tenth of a query's time.
    known = None if refresh else Cache(settings.home, settings.tracker).find(parse(reference))
    return known or _registry(settings).load(reference, refresh=refresh)


def predict_law(
    settings: Settings, reference: str, at: Mapping[str, float], level: float = 0.9, refresh: bool = False
) -> Answer:
    """The loss at a point, `at` = {input: value}, with its predictive interval. A law of n_active that is asked with
    n_total alone (or the reverse) takes the model as dense, and says so.

    Raises LawError for a missing, unknown or impossible input, with what the law reads; and as `load_law`.
    """
    stored = law(settings, reference, refresh)
    asked, assumed = _dense(stored.law, at)
    return Answer(stored, stored.law.predict(level, **asked), asked, assumed)


def _dense(law: Law, point: Mapping[str, float]) -> tuple[dict[str, float], tuple[str, ...]]:
    other = {"n_active": "n_total", "n_total": "n_active"}.get(law.size)
    asked = dict(point)
    if SIZE in law.form.inputs and other in asked and law.size not in asked:
        asked[law.size] = asked[other]
        return asked, (f"a dense model: {law.size} = {other}",)
    return asked, ()


def compare_laws(settings: Settings, first: str, second: str) -> LawComparison:
    """Two laws side by side. Raises as `load_law`."""
    import numpy as np

    a, b = law(settings, first), law(settings, second)
    off = []
    for points in (a.law.points, b.law.points):
        first_N, second_N = (_curve(each.law, points) for each in (a, b))
        if first_N is None or second_N is None:
            return LawComparison(a, b, None, None)
        off.append(np.abs(second_N / first_N - 1))
    both = np.concatenate(off)
    return LawComparison(a, b, float(np.median(both)), float(both.max()))


def _curve(law: Law, points: pd.DataFrame) -> Floats | None:
    """The law's loss at points of another law, inputs that follow from theirs included; None where one is missing."""
    import numpy as np

    columns = {str(name): points[name].to_numpy() for name in points.columns}
    for each in law.form.derived:
        if each.input.name not in columns and set(each.sources) <= set(columns):
            columns[each.input.name] = each.compute(columns)
    if not set(law.inputs) <= set(columns):
        return None
    return law.curve({name: columns[name].astype(np.float64) for name in law.inputs})


def promote_law(settings: Settings, reference: str, force: bool = False) -> Stored:
    """Make NAME@VERSION its name's champion. Raises LawError for an unhealthy one without `force`."""
    return _registry(settings).promote(reference, force)


def calibration(settings: Settings, name: str | None = None) -> Calibration:
    """Predicted against obtained, for every run that finished while a law was champion (of `name`, or all)."""
    from escala.laws.drift import Predictions, calibration

    checks = Predictions(settings.home).read()
    return calibration([c for c in checks if name is None or name in (c.law, c.law.split("@")[0])])


def export_law(settings: Settings, reference: str, directory: str | Path) -> list[Path]:
    """law.json, provenance, points and plots into a new directory. Raises LawError where it is not empty."""
    from escala.laws.export import export

    stored = law(settings, reference)
    return export(stored.law, {"law": stored.reference, **stored.provenance}, Path(directory))


def plot_law(settings: Settings, reference: str, directory: str | Path) -> list[Path]:
    """The law's plots as PNG files in `directory`."""
    from escala.laws.plots import write_plots

    return write_plots(law(settings, reference).law, Path(directory))


def report_law(settings: Settings, reference: str, file: str | Path) -> Path:
    """The law's report as one HTML file; a file of that name is overwritten. Raises as `load_law`, LawError for a path
    that cannot be written.
    """
    from escala.laws.report import html

    stored = law(settings, reference)
    path = Path(file)
    text = html(stored.law, stored.reference, stored.provenance, _evidence(settings, stored))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LawError(
            f"{path} cannot be written: {error.strerror}.", "Choose another file: --to FILE.html."
        ) from error
    return path


def _evidence(settings: Settings, stored: Stored) -> TrackRecord:
    """What is known of a law besides its fit: its backtests, its sealed forecasts, and the runs that it foresaw."""
    from escala.laws.drift import Predictions
    from escala.laws.forecasts import Chain
    from escala.laws.report import ForecastLine, TrackRecord

    sealed = [f for f in Chain(settings.home).forecasts() if f.sealed.law == stored.reference]
    known = {f.score.run_id for f in sealed if f.score is not None}
    lines = [
        ForecastLine(
            f.sealed.name,
            f.sealed.sealed_at,
            f.factor,
            f.sealed.loss_nats,
            f.sealed.low_nats,
            f.sealed.high_nats,
            f.obtained_nats,
        )
        for f in sealed
    ]
    checks = [check for check in Predictions(settings.home).read() if check.law == stored.reference]
    lines += [
        ForecastLine(c.name, None, c.extrapolation, c.predicted, c.low, c.high, c.obtained)
        for c in checks
        if c.run_id not in known
    ]
    return TrackRecord(lines)


def law_experiment(settings: Settings) -> str:
    """The MLflow experiment of laws' runs: apart from the measured runs, which `escala runs list` shows."""
    return f"{settings.experiment}-laws"


def _registry(settings: Settings) -> Registry:
    from escala.laws.registry import Registry

    return Registry(settings.tracker, settings.home)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        return f"uid {os.getuid()}"
