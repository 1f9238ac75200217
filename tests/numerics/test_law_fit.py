"""The fit reaches the global minimum: against scipy from random starts, on an objective written out again."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linprog, minimize

from escala.laws import Objective, fit_law


def table(n: int, seed: int, noise: float = 0.01) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    size, tokens = 10 ** rng.uniform(7, 10, n), 10 ** rng.uniform(8, 11, n)
    loss = (1.8 + 482 * size**-0.3478 + 2085 * tokens**-0.3658) * np.exp(noise * rng.standard_normal(n))
    return pd.DataFrame({"n_active": size, "tokens": tokens, "loss_nats": loss})


def residual_and_slopes(theta: np.ndarray, points: pd.DataFrame, space: str) -> tuple[np.ndarray, np.ndarray]:
    """Hoffmann et al. (2022), eq. 2 and 3: theta = log L_inf, log a, log b, alpha, beta (logs centred)."""
    logs = np.log(points[["n_active", "tokens"]].to_numpy().T)
    x, d = logs - logs.mean(axis=1, keepdims=True)
    parts = np.exp([theta[0] + 0 * x, theta[1] - theta[3] * x, theta[2] - theta[4] * d])
    loss = parts.sum(axis=0)
    slopes = np.stack([*parts, -parts[1] * x, -parts[2] * d])
    if space == "linear":
        return points.loss_nats.to_numpy() - loss, -slopes
    return np.log(points.loss_nats.to_numpy() / loss), -slopes / loss


def scipy_minimum(points: pd.DataFrame, delta: float, space: str, starts: int) -> float:
    """The least sum of Huber losses that BFGS finds from random starts."""

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        residual, slopes = residual_and_slopes(theta, points, space)
        size = np.abs(residual)
        value = np.where(size <= delta, residual**2 / 2, delta * (size - delta / 2)).sum()
        return value / delta, slopes @ np.clip(residual, -delta, delta) / delta

    rng, best = np.random.default_rng(0), np.inf
    for _ in range(starts):
        start = np.r_[rng.uniform(-2, 1, 3), rng.uniform(0.1, 1, 2)]
        for method in ("L-BFGS-B", "BFGS"):
            start = minimize(
                objective, start, jac=True, method=method, options={"gtol": 1e-12, "maxiter": 300}
            ).x
        best = min(best, objective(start)[0] * delta)
    return best


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("delta", "space"), [(1e-3, "log"), (1e-2, "linear"), (1.0, "log")])
def test_huber_optimum_is_global(seed, delta, space):
    points = table(30, seed)
    law = fit_law(points, objective=Objective(space, delta), bootstrap=0)
    assert law.objective_value <= scipy_minimum(points, delta, space, 4) * (1 + 1e-8)


def sequential_lp(points: pd.DataFrame, theta: np.ndarray) -> float:
    """A local minimum of the L1 norm of log residuals: linear programs in a shrinking trust region."""
    radius, best = 0.3, np.abs(residual_and_slopes(theta, points, "log")[0]).sum()
    n = len(points)
    while radius > 1e-11:
        residual, slopes = residual_and_slopes(theta, points, "log")
        matrix = np.block([[slopes.T, -np.eye(n)], [-slopes.T, -np.eye(n)]])
        bounds = [(-radius, radius)] * 5 + [(0, None)] * n
        step = linprog(np.r_[np.zeros(5), np.ones(n)], matrix, np.r_[-residual, residual], bounds=bounds).x[
            :5
        ]
        value = np.abs(residual_and_slopes(theta + step, points, "log")[0]).sum()
        theta, best, radius = (
            (theta + step, value, radius) if value < best * (1 - 1e-12) else (theta, best, radius / 4)
        )
    return float(best)


@pytest.mark.parametrize("seed", range(2))
def test_l1_limit_is_global(seed):
    points = table(24, seed)
    law = fit_law(points, objective=Objective("log", 1e-8), bootstrap=0)
    rng = np.random.default_rng(1)
    starts = np.c_[rng.uniform(-1, 1, (4, 3)), rng.uniform(0.2, 0.7, (4, 2))]
    reference = min(sequential_lp(points, start) for start in starts)
    residual = np.log(points.loss_nats) - np.log(
        law.curve({c: points[c].to_numpy() for c in ("n_active", "tokens")})
    )
    assert np.abs(residual).sum() <= reference * (1 + 2e-8) + 5e-8
    assert law.objective_value == pytest.approx(1e-8 * np.abs(residual).sum(), rel=1e-4)
