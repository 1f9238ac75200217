"""`escala laws ...`: fit a law to measured runs, keep it, and ask it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from escala.cli import progress, render, render_forecasts, render_laws
from escala.cli.cluster import Json
from escala.cli.home import open_home
from escala.contract.errors import LawError
from escala.laws.forms import FORMS
from escala.laws.priors import NAMED, read_priors

if TYPE_CHECKING:
    from escala.client import Escala
    from escala.views.laws import LawPreviewView

Name = Annotated[str, typer.Argument(help="NAME@VERSION, or NAME for its champion.")]
Refresh = Annotated[bool, typer.Option("--refresh", help="Ask the tracker which version is champion now.")]
nouns = typer.Typer(help="Scaling laws: fit, keep, ask.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    nouns.command()(fit)
    nouns.command("list")(list_)
    nouns.command()(show)
    nouns.command()(predict)
    nouns.command()(compare)
    nouns.command()(plot)
    nouns.command()(report)
    nouns.command()(export)
    nouns.command()(calibration)
    nouns.command()(promote)
    app.add_typer(nouns, name="laws")


def fit(
    name: Annotated[
        str | None, typer.Option(help="The law's name; its versions are counted from 1. Not for --dry-run.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="A sweep's job, by id or name (then the newest); several are put together."),
    ] = None,
    points: Annotated[
        list[str] | None,
        typer.Option(
            help="A CSV or JSON (of any tool, wandb, MLflow), or a trainer_state.json; may be repeated. "
            "FILE::n_active=1.2e8 states what a file does not say."
        ),
    ] = None,
    map_: Annotated[
        list[str] | None, typer.Option("--map", help="FILE_COLUMN=name, e.g. --map params=n_active.")
    ] = None,
    form: Annotated[str, typer.Option(help=f"One of: {', '.join(FORMS)}.")] = "nd",
    group: Annotated[
        str | None, typer.Option(help="Column of points that are not independent, e.g. run_id.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="The N of nd and ndt: n_active, n_total, n_non_embedding.")
    ] = "n_active",
    bootstrap: Annotated[
        int, typer.Option(help="Replicates behind the intervals; fewer than 20: none.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap; the fit depends on none.")] = 0,
    prior: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=MEAN,SD: a parameter's normal prior, e.g. alpha=0.35,0.1; of L_inf and coefficients on the log."
        ),
    ] = None,
    priors: Annotated[
        str | None, typer.Option(help=f"Of exponents, by name: {', '.join(NAMED)}; --prior goes over it.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show what was understood, what is refused, and the law; store nothing."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Fit a law to sweeps, or to a table of measured runs, and store it as the next version of its name."""
    if (not points) == (not sweep):
        raise LawError("A law is fitted to --sweep, or to --points.", "Give one of the two.")
    if map_ and not points:
        raise LawError(
            "--map renames the columns of --points; a sweep's need no renaming.", "Take --map out."
        )
    rename = _pairs(map_ or [])
    stated = read_priors(prior or [], priors)
    settings = {
        "form": form,
        "group": group,
        "size": size,
        "bootstrap": bootstrap,
        "seed": seed,
        "priors": stated or None,
    }
    if dry_run:
        render_laws.preview(_preview(open_home(), points or [], rename, sweep or [], settings), json)
        return
    if name is None:
        raise LawError("The law has no name to be stored under.", "Give --name NAME, or --dry-run.")
    escala = open_home()
    with progress.working("fitting") as now:
        if not points:
            found = escala.fit_sweeps(
                sweep or [], name, **settings, report=lambda text: now.update(facts=text)
            )
        else:
            found = escala.fit_file(
                points, name, rename=rename, **settings, report=lambda text: now.update(facts=text)
            )
    render_laws.fitted(found, json)


def _preview(
    escala: Escala, points: list[str], rename: dict[str, str], sweeps: list[str], settings: dict[str, Any]
) -> LawPreviewView:
    with progress.working("fitting") as now:
        if points:  # of a file: neither a database nor a tracker
            return escala.preview_file(
                points, rename=rename, **settings, report=lambda text: now.update(facts=text)
            )
        return escala.preview_sweeps(sweeps, **settings, report=lambda text: now.update(facts=text))


def list_(
    name: Annotated[str | None, typer.Argument(help="Only this law.")] = None, json: Json = False
) -> None:
    """List the stored laws, newest version first."""
    render_laws.laws(open_home().laws(name), json)


def show(law: Name, refresh: Refresh = False, json: Json = False) -> None:
    """Show a law: parameters with intervals, what is wrong with it, where it came from."""
    render_laws.law(open_home().law(law, refresh), json)


def predict(
    law: Name,
    n_total: Annotated[float | None, typer.Option(help="Parameters.")] = None,
    n_active: Annotated[float | None, typer.Option(help="Parameters that a token uses.")] = None,
    n_non_embedding: Annotated[float | None, typer.Option(help="Parameters without embeddings.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Training tokens D.")] = None,
    context_tokens: Annotated[float | None, typer.Option(help="Context length T.")] = None,
    capacity_factor: Annotated[float | None, typer.Option(help="Of a mixture of experts.")] = None,
    compute_flops: Annotated[float | None, typer.Option(help="C, for a law of form c.")] = None,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", help="Any input of the law's form: NAME=VALUE, e.g. energy_joules=1e9."),
    ] = None,
    level: Annotated[float, typer.Option(help="Of the predictive interval.")] = 0.9,
    seal: Annotated[
        bool, typer.Option("--seal", help="Seal it, at 90 %: the next run at this point scores it.")
    ] = False,
    refresh: Refresh = False,
    json: Json = False,
) -> None:
    """Predict the loss of a run, with its interval and how far that lies beyond the data."""
    given = {
        "n_total": n_total,
        "n_active": n_active,
        "n_non_embedding": n_non_embedding,
        "tokens": tokens,
        "context_tokens": context_tokens,
        "capacity_factor": capacity_factor,
        "compute_flops": compute_flops,
    }
    point = {name: value for name, value in given.items() if value is not None}
    escala, asked = open_home(), _merged(point, at or [])
    render_laws.prediction(escala.predict_law(law, asked, level, refresh), json)
    if seal:
        with progress.reporting("sealing", json) as report:
            made = escala.seal_point(law, asked, report)
        render_forecasts.sealed(made)


def compare(first: Name, second: Name, json: Json = False) -> None:
    """Show two laws side by side, and how much their losses disagree."""
    render_laws.comparison(open_home().compare_laws(first, second), json)


def plot(
    law: Name,
    to: Annotated[Path, typer.Option(help="Directory for the PNG files.")] = Path("plots"),
    json: Json = False,
) -> None:
    """Draw a law: loss along each input, residuals, IsoFLOP curves, allocation."""
    render_laws.files(open_home().plot_law(law, to), json)


def report(
    law: Name,
    to: Annotated[
        Path | None, typer.Option(help="The file; NAME-VERSION.html where this is left out.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a law as one HTML file that can be mailed: intervals, health, backtest, forecasts, plots, provenance."""
    escala = open_home()
    file = to or Path(escala.law(law).law.replace("@", "-") + ".html")
    with progress.working("backtesting and drawing"):
        written = escala.report_law(law, file)
    render_laws.files([written], json)


def export(law: Name, to: Annotated[Path, typer.Option(help="A new directory.")], json: Json = False) -> None:
    """Write law.json, provenance, points and plots into a new directory."""
    render_laws.files(open_home().export_law(law, to), json)


def calibration(
    name: Annotated[str | None, typer.Argument(help="Only this law, or this NAME@VERSION.")] = None,
    json: Json = False,
) -> None:
    """Compare what the laws predicted with what finished runs obtained."""
    render_laws.calibration(open_home().calibration(name), json)


def promote(
    law: Annotated[str, typer.Argument(help="NAME@VERSION.")],
    force: Annotated[bool, typer.Option("--force", help="Though the law is not healthy.")] = False,
    json: Json = False,
) -> None:
    """Make a version the champion of its name: the one that NAME alone means."""
    promoted = open_home().promote_law(law, force)
    if json:
        render_laws.law(promoted, json)
    else:
        render.note(f"{promoted.law} is champion")


def _merged(point: dict[str, float], at: list[str]) -> dict[str, float]:
    """The point with what --at says. Raises LawError for an input that is given twice, and for what is no number."""
    merged = dict(point)
    for text in at:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise LawError(f"--at '{text}' is not NAME=VALUE.", "For example --at tokens=2e10.")
        if name in merged:
            raise LawError(f"{name} is given twice.", "Give it once, by its own option or by --at.")
        try:
            merged[name] = float(value)
        except ValueError as error:
            raise LawError(f"--at {name}={value} is no number.", "For example --at tokens=2e10.") from error
    return merged


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = dict[str, str]()
    for text in texts:
        old, equals, new = (part.strip() for part in text.rpartition("="))  # a file's name may hold "="
        if not (old and equals and new):
            raise LawError(f"--map '{text}' is not FILE_COLUMN=name.", "For example --map params=n_active.")
        if old in pairs:
            raise LawError(
                f"--map names the file's column {old} twice: as {pairs[old]} and as {new}.", "Give it once."
            )
        pairs[old] = new
    return pairs
