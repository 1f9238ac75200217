"""What a run takes by the number of its workers, and how many pay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from escala.views.base import View

if TYPE_CHECKING:
    from escala.planning.workers import WorkersCurve, WorkersRow


class WorkersRowView(View):
    """A run on `workers` devices, one each. Energy and money are the whole run's; None: the cluster's file does not
    say what it takes to know. The 90 % interval of the energy is that of the tokens, where these have one.
    """

    workers: int
    micro_batch_sequences: int  # of one worker
    activation_checkpointing: bool
    step_seconds: float  # of one optimiser step
    compute_seconds: float  # of one step
    exposed_seconds: float  # of one step: communication that nothing hides
    exposed_share: float
    speed_up: float | None  # over the fewest workers that fit; None where it does not
    gain: (
        float | None
    )  # -dlnT/dlnP from the next fewer workers that fit: 1 is in proportion, below 1/2 does not pay
    wall_seconds: float  # of all steps
    memory_bytes: float  # of one device
    energy_joules: float | None  # at the meter, an estimate
    energy_low_joules: float | None
    energy_high_joules: float | None
    cost_usd: float | None
    fits: bool  # in the device's memory

    @classmethod
    def of_row(cls, row: WorkersRow, low: float | None, high: float | None) -> Self:
        """Of a row; `low` and `high`: the ends of the interval over the value, of the tokens."""
        names = set(cls.model_fields) - {"cost_usd", "energy_low_joules", "energy_high_joules"}
        joules = row.energy_joules
        return cls(
            **{name: getattr(row, name) for name in names},
            cost_usd=row.usd,
            energy_low_joules=None if joules is None or low is None else joules * low,
            energy_high_joules=None if joules is None or high is None else joules * high,
        )


class WorkersView(View):
    """The curve over P, the number of workers, and P*, at which P T^2 (cost times time) is least among those that fit;
    None: none fits. Margins: by which share P T^2 is higher at the best of fewer, or of more, workers; None: there are
    none.
    """

    precision: str
    own_workers: int  # as configured
    max_workers: int  # as many were looked at
    next_workers: int | None  # the least number beyond that shares the batch; None: there is none
    ends: str  # why the rows end where they do, in words
    best_workers: int | None  # P*
    fastest_workers: int | None  # at which a step takes the least time
    margin_fewer: float | None
    margin_more: float | None
    time_over_fastest: float | None  # of a step at P*, over that at fastest_workers
    rows: tuple[WorkersRowView, ...]
    notes: tuple[str, ...]

    @classmethod
    def of_curve(cls, found: WorkersCurve, low: float | None = None, high: float | None = None) -> Self:
        """Of a curve; `low` and `high` as `WorkersRowView.of_row`."""
        best = found.best
        same = ("precision", "own_workers", "max_workers", "next_workers", "ends", "notes")
        return cls(
            **{name: getattr(found, name) for name in same},
            best_workers=best and best.workers,
            fastest_workers=best and best.fastest,
            margin_fewer=best and best.margin_fewer,
            margin_more=best and best.margin_more,
            time_over_fastest=best and best.over_fastest,
            rows=tuple(WorkersRowView.of_row(row, low, high) for row in found.rows),
        )

    def row(self, workers: int | None) -> WorkersRowView | None:
        """That of so many workers; None where there is none."""
        return next((row for row in self.rows if row.workers == workers), None)
