"""The form whose two terms join in a power mean: derivatives, the global fit, the optimum and the planned split."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize, minimize_scalar

from escala.laws import Law, Objective, fit_law
from escala.laws.forms import get_form
from escala.laws.powers import loss_and_jacobian, losses, make_features
from escala.laws.solve import Problem, local_model
from escala.planning.allocate import allocate, to_target
from escala.planning.limits import Limits
from escala.planning.propose import candidates, propose

FORM = get_form("interaction")
TRUTH = {"L_inf": 1.55, "a": 61.0, "b": 607.0, "alpha": 0.203, "beta": 0.272, "gamma": 0.45}


def truth(size: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    p = TRUTH
    by_n, by_d = p["a"] * size ** -p["alpha"], p["b"] * tokens ** -p["beta"]
    return p["L_inf"] + (by_n ** (1 / p["gamma"]) + by_d ** (1 / p["gamma"])) ** p["gamma"]


def table(n: int, seed: int, noise: float) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    size, tokens = 10 ** rng.uniform(7, 10, n), 10 ** rng.uniform(8, 11, n)
    loss = truth(size, tokens) * np.exp(noise * rng.standard_normal(n))
    return pd.DataFrame({"n_active": size, "tokens": tokens, "loss_nats": loss})


@pytest.fixture(scope="module")
def law() -> Law:
    return fit_law(table(80, 0, 0.002), "interaction", bootstrap=60)


def differences(function, theta_BP: np.ndarray, p: int) -> np.ndarray:
    step_B = 1e-6 * np.maximum(theta_BP[:, p], 1e-2)
    ends = []
    for sign in (1, -1):
        moved = theta_BP.copy()
        moved[:, p] += sign * step_B
        ends.append(function(moved))
    return (ends[0] - ends[1]) / (2 * step_B.reshape(-1, *[1] * (ends[0].ndim - 1)))


@pytest.mark.parametrize("space", ["log", "linear"])
def test_derivatives_are_those_of_finite_differences(space: str) -> None:
    rng = np.random.default_rng(0)
    columns = {"size": 10 ** rng.uniform(7, 10, 30), "tokens": 10 ** rng.uniform(8, 11, 30)}
    features = make_features(FORM, columns)
    theta_BP = np.array(
        [[1.1, 0.7, 0.5, 0.4, 0.3, 0.6], [1.1, 0.2, 0.5, 0.9, 0.3, 1.4], [0.3, 1.2, 0.01, 0.4, 0.8, 0.3]]
    )
    jacobian_BPN = loss_and_jacobian(FORM, theta_BP, features)[1]
    loss_N = losses(FORM, theta_BP[:1], features)[0] * np.exp(0.02 * rng.standard_normal(30))
    low_P, high_P = (np.array(ends) for ends in FORM.bounds())
    none_P = np.zeros(6)
    problem = Problem(
        FORM, features, loss_N, Objective(space, 0.05), low_P, high_P, none_P > 0, none_P, none_P
    )
    weight_BN = rng.uniform(0.5, 1.5, (3, 30))
    local = local_model(problem, theta_BP, weight_BN, 0.05)
    for p in range(6):
        moved = differences(lambda theta: losses(FORM, theta, features), theta_BP, p)
        assert np.abs(moved - jacobian_BPN[:, p]).max() < 1e-7 * np.abs(jacobian_BPN[:, p]).max()
        slope = differences(lambda theta: local_model(problem, theta, weight_BN, 0.05).value_B, theta_BP, p)
        assert np.abs(slope - local.gradient_BP[:, p]).max() < 1e-7 * np.abs(local.gradient_BP).max()
        bend = differences(
            lambda theta: local_model(problem, theta, weight_BN, 0.05).gradient_BP, theta_BP, p
        )
        assert np.abs(bend - local.hessian_BPP[:, p]).max() < 1e-7 * np.abs(local.hessian_BPP).max()


@pytest.mark.parametrize(("seed", "delta"), [(0, 1e-3), (1, 1e-3), (2, 1.0)])
def test_huber_optimum_is_global(seed: int, delta: float) -> None:
    points = table(30, seed, 0.01)
    x, d = (np.log(points[name]) - np.log(points[name]).mean() for name in ("n_active", "tokens"))
    x, d, log_loss = x.to_numpy(), d.to_numpy(), np.log(points.loss_nats.to_numpy())

    def objective(theta: np.ndarray) -> float:  # logs of L_inf, a, b and gamma
        joined = np.logaddexp(
            *((theta[i] - theta[2 + i] * v) / np.exp(theta[5]) for i, v in ((1, x), (2, d)))
        )
        size = np.abs(log_loss - np.log(np.exp(theta[0]) + np.exp(np.exp(theta[5]) * joined)))
        return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum() / delta)

    rng, best = np.random.default_rng(seed), np.inf
    bounds = [(-20.0, 3.0)] * 3 + [(1e-6, 2.0)] * 2 + [(np.log(0.1), np.log(2.0))]
    for _ in range(6):
        start = np.r_[rng.uniform(-1, 1, 3), rng.uniform(0.1, 0.8, 2), rng.uniform(-1.5, 0.3)]
        for _ in range(3):
            start = minimize(objective, start, method="L-BFGS-B", bounds=bounds, options={"maxfun": 4000}).x
        best = min(best, objective(start) * delta)
    fitted = fit_law(points, "interaction", objective=Objective("log", delta), bootstrap=0)
    assert fitted.objective_value <= best * (1 + 1e-6)


def test_the_law_comes_back_and_holds_where_nd_does_not(law: Law) -> None:
    assert law.healthy, law.findings
    for name, (low, high) in law.intervals().items():
        assert low <= TRUTH[name] <= high, name
    size, tokens = np.array([6e10]), np.array([1.2e12])
    held = {"n_active": size, "tokens": tokens}
    nd = fit_law(law.points, bootstrap=0)
    off = [abs(each.curve(held)[0] / truth(size, tokens)[0] - 1) for each in (law, nd)]
    assert off[0] < 0.01 < off[1]
    again = Law.from_json(law.to_json())
    assert again.parameters == law.parameters


def test_the_optimum_is_the_least_loss_along_the_budget(law: Law) -> None:
    def loss(log_n: float) -> float:
        size = np.exp(log_n)
        return law.curve({"n_active": np.array([size]), "tokens": np.array([1e21 / 6 / size])})[0]

    found = minimize_scalar(loss, bracket=(18.0, 22.0), options={"xtol": 1e-10})
    best = law.optimum(1e21)
    assert best.n_active == pytest.approx(np.exp(found.x), rel=1e-5)
    assert best.loss_nats == pytest.approx(found.fun, rel=1e-12)
    assert abs(best.first_order_residual) < 1e-12


def test_plans_targets_and_proposals_follow_from_it(law: Law) -> None:
    plan = allocate(law, Limits(compute_flops=1e21))
    assert plan.n_active == pytest.approx(law.optimum(1e21).n_active, rel=1e-9)
    assert abs(plan.residuals["N"]) < 1e-9
    target = to_target(law, plan.loss_nats)
    assert target.plan.compute_flops == pytest.approx(1e21, rel=1e-6)
    held = allocate(law, Limits(compute_flops=1e21, data_tokens=2e10, inference_tokens=1e11))
    for factor in (0.98, 1.02):  # no other N is better under repeats and inference
        n = held.n_active * factor
        d = (1e21 - 2 * n * 1e11) / 6 / n
        used = min(d, 2e10)
        fresh = used * (1 - 15 * np.expm1(-(d / used - 1) / 15))
        assert law.predict(n_active=n, tokens=fresh).loss_nats > held.loss_nats
    runs = propose(law, {"n_active": 1e10, "tokens": 2e11}, candidates(law, 1e20), count=2)
    assert len(runs) == 2
