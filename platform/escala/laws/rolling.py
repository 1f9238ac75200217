"""What a law's own past says of its errors: refits to the smaller runs, judged by the larger (docs/theory D.8).

The records, and what is read off them; calibrate.py makes them. Errors are logs of obtained over predicted loss. The
bias of the form at a distance d beyond the data, d the log of the extrapolation factor, is taken as a random walk in d:
normal with the variance tau^2 d. So it is nothing inside the data, and grows as its own past says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from escala.laws.powers import Floats

FEWEST_POINTS = 8  # predicted from smaller ones, of a healthy law
SMALLEST_COVERAGE = 0.75  # of their 90 % intervals
TRIM = 3.0  # robust sigmas at which a residual is cut: how far the few of another regime are off is no noise
PRODUCTS = ("compute_flops", "energy_joules")  # of N and D: their log counts half


@dataclass(frozen=True)
class Cut:
    """One refit to the points whose `by` is at most `largest`, and what it said of larger ones.

    `errors`: log of obtained over predicted; `low`, `high`: their 90 % interval, calibrated by what cuts
    among the points fitted here say of one another: nothing that was held back.
    """

    by: str  # an input, or compute_flops
    largest: float
    train_points: int
    rows: tuple[int, ...]  # tested, as positions among the law's points
    factors: tuple[float, ...]  # of extrapolation, 1 is inside
    errors: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def inside(self) -> tuple[bool, ...]:
        """Of each tested point, whether its error lies within its interval."""
        return tuple(a <= e <= b for a, e, b in zip(self.low, self.errors, self.high, strict=True))


@dataclass(frozen=True, eq=False)
class Rolling:
    """The cuts of a law, and the bias of its form that they leave likely."""

    cuts: tuple[Cut, ...]
    bias_draws_B: Floats  # one per replicate: log error at a distance of 1 (a factor e beyond the data)

    @property
    def predictions(self) -> int:
        """How many errors there are; a point may be predicted from several cuts."""
        return sum(len(cut.rows) for cut in self.cuts)

    @property
    def points(self) -> int:
        """How many different points were predicted from smaller ones."""
        return len({row for cut in self.cuts for row in cut.rows})

    @property
    def coverage(self) -> float | None:
        """Share of the predictions inside their 90 % interval; None without any."""
        inside = [each for cut in self.cuts for each in cut.inside]
        return sum(inside) / len(inside) if inside else None

    @property
    def error(self) -> float | None:
        """Mean absolute log error of the predictions."""
        errors = [abs(each) for cut in self.cuts for each in cut.errors]
        return sum(errors) / len(errors) if errors else None

    @property
    def bias(self) -> float | None:
        """Half the width of the bias's central 68 % at a factor e beyond the data."""
        if not len(self.bias_draws_B):
            return None
        return float(np.quantile(np.abs(self.bias_draws_B), 0.6827))

    def coverage_interval(self) -> tuple[float, float]:
        """95 % Wilson (1927) interval of the true coverage, as of `points` independent predictions."""
        return wilson(self.coverage or 0.0, self.points)

    def plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"cuts": [asdict(cut) for cut in self.cuts], "bias_draws_B": self.bias_draws_B.tolist()}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Rolling:
        """Of `plain()`. Raises KeyError, TypeError or ValueError for anything else."""
        cuts: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in cut.items()} for cut in plain["cuts"]
        ]
        return cls(tuple(Cut(**cut) for cut in cuts), np.array(plain["bias_draws_B"], dtype=np.float64))


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of the truth behind a share of n (Wilson 1927); (0, 1) of nothing."""
    if not n:
        return 0.0, 1.0
    z2 = 1.959963984540054**2 / n
    middle, half = share + z2 / 2, math.sqrt(z2 * share * (1 - share) + z2**2 / 4)
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def distance(factors: Mapping[str, Any]) -> Any:
    """How far beyond the data, from the factor of each input (numbers or arrays, 1 is inside): the largest log of them.

    A product of N and D counts half: ten times the compute are some 3.2 times of either.
    """
    logs = [np.log(value) * (0.5 if name in PRODUCTS else 1.0) for name, value in factors.items()]
    return np.maximum.reduce(logs) if logs else 0.0


def trimmed(residual_B: Floats) -> Floats:
    """Residuals, those beyond TRIM robust sigmas moved to there."""
    size_B = np.sort(np.abs(residual_B))  # np.median imports numpy.ma, as np.quantile does: see quantile_pair
    middle = (size_B[(len(size_B) - 1) // 2] + size_B[len(size_B) // 2]) / 2 if len(size_B) else 0.0
    limit = TRIM * 1.4826 * float(middle)
    return np.clip(residual_B, -limit, limit)


def problems(rolling: Rolling | None) -> list[str]:
    """Why a law whose past is `rolling` is not healthy; None: it has no intervals, which is said elsewhere."""
    if rolling is None:
        return []
    if rolling.points < FEWEST_POINTS:
        return [
            f"backtest: only {rolling.points} points could be predicted from smaller ones; "
            f"at least {FEWEST_POINTS} are needed"
        ]
    share = rolling.coverage or 0.0
    if share < SMALLEST_COVERAGE:
        return [
            f"backtest: {share:.0%} of {rolling.predictions} predictions of larger runs lie inside their 90 % "
            f"interval; at least {SMALLEST_COVERAGE:.0%} are needed"
        ]
    return []


def extrapolation(ranges: Mapping[str, Sequence[float]], point: Mapping[str, Any]) -> dict[str, Any]:
    """Per quantity that both know, the factor by which the point (numbers or arrays) lies outside; 1 is inside."""
    out = {}
    for name, (low, high) in ranges.items():
        if name in point:
            out[name] = np.maximum(np.maximum(point[name] / high, low / point[name]), 1.0)
    return out
