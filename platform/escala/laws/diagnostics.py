"""IsoFLOP parabolas and one-factor slices: quick looks beside the joint fit, each with its bias stated
(docs/theory D.8).

Neither feeds the law. A parabola in log N is a second-order picture of a curve that is steeper on one side,
so its vertex is off whenever the sizes do not straddle the optimum evenly; a slice's constant contains the
other terms at the slice's own values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from escala.contract.errors import LawError
from escala.laws.fit import fit_law
from escala.laws.inputs import CONTEXT_TOKENS, SIZE, TOKENS
from escala.laws.law import Law
from escala.laws.powers import Floats


@dataclass(frozen=True)
class Parabola:
    """loss = quadratic in log N at one budget. `bias_factor`: the same parabola through the law's own
    noise-free losses, its vertex over the law's true optimum; 1 is unbiased, None where the law has no
    optimum."""

    compute_flops: float
    points: int
    best_size: float | None  # None: not convex, or the vertex lies outside the sizes tried
    best_loss_nats: float | None
    bias_factor: float | None
    finding: str


def isoflop_parabolas(law: Law, tolerance: float = 0.1, smallest: int = 4) -> list[Parabola]:
    """One parabola per group of points whose compute agrees within `tolerance` (relative) and that has
    `smallest` sizes.
    """
    if not {SIZE, TOKENS} <= set(law.form.inputs):
        raise LawError("IsoFLOP parabolas need one N and D per point.", "Fit form nd or ndt.")
    points = law.points
    size_N, tokens_N = (points[c].to_numpy(np.float64) for c in (law.size, "tokens"))
    compute_N = 6.0 * size_N * tokens_N
    out = []
    for rows in _budgets(compute_N, tolerance):
        if len(np.unique(size_N[rows])) >= smallest:
            out.append(_parabola(law, points.iloc[rows], float(np.exp(np.log(compute_N[rows]).mean()))))
    return out


def _budgets(compute_N: Floats, tolerance: float) -> list[np.ndarray]:
    """Indices of points with nearly the same compute, smallest budget first."""
    order = np.argsort(compute_N)
    groups: list[list[int]] = []
    for i in order:
        if groups and compute_N[i] <= compute_N[groups[-1][0]] * (1 + tolerance):
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    return [np.array(g) for g in groups]


def _parabola(law: Law, rows: pd.DataFrame, compute: float) -> Parabola:
    size_N = rows[law.size].to_numpy(np.float64)
    vertex = _vertex(np.log(size_N), rows["loss_nats"].to_numpy(np.float64))
    bias = None
    if vertex is not None:
        columns = {name: rows[name].to_numpy(np.float64) for name in law.inputs}
        own = _vertex(np.log(size_N), law.curve(columns))
        bias = _bias(law, rows, own, compute)
    if vertex is None:
        return Parabola(compute, len(rows), None, None, None, "no minimum inside the sizes tried")
    finding = (
        "its own bias is unknown"
        if bias is None
        else f"bias of this vertex on the law's own curve: {bias:.2f}x"
    )
    return Parabola(compute, len(rows), float(np.exp(vertex[0])), vertex[1], bias, finding)


def _bias(law: Law, rows: pd.DataFrame, own: tuple[float, float] | None, compute: float) -> float | None:
    if own is None:
        return None
    context = float(rows[CONTEXT_TOKENS.name].median()) if CONTEXT_TOKENS in law.form.inputs else None
    try:
        best = law.optimum(compute, context_tokens=context).n_active
    except LawError:  # the law itself has no interior optimum: there is nothing to compare with
        return None
    return float(np.exp(own[0]) / best)


def _vertex(log_size_N: Floats, loss_N: Floats) -> tuple[float, float] | None:
    """(log N, loss) at the parabola's minimum; None where it has none inside the sizes."""
    center = float(log_size_N.mean())
    square, slope, level = np.polyfit(log_size_N - center, loss_N, 2)
    if square <= 0:
        return None
    at = -slope / (2 * square)
    if not log_size_N.min() - center <= at <= log_size_N.max() - center:
        return None
    return center + float(at), float(level + slope * at / 2)


@dataclass(frozen=True)
class Slice:
    """loss = constant + coefficient * x^-exponent along one factor, the others held within a tolerance."""

    factor: str
    held: dict[str, float]
    points: int
    exponent: float
    constant_nats: float
    bias: str


def slices(law: Law, factor: str, tolerance: float = 0.05, smallest: int = 5) -> list[Slice]:
    """Log-log regressions along `factor` with the constant profiled out; none where no slice has `smallest`
    values.
    """
    inputs = law.inputs
    if factor not in inputs:
        raise LawError(f"The law has no factor '{factor}'.", f"It has: {', '.join(inputs)}.")
    points, others = law.points, [name for name in inputs if name != factor]
    keys = [np.round(np.log(points[name].to_numpy(np.float64)) / np.log1p(tolerance)) for name in others]
    out = []
    for _, rows in points.groupby(keys if keys else np.zeros(len(points))):
        if rows[factor].nunique() < smallest:
            continue
        table = pd.DataFrame({"loss_nats": rows["loss_nats"], "compute_flops": rows[factor]})
        found = fit_law(table, form="c", objective=law.objective, bootstrap=0).parameters
        held = {name: float(rows[name].median()) for name in others}
        bias = (
            f"the constant contains the terms of {', '.join(others)} at their held values"
            if others
            else "none known"
        )
        out.append(Slice(factor, held, len(rows), found["alpha"], found["L_inf"], bias))
    return out
