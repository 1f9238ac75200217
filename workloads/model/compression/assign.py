"""Which width each layer gets: the least cost under a bound on the summed loss, by integer programming (docs/theory
E.6).

Dimensions: L layers, C choices.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from escala.contract.errors import EscalaError, SpecError, ToleranceNotMet

ROUNDING = 1e-12
"""Of the summed losses' sizes: what adding them up in another order may change."""
SPAN = 1e4
"""What costs are scaled to: HiGHS stops within 1e-6 of the optimum, which is then 1e-10 of a layer's."""
CUTS = 1000

Array = NDArray[np.float64]


def assign_bits(cost: ArrayLike, loss: ArrayLike, budget: float) -> list[int]:
    """A choice for each layer: the least sum of costs whose losses sum to at most `budget`.

    Args:
        cost, loss: (layers, choices). Losses may be negative. An infinite one in either: not to be chosen.
        budget: in the unit of the losses; met exactly is kept.

    Returns the index of each layer's choice. Raises ToleranceNotMet where no assignment keeps the budget, with the
    least that one costs; SpecError for arrays of other shapes, or without numbers.
    """
    cost_LC, loss_LC = _table(cost), _table(loss)
    _check(cost_LC, loss_LC, budget)
    if not len(cost_LC):
        return []
    allowed_LC = np.isfinite(cost_LC) & np.isfinite(loss_LC)
    least_L = np.where(allowed_LC, loss_LC, np.inf).min(1)
    slack = ROUNDING * (abs(budget) + float(np.abs(loss_LC[allowed_LC]).sum()))
    if not math.fsum(least_L) <= budget + slack:
        raise ToleranceNotMet(
            f"The losses sum to {math.fsum(least_L):.6g} at least, and the budget is {budget:g}.",
            "Raise the budget, or offer a choice that loses less.",
        )
    found = _solve(cost_LC, loss_LC - least_L[:, None], allowed_LC, budget - math.fsum(least_L) + slack)
    return [int(choice) for choice in found]


def _table(rows: ArrayLike) -> Array:
    found = np.asarray(rows, dtype=float)
    return found if found.size else found.reshape(0, 0)


def _check(cost_LC: Array, loss_LC: Array, budget: float) -> None:
    if cost_LC.shape != loss_LC.shape or cost_LC.ndim != 2:
        raise SpecError(
            f"Costs are {cost_LC.shape} and losses {loss_LC.shape}.", "Give both as (layers, choices)."
        )
    if math.isnan(budget) or np.isnan(cost_LC).any() or np.isnan(loss_LC).any():
        raise SpecError("A cost, a loss or the budget is not a number.", "Measure it again.")
    if (cost_LC == -np.inf).any() or (loss_LC == -np.inf).any():
        raise SpecError("A cost or a loss is minus infinity.", "Give finite ones.")
    if len(cost_LC) and not (np.isfinite(cost_LC) & np.isfinite(loss_LC)).any(1).all():
        raise ToleranceNotMet("A layer has no choice of finite cost and loss.", "Offer it one.")


def _solve(cost_LC: Array, above_LC: Array, allowed_LC: NDArray[np.bool_], room: float) -> NDArray[np.intp]:
    """The cheapest choices whose losses above each layer's least sum to at most `room`. HiGHS keeps constraints to
    within 1e-6: an assignment that is over is forbidden, and the next one asked for.
    """
    layers, choices = cost_LC.shape
    allowed_LC = allowed_LC & (above_LC <= room)
    cost_LC = np.where(allowed_LC, cost_LC - np.where(allowed_LC, cost_LC, np.inf).min(1, keepdims=True), 0.0)
    above_LC = np.where(allowed_LC, above_LC, 0.0)
    if not math.fsum(above_LC.max(1)) > room:  # every choice keeps it
        cheapest: NDArray[np.intp] = np.where(allowed_LC, cost_LC, np.inf).argmin(1)
        return cheapest
    one_each = scipy.sparse.kron(scipy.sparse.eye(layers), np.ones((1, choices)), format="csr")
    scale = SPAN / (cost_LC.max() or 1.0)
    unit = above_LC.max()
    constraints: list[Any] = [LinearConstraint(one_each, 1, 1)]
    constraints.append(LinearConstraint(above_LC.reshape(1, -1) / unit, -np.inf, room / unit))
    for _ in range(CUTS):
        result = milp(
            cost_LC.flatten() * scale,
            integrality=np.ones(layers * choices),
            bounds=Bounds(0, allowed_LC.flatten().astype(float)),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if result.x is None:
            break
        found: NDArray[np.intp] = result.x.reshape(layers, choices).argmax(1)
        if math.fsum(above_LC[np.arange(layers), found]) <= room:
            return found
        taken = np.zeros((layers, choices))
        taken[np.arange(layers), found] = 1
        constraints.append(LinearConstraint(taken.reshape(1, -1), -np.inf, layers - 1))
    raise EscalaError(
        f"The integer program of {layers} layers and {choices} choices was not solved: {result.message}",
        "Offer fewer choices.",
    )
