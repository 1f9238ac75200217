"""`escala demo`: the main job, end to end, in minutes and without a GPU."""

from __future__ import annotations

import typer

from escala.cli import render


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(demo)


def demo() -> None:
    """Pretrain a small transformer with ZeRO-3 on two workers, on real text, and show the run."""
    from escala import api

    job = api.demo(report=render.note)
    render.submitted(job, False)
    ended = render.follow(api.watch(job.id))
    if ended.state != "succeeded":
        raise typer.Exit(1)
    record = api.run(job.id)
    render.demo(record, api.run_url(record))
