"""`escala demo law`: from a sweep to a law, to a plan, to the planned run, in minutes and without a GPU."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from escala.cli import demo_rlhf, progress, render, render_laws, render_plans, render_sweeps
from escala.cli.home import open_home
from escala.cli.jobs import follow_job
from escala.contract.errors import LawError

SPACE, LAW = "smoke", "demo"
AHEAD = 10  # the planned run's compute, in that of the sweep's largest trial
WORKERS = 2


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(demo)


class Story(StrEnum):
    """What the demo shows."""

    law = "law"
    rlhf = "rlhf"


def demo(
    story: Annotated[
        Story, typer.Argument(help="law: from a sweep to a planned run; rlhf: a policy learns from raters.")
    ] = Story.law,
) -> None:
    """Show one of the platform's journeys on a tiny scale, in minutes and without a GPU."""
    if story == Story.rlhf:
        demo_rlhf.run()
    else:
        run()


def run() -> None:
    """Sweep tiny models, fit a law, plan a run of ten times the compute, train it by ZeRO-3, and compare."""
    from escala.planning.limits import Limits

    escala = open_home()
    render.step(f"1. the sweep {SPACE}")
    with progress.reporting("submitting", False) as report:
        sweep = escala.sweep(SPACE, report=report)
    follow_job(escala, sweep.id)
    points = escala.sweep_points(sweep.id)
    render_sweeps.points(points, False)

    render.step("2. the law")
    with progress.working("fitting the law"):
        fitted = escala.fit_sweeps([sweep.id], LAW)
    render_laws.fitted(fitted, False)

    budget = AHEAD * max(float(point["compute_flops"]) for point in points.points)
    law = fitted.law
    render.step(f"3. the plan: {AHEAD} times the compute of the largest trial, {render.number(budget)} FLOPs")
    try:
        render_plans.plan(escala.plan_law(law, Limits(compute_flops=budget)), False)
    except LawError as refusal:
        render_laws.refusal(refusal)
        return

    render.step(f"4. the run: ZeRO-3 on {WORKERS} workers")
    with progress.reporting("submitting", False) as report:
        job = escala.submit(
            "pretrain",
            overrides=[f"resources.workers={WORKERS}"],
            options={"name": LAW},
            report=report,
            compute_flops=budget,
            law=law,
            base=escala.space_base(SPACE),
        )
    follow_job(escala, job.id)
    with progress.working("waiting for the run's record in MLflow"):
        record = escala.finished_run(job.id)

    render.step("5. predicted and obtained")
    size, tokens = float(record.n_active or 0), float(record.train_tokens or 0)
    render_laws.verdict(escala.predict_law(law, {"n_active": size, "tokens": tokens}), record)
