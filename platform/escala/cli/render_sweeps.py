"""How a sweep's plan and its points look. With render.py and render_laws.py the only modules that print."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import TYPE_CHECKING

from escala.cli.render import as_json, duration, note, number, raw, table
from escala.laws.files import REFUSAL

if TYPE_CHECKING:
    from escala.sweeps.plan import SweepPlan
    from escala.sweeps.points import SweepPoints


def plan(found: SweepPlan, json: bool) -> None:
    """The trials, and what they cost together."""
    if json:
        as_json(asdict(found))
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
    raw(f"trials    {len(found.trials)}")
    raw(f"tokens    {number(found.train_tokens)}")
    raw(f"FLOPs     {number(found.compute_flops)}")
    if found.wall_seconds is None:
        raw(f"time      as many trials at once as the cluster holds ({found.speed_source})")
    else:
        raw(
            f"time      about {duration(found.wall_seconds)}, {found.concurrency} trials at once ({found.speed_source})"
        )
    note("trials that a sweep of this home has finished are not trained again")


def points(found: SweepPoints, job: str, json: bool) -> None:
    """How many points there are, the range that they span, and why others are none."""
    if json:
        as_json(
            {
                "points": jsonlib.loads(found.points.to_json(orient="records")),
                "refused": jsonlib.loads(
                    found.refused.drop(columns=REFUSAL, errors="ignore").to_json(orient="records")
                ),
                "noise": found.noise,
            }
        )
        return
    raw(f"points    {len(found.points)}")
    if len(found.points):
        compute = found.points["compute_flops"]
        raw(
            f"compute   {number(compute.min())} to {number(compute.max())} FLOPs ({compute.max() / compute.min():.0f}x)"
        )
        measure = found.measure
        values = found.points[measure.column]
        low, high = values.min(), values.max()
        worst, best = (low, high) if measure.higher_is_better else (high, low)
        unit = f" {measure.unit}" if measure.unit else ""
        raw(f"{measure.column.partition('_')[0]:<10}{worst:.4f} to {best:.4f}{unit}")
    if found.noise is not None:
        raw(f"noise     {found.noise:.2%} of the loss between seeds")
    for _, row in found.refused.iterrows():
        raw(f"refused   {row['name']}: {row['reason']}")
    if found.measure.fits_laws:
        note(f"next: escala laws fit --sweep {job} --name NAME")
