"""The cheapest widths whose measured loss keeps a budget (docs/theory E.6).

Sensitivities add up near zero alone. So what the integer program chooses is measured, and its bound corrected by what
was found: lowered where the budget is broken, raised where room is left, a stated number of times.

Dimensions: G groups, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from escala.contract.errors import ToleranceNotMet
from workloads.model.compression.assign import assign_bits

Table = Sequence[Sequence[float]]
Chosen = tuple[int, ...]
NEAR, AIM, FAR = 0.9, 0.95, 10.0
"""Shares of the budget: from which on no cheaper assignment is looked for, and what is aimed at; how many times off a
measurement may be to say where."""


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
    """A choice for each group, what it costs, and its loss increase.

    Args:
        additive_nats: the sum of its groups' own increases.
        predicted_nats: the same, corrected by what was measured before it, where anything was.
        measurements: that its budget took.
    """

    chosen: Chosen
    cost: float
    additive_nats: float
    predicted_nats: float
    measured: LossIncrease
    measurements: int


class BudgetSearch:
    """The cheapest assignments within one budget after another: what is measured for one is known for all.

    Args:
        cost_GC, loss_GC: as `assign_bits` takes them.
        measure: an assignment's increase.
        known: assignments that have been measured; the widest among them, so that there is one for every budget that
            can be kept.
    """

    def __init__(
        self,
        cost_GC: Table,
        loss_GC: Table,
        measure: Callable[[Chosen], LossIncrease],
        known: Mapping[Chosen, LossIncrease],
    ) -> None:
        self._cost, self._loss, self._measure = cost_GC, loss_GC, measure
        self.found: dict[Chosen, LossIncrease] = dict(known)
        self._predicted = {chosen: self._additive(chosen) for chosen in known}

    def within(self, budget: float, rounds: int) -> Assignment:
        """The cheapest assignment met whose measured increase is at most `budget`, on both texts, once at most `rounds`
        more are measured. Raises ToleranceNotMet where none keeps it.
        """
        before, low, high = len(self.found), 0.0, math.inf
        for _ in range(rounds):
            bound = self._bound(budget, low, high)
            try:
                chosen = tuple(assign_bits(self._cost, self._loss, bound))
            except ToleranceNotMet:
                low = bound
                continue
            if chosen not in self.found:
                self._predicted[chosen] = self._additive(chosen) * self._correction(budget)
                self.found[chosen] = self._measure(chosen)
            worst = self.found[chosen].worst
            if worst > budget:
                high = bound
            else:
                low = bound
                if worst >= NEAR * budget:
                    break
        return self._cheapest(budget, len(self.found) - before)

    def _cheapest(self, budget: float, measurements: int) -> Assignment:
        kept = [chosen for chosen, increase in self.found.items() if increase.worst <= budget]
        if not kept:
            least = min(increase.worst for increase in self.found.values())
            raise ToleranceNotMet(
                f"No assignment keeps the loss within {budget:g} nats: the best one loses {least:.5f}.",
                "Raise --loss-budget.",
            )
        best = min(kept, key=lambda chosen: (_sum(self._cost, chosen), self.found[chosen].worst))
        cost, additive = _sum(self._cost, best), self._additive(best)
        return Assignment(best, cost, additive, self._predicted[best], self.found[best], measurements)

    def _bound(self, budget: float, low: float, high: float) -> float:
        """Of the integer program: where the nearest measurement says that the budget is met, between the bounds that
        are known to keep and to break it.
        """
        near = self._nearest(budget)
        bound = budget if near is None else self._additive(near) * AIM * budget / self.found[near].worst
        if low < bound < high:
            return bound
        return (low + high) / 2 if high < math.inf else 2 * low

    def _correction(self, budget: float) -> float:
        """Measured over added up, of the nearest measurement."""
        near = self._nearest(budget)
        return 1.0 if near is None else self.found[near].nats / self._additive(near)

    def _nearest(self, budget: float) -> Chosen | None:
        """The assignment whose measured increase is nearest to the budget, as a ratio; None where all are far below:
        what little is lost there says nothing of it.
        """
        known = [
            chosen
            for chosen, increase in self.found.items()
            if increase.nats > 0 and self._additive(chosen) > 0 and increase.worst > budget / FAR
        ]
        return min(known, key=lambda c: abs(math.log(self.found[c].worst / budget)), default=None)

    def _additive(self, chosen: Chosen) -> float:
        return _sum(self._loss, chosen)


def _sum(table_GC: Table, chosen: Sequence[int]) -> float:
    return math.fsum(row[at] for row, at in zip(table_GC, chosen, strict=True))
