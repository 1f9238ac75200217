"""What became of sealed forecasts: predicted against obtained, and how often the intervals held, by factor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from escala.contract.errors import NotFoundError
from escala.laws.forecasts import LEVEL, Forecast, by_factor, coverage


def plot_forecasts(found: Sequence[Forecast], file: Path) -> Path:
    """Write both figures into one PNG. Raises NotFoundError where no forecast has been scored."""
    scored = [each for each in found if each.obtained_nats is not None]
    if not scored:
        raise NotFoundError(
            "no sealed forecast has been scored yet", "`escala forecasts list` shows which are open"
        )
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _predicted(left, scored)
    _coverage(right, scored)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    return file


def _predicted(axes: Axes, scored: Sequence[Forecast]) -> None:
    obtained = [each.obtained_nats or 0.0 for each in scored]
    low, high = min(obtained), max(obtained)
    axes.plot([low, high], [low, high], color="0.7", linewidth=1)
    for inside, color in ((True, "tab:blue"), (False, "tab:red")):
        part = [each for each in scored if each.inside == inside]
        axes.errorbar(
            [each.obtained_nats or 0.0 for each in part],
            [each.sealed.loss_nats for each in part],
            yerr=[
                [each.sealed.loss_nats - each.sealed.low_nats for each in part],
                [each.sealed.high_nats - each.sealed.loss_nats for each in part],
            ],
            fmt="o",
            markersize=3,
            linewidth=1,
            color=color,
            label=f"{'inside' if inside else 'outside'} {LEVEL:.0%}: {len(part)}",
        )
    axes.set_xlabel("obtained loss, nats per token")
    axes.set_ylabel("sealed forecast")
    axes.legend()


def _coverage(axes: Axes, scored: Sequence[Forecast]) -> None:
    parts = [coverage("all", scored), *by_factor(scored)]
    for place, part in enumerate(parts):
        share, low, high = part.inside / part.scored, part.coverage_low or 0.0, part.coverage_high or 0.0
        axes.errorbar([place], [share], yerr=[[share - low], [high - share]], fmt="o", color="tab:blue")
        axes.annotate(
            f"{part.inside} of {part.scored}", (place, share), xytext=(6, 4), textcoords="offset points"
        )
    axes.axhline(LEVEL, color="0.7", linewidth=1)
    axes.set_xticks(range(len(parts)), [part.label for part in parts], rotation=15)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share inside, with its 95 % interval")
