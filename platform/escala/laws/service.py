"""What `escala laws` and notebooks ask: fit a file and store it, predict, compare. `escala.api` re-exports
it; the CLI imports it from here, since a query should not wait for the rest of the API.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala.errors import LawError, NotFoundError
from escala.laws.law import Law, Prediction
from escala.laws.reference import Cache, Stored, parse
from escala.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from escala.laws.drift import Calibration
    from escala.laws.registry import LawVersion, Registry

KNOWN = (
    "loss_nats",
    "n_total",
    "n_active",
    "n_non_embedding",
    "tokens",
    "context_tokens",
    "capacity_factor",
    "compute_flops",
    "energy_joules",
    "run_id",
    "tokenizer_fingerprint",
    "evaluation_fingerprint",
)
RUN_COLUMNS = {"held_out_loss_nats": "loss_nats", "train_tokens": "tokens"}  # of a RunRecord
RUN_LABELS = ("job_id", "name", "seed")


@dataclass(frozen=True)
class Fitted:
    """A law just stored, and which version of its name is champion now (None: no healthy one yet)."""

    stored: Stored
    champion: int | None


@dataclass(frozen=True)
class Answer:
    """A prediction with the law that gave it. `assumed`: what the question left open."""

    law: Stored
    answer: Prediction
    assumed: tuple[str, ...]

    @property
    def extrapolation(self) -> dict[str, float]:
        """Per input, the factor beyond the data; 1 is inside."""
        return self.answer.extrapolation

    def plain(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        answer, law = asdict(self.answer), self.law.law
        answer["farthest"] = max(self.extrapolation.values(), default=1.0)
        return {
            "law": self.law.reference,
            **answer,
            "assumed": list(self.assumed),
            "healthy": law.healthy,
            "findings": list(law.findings),
        }


@dataclass(frozen=True)
class Comparison:
    """Two laws side by side. `disagreement`: the median of |B/A - 1| over both laws' points; None where one of
    them lacks an input of the other. Parameters can differ much while the losses agree.
    """

    first: Stored
    second: Stored
    disagreement: float | None
    largest_disagreement: float | None


def fit_file(
    file: str | Path,
    name: str,
    *,
    rename: Mapping[str, str] | None = None,
    form: str = "nd",
    group: str | None = None,
    size: str = "n_active",
    bootstrap: int = 1000,
    seed: int = 0,
) -> Fitted:
    """Fit a law to the table in `file` (CSV, or JSON: a list of records) and store it as the next version of
    `name`.

    Args:
        rename: {column of the file: column of a law's points}, e.g. {"params": "n_active"}.
        form, group, size, bootstrap, seed: see `fit_law`.

    Raises NotFoundError, LawError, ClusterError.
    """
    points, source = read_points_file(file, rename or {})
    return fit_points(
        points, name, sources=[source], form=form, group=group, size=size, bootstrap=bootstrap, seed=seed
    )


def fit_points(
    points: pd.DataFrame,
    name: str,
    *,
    sources: Sequence[str],
    form: str = "nd",
    group: str | None = None,
    size: str = "n_active",
    bootstrap: int = 1000,
    seed: int = 0,
    configuration: Mapping[str, str] | None = None,
) -> Fitted:
    """Fit a law to `points` and store it as the next version of `name`.

    Args:
        sources: where the points came from, in words.
        form, group, size, bootstrap, seed: see `fit_law`.
        configuration: what all points share, dotted keys; a drift alarm compares a run with it.

    Raises LawError, ClusterError.
    """
    from escala.laws.fit import fit_law

    parse(name)  # a bad name is an error before the fit
    law = fit_law(points, form, bootstrap=bootstrap, group=group, size=size, seed=seed)
    settings = Settings()
    registry = _registry(settings)
    version = registry.save(
        law,
        name,
        experiment=law_experiment(settings),
        by=_user(),
        sources=sources,
        configuration=configuration,
    )
    return Fitted(registry.load(f"{name}@{version}"), registry.champion(name))


def read_points_file(file: str | Path, rename: Mapping[str, str]) -> tuple[pd.DataFrame, str]:
    """The table, its columns renamed, and where it came from: its name and the start of its SHA-256.

    Raises NotFoundError for an absent file, LawError for one that is no table or lacks a column to rename.
    """
    import pandas as pd

    path = Path(file)
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", "give a CSV, or what `escala runs list --json` wrote")
    try:
        if path.suffix == ".json":
            frame = _points_of_runs(pd.DataFrame(json.loads(path.read_text())))
        else:
            frame = pd.read_csv(path)
    except (ValueError, AttributeError) as error:  # pandas' parser errors are ValueErrors
        said = str(error).splitlines()[0]
        raise LawError(f"{path} is no table: {said}.", "A CSV with a header, or a JSON list.") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return _renamed(frame, rename), f"{path.name} sha256={digest}"


def _points_of_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The points of `escala runs list --json`; another table is left as it is.

    What a run measured besides its loss (seconds, memory, training loss) goes: no law is a function of it. Raises
    LawError where a run did not succeed: its loss is not that of its planned tokens.
    """
    if not {"workload", "status", *RUN_COLUMNS} <= set(frame.columns):
        return frame
    bad = frame["status"][frame["status"] != "succeeded"]
    if len(bad):
        raise LawError(
            f"{len(bad)} of {len(frame)} runs did not succeed ({', '.join(sorted(set(bad)))}).",
            "`escala runs list --status succeeded --json` leaves them out.",
        )
    frame = frame.rename(columns=RUN_COLUMNS).dropna(axis="columns", how="all")
    return frame[[name for name in (*KNOWN, *RUN_LABELS) if name in frame]]


def _renamed(frame: pd.DataFrame, rename: Mapping[str, str]) -> pd.DataFrame:
    columns = [str(name) for name in frame.columns]
    for old, new in rename.items():
        if old not in columns:
            if new in columns and old in KNOWN:
                raise LawError(
                    f"The file has no column '{old}'.", f"The file's name first: --map {new}={old}"
                )
            near = get_close_matches(old, columns, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(columns)}"
            raise LawError(f"The file has no column '{old}'.", hint)
        if new not in KNOWN:
            near = get_close_matches(new, KNOWN, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"they are: {', '.join(KNOWN)}"
            raise LawError(f"A law's points have no column '{new}'.", hint)
        if new in columns and new not in rename:
            raise LawError(f"The file has a column '{new}' already.", "Take that column out first.")
    return frame.rename(columns=dict(rename))


def laws(name: str | None = None) -> list[LawVersion]:
    """Every stored version, by name, newest first. Raises ClusterError, NotFoundError for an unknown name."""
    return _registry(Settings()).versions(name)


def law(reference: str, refresh: bool = False) -> Stored:
    """A law with its provenance: NAME@VERSION, or NAME for the champion. Raises as `load_law`."""
    settings = Settings()
    # Asked here before the registry, whose imports are a tenth of a query's time.
    known = None if refresh else Cache(settings.home, settings.tracker).find(parse(reference))
    return known or _registry(settings).load(reference, refresh=refresh)


def predict_law(reference: str, level: float = 0.9, refresh: bool = False, **point: float) -> Answer:
    """The loss at a point with its predictive interval. A law of n_active that is asked with n_total alone (or
    the reverse) takes the model as dense, and says so.

    Raises LawError for a missing or impossible input, and as `load_law`.
    """
    stored = law(reference, refresh)
    asked, assumed = _dense(stored.law, point)
    return Answer(stored, stored.law.predict(level, **asked), assumed)


def _dense(law: Law, point: Mapping[str, float]) -> tuple[dict[str, float], tuple[str, ...]]:
    other = {"n_active": "n_total", "n_total": "n_active"}.get(law.size)
    asked = dict(point)
    if "size" in law.form.columns and other in asked and law.size not in asked:
        asked[law.size] = asked[other]
        return asked, (f"a dense model: {law.size} = {other}",)
    return asked, ()


def compare_laws(first: str, second: str) -> Comparison:
    """Two laws side by side. Raises as `load_law`."""
    import numpy as np

    a, b = law(first), law(second)
    off = []
    for points in (a.law.points, b.law.points):
        needed = {each.size if c == "size" else c for each in (a.law, b.law) for c in each.form.columns}
        if not needed <= set(points.columns):
            return Comparison(a, b, None, None)
        columns = {name: points[name].to_numpy(np.float64) for name in needed}
        off.append(np.abs(b.law.curve(columns) / a.law.curve(columns) - 1))
    both = np.concatenate(off)
    return Comparison(a, b, float(np.median(both)), float(both.max()))


def promote_law(reference: str, force: bool = False) -> Stored:
    """Make NAME@VERSION its name's champion. Raises LawError for an unhealthy one without `force`."""
    return _registry(Settings()).promote(reference, force)


def calibration(name: str | None = None) -> Calibration:
    """Predicted against obtained, for every run that finished while a law was champion (of `name`, or all)."""
    from escala.laws.drift import Predictions, calibration

    checks = Predictions(Settings().home).read()
    return calibration([c for c in checks if name is None or name in (c.law, c.law.split("@")[0])])


def export_law(reference: str, directory: str | Path) -> list[Path]:
    """law.json, provenance, points and plots into a new directory. Raises LawError where it is not empty."""
    from escala.laws.export import export

    stored = law(reference)
    return export(stored.law, {"law": stored.reference, **stored.provenance}, Path(directory))


def plot_law(reference: str, directory: str | Path) -> list[Path]:
    """The law's plots as PNG files in `directory`."""
    from escala.laws.plots import write_plots

    return write_plots(law(reference).law, Path(directory))


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
