"""`escala export` and `escala runs list | show | compare | open`: what happened, from the tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from escala.cli import render
from escala.cli.cluster import Json

Run = Annotated[str, typer.Argument(help="A run's id (or its start), or a job's id or name (its last run).")]
nouns = typer.Typer(help="Runs in the tracker: one for each attempt of a job.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(export)
    nouns.command("list")(list_)
    nouns.command()(show)
    nouns.command()(compare)
    nouns.command("open")(open_)
    app.add_typer(nouns, name="runs")


def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="A new directory.", metavar="DIR")],
    json: Json = False,
) -> None:
    """Write a run's newest good checkpoint and tokenizer in Hugging Face's format."""
    from escala import api

    render.exported(api.export(run, to), json)


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
    from escala import api

    render.runs(api.runs(job=job, workload=workload, status=status, name=name, limit=limit), json)


def show(run: Run, json: Json = False) -> None:
    """Show one run's record."""
    from escala import api

    record = api.run(run)
    render.run(record, api.run_url(record), json)


def compare(runs: Annotated[list[str], typer.Argument(help="Two or more runs.")], json: Json = False) -> None:
    """Show where the records and configurations of several runs differ."""
    from escala import api

    render.comparison(api.compare(runs), json)


def open_(run: Run) -> None:
    """Print a run's address in MLflow, and open it where there is a browser."""
    from escala import api

    url = api.run_url(api.run(run))
    render.raw(url)
    typer.launch(url)
