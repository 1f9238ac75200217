"""Sweeps: what one would cost, and what one has measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from escala.views.base import View

if TYPE_CHECKING:
    import pandas as pd

    from escala.sweeps.demo_space import DemoSpace, MachineSpeed
    from escala.sweeps.points import SweepPoints


class TrialView(View):
    """One run to be made: what was varied, and what follows. `config`: the workload's, resolved."""

    values: dict[str, Any]  # of the space's axes, and the seed
    config: dict[str, Any]
    n_total: int
    n_active: int
    train_tokens: int
    context_tokens: int
    compute_flops: float  # as if trained alone
    audits: float | None  # the factor of the recipe's learning rate; None: a point of the sweep
    branched: bool  # it shares its first steps with those that differ in tokens alone
    shared_tokens: int  # of train_tokens: trained for the next shorter branch


class SweepPlanView(View):
    """A sweep before it starts. Sums are of what is spent, over all `trials`, finished ones too."""

    name: str
    trials: tuple[TrialView, ...]
    train_tokens: int
    compute_flops: float
    alone_flops: float  # of the same points, were each trained alone
    trunks: int | None  # that branches share; None: nothing branches
    fewest_trunks: int  # that a law's intervals need
    concurrency: int | None  # None: the cluster's size is not known
    wall_seconds: float | None  # None: that is not known either
    speed_source: str  # of wall_seconds, in words
    optimised: bool  # an optimiser chooses: `trials` are the middle of its space, so many times
    chosen: dict[str, str]  # what the space left open: dotted key -> the choice, and why


class DemoSpaceView(View):
    """What this machine does now, in each of two processes, and the demo's sweep that fits the minutes."""

    small_flops_per_second: float  # of the smallest size
    large_flops_per_second: float
    core_share: float  # that each process had
    overrides: tuple[str, ...]  # of the space `demo`
    trials: int
    compute_flops: float
    largest_flops: float  # of one trial
    wall_seconds: float  # of the whole demo, estimated
    fits: bool

    @classmethod
    def of_space(cls, speed: MachineSpeed, space: DemoSpace) -> DemoSpaceView:
        """Of both."""
        return cls(
            small_flops_per_second=speed.small,
            large_flops_per_second=speed.large,
            core_share=speed.share,
            overrides=space.overrides,
            trials=space.trials,
            compute_flops=space.compute_flops,
            largest_flops=space.largest_flops,
            wall_seconds=space.seconds,
            fits=space.fits,
        )


class MeasureView(View):
    """What trials are judged by."""

    column: str  # of the points
    unit: str
    higher_is_better: bool
    fits_laws: bool


class SweepPointsView(View):
    """What a sweep measured, a row a trial: the columns of a law's points (of PPO `reward` and `kl_nats` instead of a
    loss), the trial, what was varied; refused ones with their `reason`.
    """

    job_id: str
    points: tuple[dict[str, Any], ...]
    refused: tuple[dict[str, Any], ...]
    measure: MeasureView
    noise: float | None  # pooled relative standard deviation of the loss between seeds; None without repeats
    audit: tuple[str, ...]  # what the audit of the recipe found, in words

    @classmethod
    def of_points(cls, job_id: str, found: SweepPoints) -> SweepPointsView:
        """Of the sweep's tables."""
        from escala.laws.files import REFUSAL

        refused = found.refused.drop(columns=REFUSAL, errors="ignore")
        measure = MeasureView.of(found.measure)
        rows = {"points": _rows(found.points), "refused": _rows(refused)}
        return cls(
            job_id=job_id,
            **rows,
            measure=measure,
            noise=found.noise,
            audit=tuple(p.finding() for p in found.audited),
        )


def _rows(table: pd.DataFrame) -> tuple[dict[str, Any], ...]:
    """A row a dictionary; an empty cell is None."""
    return tuple(
        {str(name): None if cell != cell else cell for name, cell in row.items()}
        for row in table.to_dict("records")
    )
