"""`escala sweep`: many runs over a space, as one job."""

from __future__ import annotations

from typing import Annotated

import typer

from escala.cli import progress, render, render_sweeps
from escala.cli.cluster import Json
from escala.cli.home import open_home
from escala.cli.jobs import Code, DryRun, Follow, Key, Overrides, followed
from escala.contract.errors import SpecError


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(sweep)


def _spaces(incomplete: str) -> list[str]:
    """The named spaces that begin so, for the shell's completion."""
    from escala.sweeps.space import names

    return [name for name in names() if name.startswith(incomplete)]


def sweep(
    space: Annotated[
        str,
        typer.Argument(help="A named space (tune_spaces/), or a YAML file's path.", autocompletion=_spaces),
    ],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="The job's name. [default: the space's]")] = None,
    priority: Annotated[int | None, typer.Option(help="0-100, higher first. [default: 50]")] = None,
    retries: Annotated[
        int | None, typer.Option(help="After a lost driver, worker or node. [default: 2]")
    ] = None,
    after: Annotated[str | None, typer.Option(help="A job that must succeed first.", metavar="JOB")] = None,
    max_flops: Annotated[float | None, typer.Option(help="Budget over all attempts.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Budget over all attempts.")] = None,
    idempotency_key: Key = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the last interrupted sweep of this space.")
    ] = False,
    audit: Annotated[
        bool,
        typer.Option("--audit", help="Also the largest point at half and twice the recipe's learning rate."),
    ] = False,
    audit_horizon: Annotated[
        float | None,
        typer.Option(help="With --audit: also at so many times its tokens, e.g. 3.", metavar="TIMES"),
    ] = None,
    seal: Annotated[
        str | None,
        typer.Option(help="Seal what this law says of every trial before it starts.", metavar="LAW"),
    ] = None,
    code: Code = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train a model at every point of a space; what any sweep has finished before is not trained again."""
    if audit_horizon is not None and not audit:
        raise SpecError("--audit-horizon says how far an audit goes", "add --audit")
    if audit:
        horizon = "null" if audit_horizon is None else f"{audit_horizon:g}"
        overrides = [*(overrides or ()), f"audit={{horizon: {horizon}}}"]
    escala = open_home()
    options = {
        "name": name,
        "priority": priority,
        "retries": retries,
        "after": after,
        "max_flops": max_flops,
        "max_seconds": max_seconds,
        "idempotency_key": idempotency_key,
    }
    if dry_run:
        render_sweeps.plan(escala.plan_sweep(space, overrides or (), code, options), json)
        return
    with progress.reporting("submitting", json) as report:
        job = escala.sweep(space, overrides or (), options, resume, report, code, seal)
    render.submitted(job, json)
    if follow:
        ended = followed(escala, job.id, json)
        render_sweeps.points(escala.sweep_points(job.id), json)
        if ended.state != "succeeded":
            raise typer.Exit(1)
