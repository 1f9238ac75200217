"""`escala up | down | status`: the embedded head, tracker and reconcile loop."""

from __future__ import annotations

from typing import Annotated

import typer

from escala.cli import progress, render
from escala.cli.home import open_home

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(up)
    app.command()(down)
    app.command()(status)


def up(json: Json = False) -> None:
    """Start what is missing: Ray head, MLflow server, reconcile loop, its watchdog. Safe to repeat."""
    with progress.reporting("starting the cluster", json) as report:
        found = open_home().up(report=report)
    render.cluster(found, json)


def down() -> None:
    """Stop the processes that `up` started; queued jobs and all history stay."""
    with progress.reporting("stopping the cluster", False) as report:
        open_home().down(report=report)


def status(json: Json = False) -> None:
    """Show each process, its address and whether it answers."""
    render.cluster(open_home().status(), json)
