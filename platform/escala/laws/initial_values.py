"""Starts for the fit: a grid of exponents, with the coefficients by non-negative least squares in closed
form.

With the exponents fixed the law is linear in its coefficients, so every grid point has one convex inner
problem: at most five unknowns, solved for all grid points at once by trying each set of non-zero
coefficients.
"""

from __future__ import annotations

from itertools import chain, combinations, product

import numpy as np

from escala.laws.powers import Floats
from escala.laws.solve import Problem


def _grid(problem: Problem) -> Floats:
    """Exponents to try, (G, number of exponents); a fixed one keeps its value. A power mean starts as a sum."""
    form, first = problem.form, len(problem.form.coefficients)
    axes = []
    for i, name in enumerate(form.names[first:], first):
        low, high = problem.low_P[i], problem.high_P[i]
        starts = form.starts_of(name)
        inside = (low,) if low == high else tuple(v for v in starts if low <= v <= high)
        axes.append(inside[:1] if form.join is not None and name == form.join.parameter else inside)
    return np.array(list(product(*axes)), dtype=float)


def _columns(problem: Problem, grid_GE: Floats) -> tuple[Floats, np.ndarray]:
    """Distinct basis columns (M, N), and for each grid point the columns of its coefficients (G, 1 + K)."""
    features, form = problem.features, problem.form
    rows, picks = [np.ones((1, len(problem.loss_N)))], [np.zeros(len(grid_GE), dtype=int)]
    total = 1
    for i, term in enumerate(form.terms):
        keys = grid_GE[:, [i, -1]] if term.mix else grid_GE[:, [i]]
        distinct, inverse = np.unique(keys, axis=0, return_inverse=True)
        log_MN = features.main_KN[i][None, :]
        if term.mix and features.mix_N is not None:
            log_MN = log_MN + distinct[:, 1:] * features.mix_N
        rows.append(np.exp(-distinct[:, :1] * log_MN))
        picks.append(total + inverse.reshape(-1))
        total += len(distinct)
    return np.concatenate(rows), np.stack(picks, axis=1)


def non_negative(gram_GKK: Floats, moment_GK: Floats) -> tuple[Floats, Floats]:
    """Minimise c'Gc - 2 m'c over c >= 0 for each row: the best of all supports. Returns c (G, K) and the
    value (G,).
    """
    size_G, size_K = moment_GK.shape
    best_GK, value_G = np.zeros((size_G, size_K)), np.zeros(size_G)
    supports = chain.from_iterable(combinations(range(size_K), r) for r in range(1, size_K + 1))
    for support in map(list, supports):
        gram = gram_GKK[:, support][:, :, support]
        diagonal = gram[:, range(len(support)), range(len(support))]
        gram = gram + (1e-12 * diagonal + 1e-300)[:, None, :] * np.eye(len(support))
        solved = np.linalg.solve(gram, moment_GK[:, support][..., None])[..., 0]
        gain = -np.einsum("gk,gk->g", solved, moment_GK[:, support])
        better = (solved >= 0).all(axis=1) & (gain < value_G)
        value_G[better] = gain[better]
        chosen = np.zeros((int(better.sum()), size_K))
        chosen[:, support] = solved[better]
        best_GK[better] = chosen
    return best_GK, value_G


def grid_starts(problem: Problem, count: int) -> Floats:
    """The `count` best grid points that are no neighbours of a better one, with their coefficients: (count,
    P).
    """
    grid_GE = _grid(problem)
    columns_MN, pick_GK = _columns(problem, grid_GE)
    relative_MN = columns_MN / problem.loss_N  # least squares of L_pred/L_obs - 1, near the log residual
    gram_MM, moment_M = relative_MN @ relative_MN.T, relative_MN.sum(axis=1)
    gram_GKK, moment_GK = gram_MM[pick_GK[:, :, None], pick_GK[:, None, :]], moment_M[pick_GK]
    k = pick_GK.shape[1]
    fixed = np.flatnonzero(problem.low_P[:k] == problem.high_P[:k])
    free = np.setdiff1d(np.arange(k), fixed)
    coefficient_GK = np.tile(
        np.where(np.isfinite(problem.high_P[:k]), problem.high_P[:k], 0.0), (len(grid_GE), 1)
    )
    offset_GK = np.einsum("gjk,gk->gj", gram_GKK, coefficient_GK)
    value_G = np.einsum("gk,gk->g", coefficient_GK, offset_GK - 2 * moment_GK)
    if len(free):
        inner, gain = non_negative(gram_GKK[:, free][:, :, free], (moment_GK - offset_GK)[:, free])
        coefficient_GK[:, free] = inner
        value_G = value_G + gain
    marked = problem.log_coefficient_P[:k]
    coefficient_GK[:, marked] = np.maximum(coefficient_GK[:, marked], 1e-3 * problem.loss_N.mean())
    chosen = _spread(pick_GK, grid_GE, value_G, count)
    return _joined(problem, np.concatenate([coefficient_GK[chosen], grid_GE[chosen]], axis=1))


def _joined(problem: Problem, start_GP: Floats) -> Floats:
    """The starts at each of the powers that a join begins from; a term that is absent has no slope there, so it is
    small.
    """
    join = problem.form.join
    if join is None:
        return start_GP
    low, high = problem.low_P[-1], problem.high_P[-1]
    powers = [low] if low == high else [v for v in join.starts if low <= v <= high]
    out_GP = np.concatenate([np.column_stack([start_GP[:, :-1], np.full(len(start_GP), v)]) for v in powers])
    terms = slice(1, 1 + len(problem.form.terms))
    out_GP[:, terms] = np.maximum(out_GP[:, terms], 1e-3 * problem.loss_N.mean())
    return out_GP


def _spread(pick_GK: np.ndarray, grid_GE: Floats, value_G: Floats, count: int) -> np.ndarray:
    """Greedy: the best remaining grid point, then strike its neighbours (one rung away in every exponent)."""
    rungs = np.stack([np.unique(axis, return_inverse=True)[1] for axis in grid_GE.T], axis=1)
    order = np.argsort(value_G, kind="stable")
    chosen: list[int] = []
    for g in order:
        if all(np.abs(rungs[g] - rungs[c]).max() > 1 for c in chosen):
            chosen.append(int(g))
        if len(chosen) == count:
            break
    return np.array(chosen)
