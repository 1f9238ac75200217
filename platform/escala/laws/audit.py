"""The audit of a recipe: how much loss its learning rate leaves on the table (docs/theory D.8).

A law extrapolates its runs' recipe as much as their sizes. So at the largest point, and at a horizon beyond it, the
same run is trained at half and at twice the recipe's rate; a parabola through the three losses, in the logarithm of the
rate, says where the best rate is and what the recipe's own costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LARGEST_LOSS = 0.005  # of the loss: what a recipe may leave on the table and still be called tuned
FACTORS = (0.5, 1.0, 2.0)  # of the recipe's rate


@dataclass(frozen=True)
class AuditedRun:
    """One run at `factor` times the recipe's learning rate."""

    n_active: float
    tokens: float
    factor: float
    learning_rate: float
    loss_nats: float
    run_id: str | None


@dataclass(frozen=True)
class AuditedPoint:
    """An (N, D) at which the recipe was audited. `left`: relative, the recipe's loss over the best rate's, less 1.

    `best_factor`: of the recipe's rate; `bracketed`: it lies between the rates tried, so `left` is no lower bound.
    """

    n_active: float
    tokens: float
    learning_rate: float
    best_factor: float
    left: float
    bracketed: bool
    runs: tuple[AuditedRun, ...]

    @property
    def tuned(self) -> bool:
        """Whether the recipe leaves less on the table than LARGEST_LOSS."""
        return self.bracketed and self.left < LARGEST_LOSS

    def finding(self) -> str:
        """In plain words."""
        at = f"recipe audit at N {self.n_active:.4g}, D {self.tokens:.4g}"
        least = "" if self.bracketed else "at least "
        left = f"{least}{self.left:.2%} of the loss on the table"
        said = f"{at}: a learning rate of {self.learning_rate:.3g} leaves {left}"
        if self.tuned:
            return f"{said} (best at {self.best_factor:.2f} times it)"
        where = (
            f"{self.best_factor:.2f} times it"
            if self.bracketed
            else f"{self.best_factor:g} times it or beyond"
        )
        return (
            f"{said}; the best is {where}: set training.optimizer.learning_rate, or renew the recipe's table"
        )


def audit(runs: Iterable[AuditedRun]) -> list[AuditedPoint]:
    """The audited points, by tokens; those without the recipe's own run and one at each side are left out."""
    groups: dict[tuple[float, float], list[AuditedRun]] = {}
    for run in runs:
        groups.setdefault((run.n_active, run.tokens), []).append(run)
    found = (_point(sorted(group, key=lambda run: run.factor)) for group in groups.values())
    return sorted((each for each in found if each is not None), key=lambda each: each.tokens)


def _point(runs: Sequence[AuditedRun]) -> AuditedPoint | None:
    factors = [run.factor for run in runs]
    if sorted(set(factors)) != sorted(FACTORS):
        return None
    own = next(run for run in runs if run.factor == 1.0)
    low, middle, high = (next(run.loss_nats for run in runs if run.factor == factor) for factor in FACTORS)
    curvature, slope = (low + high) / 2 - middle, (high - low) / 2
    best = -slope / (2 * curvature) if curvature > 0 else math.inf  # in octaves of the rate
    if abs(best) <= 1:
        bottom = middle - slope**2 / (4 * curvature)
        factor, left, bracketed = 2.0**best, middle / bottom - 1, True
    else:
        factor, bottom = min(((0.5, low), (1.0, middle), (2.0, high)), key=lambda pair: pair[1])
        left, bracketed = middle / bottom - 1, False
    return AuditedPoint(own.n_active, own.tokens, own.learning_rate, factor, left, bracketed, tuple(runs))


def findings(points: Sequence[AuditedPoint]) -> tuple[list[str], list[str]]:
    """(what makes a law unhealthy, what is only said), and how the correction grows along D where two are known."""
    wrong = [each.finding() for each in points if not each.tuned]
    said = [each.finding() for each in points if each.tuned]
    if wrong and len(points) > 1 and all(each.bracketed for each in points):
        first, last = points[0], points[-1]
        power = math.log(last.best_factor / first.best_factor) / math.log(last.tokens / first.tokens)
        wrong.append(
            f"recipe audit: the recipe's rate needs a further factor of D^{power:+.2f} from there on"
        )
    return wrong, said


def plain(points: Sequence[AuditedPoint]) -> list[dict[str, Any]]:
    """For a law's provenance."""
    return [asdict(each) for each in points]
