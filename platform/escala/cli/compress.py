"""`escala compress`: a model in fewer bits, within a loss budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from escala.cli import progress, render
from escala.cli.cluster import Json
from escala.cli.home import open_home
from escala.cli.jobs import Follow, Overrides, follow_job


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command()(compress)


def compress(
    model: Annotated[
        str, typer.Argument(help="A job's id or name, a run's id, or a model's path.", metavar="RUN|DIR")
    ],
    loss_budget: Annotated[
        list[float] | None,
        typer.Option(
            help="Nats a token that may be lost; again for several, of which the smallest one's model is written. "
            "[default: measure only]",
            metavar="NATS",
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option("--for", help="bytes or joules (by the cluster's coefficients): what is made least."),
    ] = "bytes",
    text: Annotated[
        Path | None, typer.Option(help="A text file to measure on. [default: the run's own held-out text]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens to measure on. [default: 4,096]")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="hqq or round: how codes below 8 bits are chosen. [default: hqq]")
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale: 32 or 128. [default: 32; at 8 bits all]")
    ] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="For people; need not be unique.")] = None,
    follow: Follow = False,
    json: Json = False,
) -> None:
    """Say what a model's matrices hold, and write it in the fewest bits within a loss budget."""
    escala = open_home()
    stated = {"tokens": tokens, "method": method, "group": group, "text": None if text is None else str(text)}
    asked = {
        "objective": objective,
        "loss_budgets": loss_budget or [],
        **{key: value for key, value in stated.items() if value is not None},
    }
    with progress.reporting("submitting", json) as report:
        job = escala.compress(model, asked, overrides or (), {"name": name}, report)
    render.submitted(job, json)
    if follow:
        follow_job(escala, job.id, json)
