"""How a sweep's plan and its points look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escala.cli.render import as_json, duration, note, number, raw, table

if TYPE_CHECKING:
    from escala.views.sweeps import SweepPlanView, SweepPointsView


def plan(found: SweepPlanView, json: bool) -> None:
    """The trials, and what they cost together."""
    if json:
        as_json(found)
        return
    axes = list(dict.fromkeys(key for t in found.trials for key in t.values))
    columns = (*axes, "N", "D", "D/N", "T", "batch", "learning rate", "FLOPs")
    rows = []
    for t in found.trials[: 1 if found.optimised else None]:
        training = t.config["training"]
        facts = (
            number(t.n_total),
            number(t.train_tokens),
            f"{t.train_tokens / t.n_active:.1f}",
            number(t.context_tokens),
            number(training["batch_sequences"] * t.context_tokens),
            number(training["optimizer"]["learning_rate"]),
            number(t.compute_flops),
        )
        rows.append((*(number(t.values.get(key)) for key in axes), *facts))
    table(columns, rows)
    if found.optimised:
        raw(
            "an optimiser chooses; this is the middle of its space, and the cost counts each trial as one like it"
        )
    raw("")
    for key, why in found.chosen.items():
        raw(f"{key}: {why}")
    raw(f"trials    {len(found.trials)}")
    raw(f"tokens    {number(found.train_tokens)}")
    raw(f"FLOPs     {number(found.compute_flops)}")
    if found.trunks is not None:
        share = found.compute_flops / found.alone_flops
        raw(
            f"trunks    {found.trunks}, {share:.2f} of the {number(found.alone_flops)} FLOPs of the same runs alone"
        )
        if found.trunks < found.fewest_trunks:
            note(
                f"intervals of a law need {found.fewest_trunks} trunks: its points are resampled by trunk; "
                "add sizes, or seeds"
            )
    if found.wall_seconds is None:
        raw(f"time      as many trials at once as the cluster holds ({found.speed_source})")
    else:
        raw(
            f"time      about {duration(found.wall_seconds)}, {found.concurrency} trials at once ({found.speed_source})"
        )
    note("trials that a sweep of this home has finished are not trained again")


def points(found: SweepPointsView, json: bool) -> None:
    """How many points there are, the range that they span, and why others are none."""
    if json:
        as_json(found)
        return
    raw(f"points    {len(found.points)}")
    measure = found.measure
    if found.points:
        compute = [float(point["compute_flops"]) for point in found.points]
        raw(
            f"compute   {number(min(compute))} to {number(max(compute))} FLOPs ({max(compute) / min(compute):.0f}x)"
        )
        values = [float(value) for point in found.points if (value := point.get(measure.column)) is not None]
        low, high = min(values), max(values)
        worst, best = (low, high) if measure.higher_is_better else (high, low)
        unit = f" {measure.unit}" if measure.unit else ""
        raw(f"{measure.column.partition('_')[0]:<10}{worst:.4f} to {best:.4f}{unit}")
    if found.noise is not None:
        raw(f"noise     {found.noise:.2%} of the loss between seeds")
    for finding in found.audit:
        raw(f"audit     {finding.removeprefix('recipe audit at ')}")
    for row in found.refused:
        raw(f"refused   {row['name']}: {row['reason']}")
    if measure.fits_laws:
        note(f"next: escala laws fit --sweep {found.job_id} --name NAME")
