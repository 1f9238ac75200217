"""How many workers pay, as a line and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from escala.cli.render import duration, number, raw, table

if TYPE_CHECKING:
    from escala.views.plans import PlanView
    from escala.views.workers import WorkersRowView, WorkersView

GB, KWH = 1e9, 3.6e6


def planned(best: PlanView, asked: bool) -> None:
    """P* of a plan's run, where it is known; `asked`: else why it is not."""
    if best.workers:
        line(best.workers[0], planned=True)
    elif asked:
        raw(f"workers         unknown: {best.workers_unknown or 'no cluster; name one with --cluster'}")


def line(found: WorkersView, planned: bool = False) -> None:
    """P* and how clear it is; of a planned run with what it takes there."""
    row = found.row(found.best_workers)
    if row is None:
        most = found.rows[-1].workers
        raw(f"workers         none: it fits in a device's memory on no number up to {most}; {found.ends}")
        return
    spent = f", {', '.join(_spent(row))}, in {found.precision}" if planned else ""
    raw(f"workers         P* = {row.workers}{spent}: {'; '.join(_reasons(found, planned))}")


def _spent(row: WorkersRowView) -> Iterator[str]:
    yield f"{number(row.wall_seconds / 3600)} hours"
    if row.energy_joules is not None:
        yield f"{number(row.energy_joules / KWH)} kWh"
    if row.cost_usd is not None:
        yield f"{number(row.cost_usd)} USD"


def _reasons(found: WorkersView, planned: bool) -> Iterator[str]:
    """Why P* is what it is."""
    margins = {"fewer": found.margin_fewer, "more": found.margin_more}
    known = [f"{_higher(margin)} with {side}" for side, margin in margins.items() if margin is not None]
    yield f"P T^2 is {', '.join(known)}" if known else "the only one"
    if found.margin_more is None:
        yield found.ends
    if found.time_over_fastest is not None and found.time_over_fastest > 1:
        yield f"{number(found.time_over_fastest)} times the least time, at {found.fastest_workers}"
    fewest = next(row.workers for row in found.rows if row.fits)
    if fewest > found.rows[0].workers:
        yield f"does not fit below P = {fewest}"
    if not planned and found.own_workers != found.best_workers:
        yield f"the spec has {found.own_workers}"


def _higher(margin: float) -> str:
    return f"{margin:.1%} higher" if margin < 10 else f"{number(1 + margin)} times as much"


def curve(found: WorkersView) -> None:
    """A row a number of workers; seconds are of a step, all else the run's."""
    columns = (
        "P",
        "s a step",
        "compute",
        "exposed",
        "share",
        "speed-up",
        "-dlnT/dlnP",
        "micro",
        "GB",
        "time",
        "kWh",
    )
    rows = [
        (
            number(row.workers),
            *(number(x) for x in (row.step_seconds, row.compute_seconds, row.exposed_seconds)),
            f"{row.exposed_share:.1%}",
            *("" if x is None else f"{x:z.2f}" for x in (row.speed_up, row.gain)),
            number(row.micro_batch_sequences),
            number(row.memory_bytes / GB),
            duration(row.wall_seconds),
            _kwh(row.energy_joules),
            number(row.cost_usd),
            ", ".join(_marks(found, row)),
        )
        for row in found.rows
    ]
    raw(f"\nby the number of workers P, in {found.precision}, at the same batch")
    table((*columns, "USD", ""), rows)
    _notes([found])


def by_precision(curves: Sequence[WorkersView]) -> None:
    """A row a number of workers, hours, energy with its interval, and money in each precision."""
    raw("\nby the number of workers P and the precision; the interval, of 90 %, is that of the tokens")
    columns = [
        f"{name}, {each.precision}" for each in curves for name in ("hours", "kWh", "from", "to", "USD")
    ]
    numbers = sorted({row.workers for each in curves for row in each.rows})
    rows = [
        (number(p), *(cell for each in curves for cell in _cells(each, p)), _best(curves, p)) for p in numbers
    ]
    table(("P", *columns, ""), rows)
    _notes(curves)


def _cells(found: WorkersView, workers: int) -> tuple[str, ...]:
    row = found.row(workers)
    if row is None or not row.fits:
        return ("-" if row is None else "does not fit", "", "", "", "")
    joules = (row.energy_joules, row.energy_low_joules, row.energy_high_joules)
    return (number(row.wall_seconds / 3600), *(_kwh(each) for each in joules), number(row.cost_usd))


def _best(curves: Sequence[WorkersView], workers: int) -> str:
    return ", ".join(f"P* in {each.precision}" for each in curves if each.best_workers == workers)


def _kwh(joules: float | None) -> str:
    return number(None if joules is None else joules / KWH)


def _marks(found: WorkersView, row: WorkersRowView) -> Iterator[str]:
    if row.workers == found.best_workers:
        yield "P*"
    if row.workers == found.fastest_workers:
        yield "least time"
    if row.workers == found.own_workers:
        yield "as configured"
    if row.activation_checkpointing:
        yield "checkpointing"
    if not row.fits:
        yield "DOES NOT FIT"


def _notes(curves: Sequence[WorkersView]) -> None:
    for text in dict.fromkeys(text for each in curves for text in each.notes):
        raw(f"note            {text}")
