"""`escala forecasts ...`: what laws said of runs before they started, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from escala.cli import render_forecasts, render_laws
from escala.cli.cluster import Json
from escala.cli.home import open_home

nouns = typer.Typer(help="Sealed forecasts: list, show, verify, plot.", no_args_is_help=True)
OfLaw = Annotated[str | None, typer.Argument(help="Only of this law, or of this NAME@VERSION.")]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    nouns.command("list")(list_)
    nouns.command()(show)
    nouns.command()(verify)
    nouns.command()(plot)
    app.add_typer(nouns, name="forecasts")


def list_(law: OfLaw = None, json: Json = False) -> None:
    """List the sealed forecasts, what their runs obtained, and how often the intervals held."""
    render_forecasts.forecasts(open_home().forecasts(law), json)


def show(forecast: Annotated[str, typer.Argument(help="The start of its id.")], json: Json = False) -> None:
    """Show one forecast in full: law, point, interval, recipe, code, time, and what came of it."""
    render_forecasts.forecast(open_home().forecast(forecast), json)


def verify(json: Json = False) -> None:
    """Check that no forecast was changed, removed or added in between, against the head that MLflow keeps."""
    found = open_home().verify_forecasts()
    render_forecasts.chain(found, json)
    if found.problems:
        raise typer.Exit(1)


def plot(
    law: OfLaw = None,
    to: Annotated[Path, typer.Option(help="The PNG file.")] = Path("forecasts.png"),
    json: Json = False,
) -> None:
    """Draw predicted against obtained, and the coverage by factor beyond the data."""
    render_laws.files([open_home().plot_forecasts(to, law)], json)
