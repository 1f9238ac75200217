"""`escala rollouts ...`: the service that generates for PPO, judges, and speaks OpenAI's HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from escala.cli import render, render_rollouts
from escala.cli.cluster import Json
from escala.cli.home import open_home
from escala.cli.jobs import Code

Name = Annotated[str, typer.Option(help="The service's name on the cluster.")]
nouns = typer.Typer(help="Rollouts: a policy served, with versions of its weights.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    nouns.command()(up)
    nouns.command()(status)
    nouns.command()(scale)
    nouns.command()(down)
    app.add_typer(nouns, name="rollouts")


def up(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Serve configuration files; `serve deploy` takes them too.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the arguments, e.g. model=DIRECTORY.")
    ] = None,
    name: Name = "escala",
    code: Code = None,
    json: Json = False,
) -> None:
    """Start the service, or bring it to this configuration. Loopback only, unless ESCALA_ROLLOUTS_TOKEN is set."""
    render_rollouts.status(open_home().rollouts_up(files or [], set_ or [], name, render.note, code), json)


def status(name: Name = "escala", json: Json = False) -> None:
    """Show the service: address, replicas, bounds, weights."""
    render_rollouts.status(open_home().rollouts_status(name), json)


def scale(
    min_: Annotated[int | None, typer.Option("--min", help="Replicas at least; 0: none when idle.")] = None,
    max_: Annotated[int | None, typer.Option("--max", help="Replicas at most.")] = None,
    requests: Annotated[
        float | None, typer.Option(help="Requests that one replica serves well at once.")
    ] = None,
    name: Name = "escala",
    json: Json = False,
) -> None:
    """Move the bounds between which the scaling policy sets the number of replicas."""
    render_rollouts.status(open_home().rollouts_scale(min_, max_, requests, name), json)


def down(name: Name = "escala") -> None:
    """Remove the service; what it is generating is finished first."""
    open_home().rollouts_down(name, render.note)
