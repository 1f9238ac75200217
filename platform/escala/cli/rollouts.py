"""`escala rollouts ...`: the service that generates for PPO, judges, and speaks OpenAI's HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from escala.cli import progress, render, render_rollouts
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
    nouns.command()(tune)
    nouns.command()(replay)
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
    governor: Annotated[
        Path | None,
        typer.Option(help="Keep the latency as this file says: `escala rollouts tune` writes it."),
    ] = None,
    json: Json = False,
) -> None:
    """Start the service, or bring it to this configuration. Loopback only, unless ESCALA_ROLLOUTS_TOKEN is set."""
    found = open_home().rollouts_up(files or [], set_ or [], name, render.note, code, governor)
    render_rollouts.status(found, json)


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


def tune(
    target_seconds: Annotated[float, typer.Option(help="The 95th percentile of latency to be kept.")],
    to: Annotated[Path, typer.Option(help="The governor's file, a new one.")],
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Asked at once, all the time. [default: two batches of all replicas]"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 16,
    response_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 32,
    seconds: Annotated[float, typer.Option(min=10, help="Before the step, and after it.")] = 60.0,
    window_seconds: Annotated[float, typer.Option(min=0.5, help="The governor's sampling period.")] = 2.0,
    kp: Annotated[
        float | None, typer.Option(help="Your own gain, to be checked. [default: a safe one]")
    ] = None,
    ki: Annotated[float | None, typer.Option(help="Likewise, of the sum.")] = None,
    name: Name = "escala",
    json: Json = False,
) -> None:
    """Load the running service, add replicas, and find gains that are stable on what that shows."""
    from escala.rollouts.tuning import TuneOptions

    options = TuneOptions(
        target_seconds, requests, prompt_tokens, response_tokens, seconds, window_seconds, kp, ki
    )
    with progress.reporting("testing the service", json) as report:
        found = open_home().rollouts_tune(options, to, name, report)
    render_rollouts.tuned(found, json)


def replay(
    trace: Annotated[Path, typer.Argument(help="Requests: a CSV, or a seeded trace as YAML.")],
    governor: Annotated[Path, typer.Option(help="What `escala rollouts tune` wrote.")],
    min_: Annotated[int, typer.Option("--min", help="Replicas at least.")] = 1,
    max_: Annotated[int, typer.Option("--max", help="Replicas at most.")] = 2,
    json: Json = False,
) -> None:
    """Simulate a service on a trace, with the governor and with the scaling policy alone. Needs no cluster."""
    render_rollouts.replayed(open_home().rollouts_replay(trace, governor, min_, max_), json)


def down(name: Name = "escala") -> None:
    """Remove the service; what it is generating is finished first."""
    open_home().rollouts_down(name, render.note)
