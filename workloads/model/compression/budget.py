"""The cheapest widths whose measured loss keeps a budget (docs/theory E.6).

Sensitivities add up near zero alone. So what the integer program predicts is measured, and its own bound is corrected
by what was found: lowered where the budget is broken, raised where room is left, a stated number of times.

Dimensions: G groups, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from escala.contract.errors import ToleranceNotMet
from workloads.model.compression.assign import assign_bits

Table = Sequence[Sequence[float]]
NEAR = 0.9
"""Share of the budget from which on no cheaper assignment is looked for."""


@dataclass(frozen=True)
class LossIncrease:
    """Above the whole model's loss, in nats a token: on the tokens of the sensitivities, and on others."""

    nats: float
    check_nats: float

    @property
    def worst(self) -> float:
        """What a budget must hold."""
        return max(self.nats, self.check_nats)


@dataclass(frozen=True)
class Assignment:
    """A choice for each group, what it costs, and its loss increase: the sum of its parts', and measured."""

    chosen: tuple[int, ...]
    cost: float
    predicted_nats: float
    measured: LossIncrease
    measurements: int  # that its budget took

    @property
    def ratio(self) -> float:
        """Predicted over measured, the worst of the two texts: between 1/2 and 2, and 1 where nothing is lost."""
        if self.predicted_nats <= 0 or self.measured.worst <= 0:
            return 1.0
        return min(2.0, max(0.5, self.predicted_nats / self.measured.worst))


def within_budget(
    cost_GC: Table,
    loss_GC: Table,
    budget: float,
    measure: Callable[[tuple[int, ...]], LossIncrease],
    safest: tuple[int, ...],
    rounds: int,
    ratio: float = 1.0,
) -> Assignment:
    """The cheapest assignment met whose measured increase is at most `budget`, on both texts.

    Args:
        cost_GC, loss_GC: as `assign_bits` takes them.
        measure: an assignment's increase.
        safest: the assignment that is taken where no other keeps the budget.
        rounds: assignments that are measured, at most, beside the safest.
        ratio: predicted over measured, as another budget has found it: the first bound is the budget times this.

    Raises ToleranceNotMet where the safest one breaks the budget, too.
    """
    found: dict[tuple[int, ...], LossIncrease] = {}
    bound, kept_bound, broken_bound = budget * ratio, 0.0, math.inf
    for _ in range(rounds):
        try:
            chosen = tuple(assign_bits(cost_GC, loss_GC, bound))
        except ToleranceNotMet:
            break
        if chosen not in found:
            found[chosen] = measure(chosen)
        worst = found[chosen].worst
        if worst <= budget:
            kept_bound = max(kept_bound, bound)
            if worst >= NEAR * budget:
                break
        else:
            broken_bound = min(broken_bound, bound)
        bound = _next(bound, worst, budget, kept_bound, broken_bound)
    kept = [chosen for chosen, increase in found.items() if increase.worst <= budget]
    if not kept:
        found[safest] = measure(safest)
        if found[safest].worst > budget:
            raise ToleranceNotMet(
                f"No assignment keeps the loss within {budget:g} nats: the widest one loses {found[safest].worst:.5f}.",
                "Raise --loss-budget.",
            )
        kept = [safest]
    best = min(kept, key=lambda chosen: (_sum(cost_GC, chosen), found[chosen].worst))
    return Assignment(best, _sum(cost_GC, best), _sum(loss_GC, best), found[best], len(found))


def _next(bound: float, worst: float, budget: float, kept: float, broken: float) -> float:
    """Scaled by what was measured, between the bounds that are known to keep and to break the budget."""
    scaled = bound * budget / worst if worst > 0 else 2 * bound
    scaled = min(max(scaled, bound / 4), 2 * bound)
    if kept < scaled < broken:
        return scaled
    return (kept + broken) / 2 if broken < math.inf else 2 * bound


def _sum(table_GC: Table, chosen: Sequence[int]) -> float:
    return math.fsum(row[at] for row, at in zip(table_GC, chosen, strict=True))
