"""`escala demo law`: from a sweep to a law, to a plan, to the planned run, in minutes and without a GPU."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from escala.cli import demo_rlhf, progress, render, render_laws, render_plans, render_sweeps
from escala.cli.home import open_home
from escala.cli.jobs import follow_job
from escala.contract.errors import LawError

if TYPE_CHECKING:
    from escala.client import Escala
    from escala.views.laws import PredictionView
    from escala.views.run_records import RunDetailsView
    from escala.views.sweeps import DemoSpaceView

LAW = "demo"
RUN = ("training.zero_stage=0", "training.checkpoint_every_steps=0")  # one worker, as in a trial


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
    minutes: Annotated[
        float, typer.Option(min=2, help="law: choose sizes that fit into so many minutes.")
    ] = 6.0,
    seed: Annotated[int, typer.Option(min=0, help="law: of weights and of the order of the data.")] = 0,
) -> None:
    """Show one of the platform's journeys on a tiny scale, in minutes and without a GPU."""
    if story == Story.rlhf:
        demo_rlhf.run()
    else:
        run(minutes, seed)


def run(minutes: float, seed: int) -> None:
    """Measure the machine, sweep tiny models, fit a law, plan a run of four times the largest trial's compute, train
    it, and compare. Exits with 1 where a run fails, or the law refuses to plan.
    """
    began, escala = time.monotonic(), open_home()
    space = _sizes(escala, minutes, seed)
    law, budget = _sweep_and_fit(escala, space)
    _plan(escala, law, budget)
    record = _planned_run(escala, space, law, budget)
    _compare(escala, law, record)
    render.raw(f"took            {render.duration(time.monotonic() - began)}")


def _sizes(escala: Escala, minutes: float, seed: int) -> DemoSpaceView:
    """Step 1."""
    render.step("1. this machine, measured for a few seconds")
    with progress.working("training two small models in two processes at once"):
        space = escala.demo_space(minutes, seed)
    render.raw(
        f"speed     {space.small_flops_per_second / 1e9:.1f} to {space.large_flops_per_second / 1e9:.1f} GFLOP/s "
        f"in each of two processes, which had {space.core_share:.0%} of a core each"
    )
    render.raw(
        f"sizes     {space.trials} runs, {render.number(space.compute_flops)} FLOPs, the largest "
        f"{render.number(space.largest_flops)}; about {render.duration(space.wall_seconds)} in all"
    )
    if not space.fits:
        render.warning(
            f"on this machine, as busy as it is, that is more than {minutes:g} minutes: smaller runs would be too "
            "short to follow one law"
        )
    render.raw(
        "text      Python source of packages at fixed versions, the same on every machine; a law of your text needs"
    )
    render.raw("          runs on your text")
    return space


def _sweep_and_fit(escala: Escala, space: DemoSpaceView) -> tuple[str, float]:
    """Steps 2 and 3; the law, and the planned run's budget in FLOPs."""
    from escala.sweeps import demo_space

    render.step(f"2. the sweep: {space.trials} models, two at a time")
    with progress.reporting("submitting", False) as report:
        sweep = escala.sweep(demo_space.NAME, space.overrides, report=report)
    follow_job(escala, sweep.id)
    points = escala.sweep_points(sweep.id)
    render_sweeps.points(points, False)

    render.step("3. the law")
    with progress.working("fitting the law"):
        fitted = escala.fit_sweeps([sweep.id], LAW, form=demo_space.FORM, priors=demo_space.PRIORS)
    render_laws.fitted(fitted, False)
    return fitted.law, demo_space.PLANNED * max(float(point["compute_flops"]) for point in points.points)


def _plan(escala: Escala, law: str, budget: float) -> None:
    """Step 4. Exits with 1, and says how to go on, where the law refuses."""
    from escala.planning.limits import Limits
    from escala.sweeps import demo_space

    render.step(
        f"4. the plan: {demo_space.PLANNED:g} times the compute of the largest trial, {render.number(budget)} FLOPs"
    )
    try:
        plan = escala.plan_law(law, Limits(compute_flops=budget))
    except LawError as refusal:
        render_laws.refusal(refusal)
        render.raw(f"next            escala laws show {law}; escala demo law --minutes 12")
        raise typer.Exit(1) from None
    render_plans.plan(plan, False)


def _planned_run(escala: Escala, space: DemoSpaceView, law: str, budget: float) -> RunDetailsView:
    """Step 5: the forecast is sealed as the run is submitted, before it starts."""
    from escala.sweeps import demo_space

    render.step("5. the run, on one worker: a model of this size is too small for ZeRO-3 to save anything")
    with progress.reporting("submitting", False) as report:
        job = escala.submit(
            "pretrain",
            overrides=list(RUN),
            options={"name": LAW},
            report=report,
            compute_flops=budget,
            law=law,
            seal=True,
            base=escala.space_base(demo_space.NAME, space.overrides),
        )
    follow_job(escala, job.id)
    with progress.working("waiting for the run's record in MLflow"):
        return escala.finished_run(job.id)


def _compare(escala: Escala, law: str, record: RunDetailsView) -> None:
    """Step 6."""
    render.step("6. predicted and obtained")
    at = {
        "n_active": float(record.n_active or 0),
        "tokens": float(record.train_tokens or 0),
        "compute_flops": float(record.compute_flops or 0),
    }
    found = escala.predict_law(law, at)
    render_laws.verdict(found, record)
    render.raw(f"verdict         {_verdict(found, record)}")


def _verdict(found: PredictionView, record: RunDetailsView) -> str:
    """In a sentence, whatever it is."""
    loss, low, high = record.held_out_loss_nats, found.low_nats, found.high_nats
    if loss is None or low is None or high is None:
        return "there is none: the run has no held-out loss, or the law no interval"
    width, error = (high - low) / found.loss_nats, loss / found.loss_nats - 1
    which = "a healthy law" if found.healthy else "a law that is NOT HEALTHY"
    where = "inside" if low <= loss <= high else "OUTSIDE"
    return f"{which} was {abs(error):.1%} off, and the loss is {where} its 90 % interval, {width:.1%} wide"
