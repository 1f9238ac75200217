"""`escala runs list | show | compare | samples | open`: what happened, from the tracker."""

from __future__ import annotations

from typing import Annotated

import typer

from escala.cli import render
from escala.cli.cluster import Json
from escala.cli.home import open_home

Run = Annotated[str, typer.Argument(help="A run's id (or its start), or a job's id or name (its last run).")]
nouns = typer.Typer(help="Runs in the tracker: one for each attempt of a job.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    nouns.command("list")(list_)
    nouns.command()(show)
    nouns.command()(compare)
    nouns.command()(samples)
    nouns.command("open")(open_)
    app.add_typer(nouns, name="runs")


def list_(
    job: Annotated[str | None, typer.Option(help="Only the runs of this job (id or name).")] = None,
    workload: Annotated[str | None, typer.Option(help="Only this workload.")] = None,
    status: Annotated[
        str | None, typer.Option(help="Only runs that ended so: succeeded, diverged, ...")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only runs of this name.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, newest first.")] = 50,
    json: Json = False,
) -> None:
    """List runs, newest first."""
    render.runs(open_home().runs(job=job, workload=workload, status=status, name=name, limit=limit), json)


def show(run: Run, json: Json = False) -> None:
    """Show one run's record."""
    render.run(open_home().run(run), json)


def compare(runs: Annotated[list[str], typer.Argument(help="Two or more runs.")], json: Json = False) -> None:
    """Show where the records and configurations of several runs differ."""
    render.comparison(open_home().compare(runs), json)


def samples(
    run: Run,
    last: Annotated[int | None, typer.Option(help="Only so many, the newest.")] = None,
    json: Json = False,
) -> None:
    """Show what the policy of a `ppo` run said, and what it was rewarded with."""
    render.samples(open_home().samples(run, last), json)


def open_(run: Run) -> None:
    """Print a run's address in MLflow, and open it where there is a browser."""
    url = open_home().run_url(run)
    render.page(url, "")
    typer.launch(url)
