"""The next run: the information formula against a Bayesian reference, the look-ahead, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from escala.contract.errors import LawError
from escala.laws import Law, fit_law
from escala.laws.solve import Objective
from escala.planning.allocate import allocate
from escala.planning.limits import Budget, Chi, Limits
from escala.planning.propose import (
    candidates,
    information,
    noise_variance,
    observe,
    propose,
    shadow_price,
    winsorised_covariance,
)

TARGET = {"n_active": 2e9, "tokens": 8e10}
RunPoint = tuple[float, float]


def true_loss(points: np.ndarray) -> np.ndarray:
    return 1.8172 + 482.01 * points[:, 0] ** -0.3478 + 2085.43 * points[:, 1] ** -0.3658


def pilot() -> list[RunPoint]:
    return [
        (np.sqrt(c / 6 / r), np.sqrt(c / 6 * r)) for c in (1e15, 3e15, 1e16) for r in (5.0, 10.0, 40.0, 80.0)
    ]


def fitted(points: list[RunPoint], seed: int, bootstrap: int = 100) -> Law:
    noise = 0.004 * np.random.default_rng(seed).standard_normal(len(points))
    table = pd.DataFrame(points, columns=["n_active", "tokens"])
    return fit_law(
        table.assign(loss_nats=true_loss(np.array(points)) * np.exp(noise)), bootstrap=bootstrap, seed=seed
    )


@pytest.fixture(scope="module")
def law() -> Law:
    return fitted(pilot(), 0)


def test_information_is_that_of_a_bayesian_linear_model() -> None:
    """theta ~ N(0, prior), m = c.theta, y_k = f_k.theta + noise: the posterior by inverting precisions."""
    rng = np.random.default_rng(1)
    root, rows, noise = rng.standard_normal((4, 4)), rng.standard_normal((6, 4)), 0.3
    prior = root @ root.T
    joint = rows @ prior @ rows.T  # row 0 is the target
    precision = np.linalg.inv(prior)
    for k in range(5):
        after = np.linalg.inv(precision + np.outer(rows[k + 1], rows[k + 1]) / noise)
        expected = 0.5 * np.log(joint[0, 0] / (rows[0] @ after @ rows[0]))
        assert information(joint, noise)[k] == pytest.approx(expected, rel=1e-10)
        assert observe(joint, k, noise) == pytest.approx(rows @ after @ rows.T, rel=1e-8, abs=1e-10)
    both = np.linalg.inv(precision + rows[1:3].T @ rows[1:3] / noise)
    assert observe(observe(joint, 0, noise), 1, noise)[0, 0] == pytest.approx(rows[0] @ both @ rows[0])


def test_a_candidate_that_says_nothing_of_the_target_scores_zero() -> None:
    covariance = np.array([[2.0, 0.0, 1.0], [0.0, 5.0, 0.0], [1.0, 0.0, 1.0]])
    assert information(covariance, 0.1)[0] == 0.0
    assert information(covariance, 0.1)[1] > 0.0


def test_winsorised_covariance_is_the_covariance_of_normal_draws_but_not_of_outliers() -> None:
    rng = np.random.default_rng(2)
    true = np.array([[1.0, 0.6], [0.6, 2.0]])
    draws_BK = rng.multivariate_normal([1.0, -1.0], true, 20_000)
    assert winsorised_covariance(draws_BK) == pytest.approx(true, abs=0.06)
    draws_BK[:100] = 1e3
    assert winsorised_covariance(draws_BK) == pytest.approx(true, abs=0.1)


def test_noise_is_found_where_the_near_l1_fit_leaves_zeros() -> None:
    """A near-L1 fit needs 1.39 times the runs of least squares at delta = sigma/4; at a large delta, as many."""
    law = fitted(pilot() * 4, 3)
    assert noise_variance(law) == pytest.approx(1.39 * 0.004**2, rel=0.5)
    smooth = replace(law, objective=Objective(huber_delta=1.0))
    sigma = float(np.quantile(np.abs(law.residual_draws_B), 0.6827))
    assert noise_variance(smooth) == pytest.approx(sigma**2)
    nearly_l1 = replace(law, objective=Objective(huber_delta=1e-9))
    assert noise_variance(nearly_l1) == pytest.approx(np.pi / 2 * sigma**2)


def test_few_runs_are_worth_dearer_ones_and_many_are_not() -> None:
    """One uninformative cheap candidate, one dear: repeats of the cheap one arrive only with many runs."""
    variances, cost_K = np.array([1.0, 1.0, 1.0]), np.array([1.0, 100.0])
    covariance = np.sqrt(np.outer(variances, variances))  # both measure the target itself,
    covariance[:, 1] *= 0.3  # the cheap one faintly
    covariance[1, :] *= 0.3
    assert shadow_price(covariance, cost_K, 1.0, 0.2, 60) == 0.0
    dear = shadow_price(covariance, cost_K, 1.0, 0.2, 5)
    assert dear > 0.0
    assert int(np.argmax(information(covariance, 1.0) / (cost_K + dear))) == 1
    assert shadow_price(covariance, cost_K, 1.0, 1e-6, 1) == 100.0  # out of reach: the highest


def test_candidates_keep_every_bound(law: Law) -> None:
    columns = candidates(law, 1e18, min_flops=2e15, tokens_per_parameter=(3.0, 90.0), reach=4.0)
    flops, ratio = 6 * columns["n_active"] * columns["tokens"], columns["tokens"] / columns["n_active"]
    assert flops.max() <= 1e18 * (1 + 1e-12)
    assert flops.min() >= 2e15 * (1 - 1e-12)
    assert ratio.min() >= 3.0 * (1 - 1e-12)
    assert ratio.max() <= 90.0 * (1 + 1e-12)
    low, high = law.ranges["n_active"]
    assert columns["n_active"].min() >= low / 4
    assert columns["n_active"].max() <= high * 4
    assert len({len(column) for column in columns.values()}) == 1


@pytest.mark.parametrize("most", [3e15, 1e16, 2e17])
def test_no_run_beyond_the_largest_is_proposed(law: Law, most: float) -> None:
    for run in propose(law, TARGET, candidates(law, most), count=4, runs=4, width=0.02):
        assert run.compute_flops <= most * (1 + 1e-12)


def test_a_batch_does_not_repeat_itself_and_each_run_adds(law: Law) -> None:
    columns = candidates(law, 1e18)
    batch = propose(law, TARGET, columns, count=5)
    assert len({(run.n_active, run.tokens) for run in batch}) == 5
    widths = [batch[0].width_now, *(run.width_expected for run in batch)]
    assert all(after < before for before, after in pairwise(widths))
    answer = law.predict_mean(0.9, **TARGET)
    assert answer.low_nats is not None
    assert answer.high_nats is not None
    assert batch[0].width_now == pytest.approx((answer.high_nats - answer.low_nats) / answer.loss_nats)
    total = sum(run.information_nats for run in batch)
    assert batch[-1].width_expected == pytest.approx(batch[0].width_now * np.exp(-total))


def test_a_proposal_is_the_same_every_time(law: Law) -> None:
    columns = candidates(law, 1e18)
    assert propose(law, TARGET, columns, count=3) == propose(law, TARGET, columns, count=3)


def test_costs_in_another_unit_change_the_numbers_only(law: Law) -> None:
    columns = candidates(law, 1e18)
    flops = propose(law, TARGET, columns, count=3)
    dollars = propose(law, TARGET, columns, count=3, cost=lambda c: 1e-15 * c["compute_flops"], unit="USD")
    for one, other in zip(flops, dollars, strict=True):
        assert (one.n_active, one.tokens, one.information_nats) == (
            other.n_active,
            other.tokens,
            other.information_nats,
        )
        assert other.cost == pytest.approx(1e-15 * one.cost)
        assert other.information_per_cost == pytest.approx(1e15 * one.information_per_cost)
        assert other.unit == "USD"


def test_predicted_loss_is_the_law_s(law: Law) -> None:
    run = propose(law, TARGET, candidates(law, 1e18))[0]
    answer = law.predict(0.9, n_active=run.n_active, tokens=run.tokens)
    assert (run.predicted_loss_nats, run.low_nats, run.high_nats) == (
        answer.loss_nats,
        answer.low_nats,
        answer.high_nats,
    )


@pytest.mark.parametrize("aim", ["loss", "n_active"])
def test_a_budget_is_a_target(law: Law, aim: str) -> None:
    columns = candidates(law, 1e18)
    by_number = propose(law, 1e21, columns, aim=aim, count=2)
    limits = Limits(compute_flops=1e21)
    assert by_number == propose(law, Budget(limits), columns, aim=aim, count=2)
    best = allocate(law, limits)
    if aim == "loss":
        assert by_number == propose(law, {"n_active": best.n_active, "tokens": best.tokens}, columns, count=2)
        far = Budget(limits, chi=Chi(1.0, 0.3), context_tokens=4096.0)
        there = allocate(law, **vars(far))
        assert there.n_active < 0.95 * best.n_active
        assert propose(law, far, columns, count=2) == propose(law, there.point("n_active"), columns, count=2)
    elif best.n_active_low is not None and best.n_active_high is not None:
        width = (best.n_active_high - best.n_active_low) / best.n_active
        assert by_number[0].width_now == pytest.approx(width)


@pytest.mark.parametrize("form", ["ndt", "moe"])
def test_other_forms(form: str) -> None:
    rng = np.random.default_rng(4)
    points = np.array(pilot() * 2)
    table = pd.DataFrame(points, columns=["n_active", "tokens"])
    table["n_total"] = table["n_active"] * rng.choice([1.0, 4.0, 16.0], len(table))
    table["context_tokens"] = rng.choice([256.0, 1024.0], len(table))
    table["loss_nats"] = true_loss(points) * np.exp(0.004 * rng.standard_normal(len(table)))
    law = fit_law(table, form, bootstrap=40)
    extra = {"context_tokens": [256.0, 1024.0]} if form == "ndt" else {"n_total_over_active": 8.0}
    columns = candidates(law, 1e18, **extra)  # type: ignore[arg-type]
    point = {**TARGET, "n_total": 1.6e10, "context_tokens": 1024.0}
    run = propose(law, point, columns)[0]
    assert run.n_total == pytest.approx(run.n_active * (8.0 if form == "moe" else 1.0))
    assert run.context_tokens in ([256.0, 1024.0] if form == "ndt" else [None])
    assert run.width_expected < run.width_now


def test_what_cannot_be_answered_is_refused(law: Law) -> None:
    columns = candidates(law, 1e18)
    with pytest.raises(LawError, match="needs a bootstrap"):
        propose(fitted(pilot(), 0, bootstrap=0), TARGET, columns)
    with pytest.raises(LawError, match="no aim"):
        propose(law, TARGET, columns, aim="fun")
    with pytest.raises(LawError, match="belongs to a budget"):
        propose(law, TARGET, columns, aim="n_active")
    with pytest.raises(LawError, match="needs tokens"):
        propose(law, {"n_active": 1e9}, columns)
    with pytest.raises(LawError, match="lack tokens"):
        propose(law, TARGET, {"n_active": columns["n_active"]})
    with pytest.raises(LawError, match="differ in length"):
        propose(law, TARGET, {**columns, "tokens": columns["tokens"][:3]})
    with pytest.raises(LawError, match="at least 1"):
        propose(law, TARGET, columns, count=0)
    with pytest.raises(LawError, match="cannot be reached"):
        propose(law, TARGET, columns, width=0.0)
    with pytest.raises(LawError, match="costs for"):
        propose(law, TARGET, columns, cost=[1.0])
    with pytest.raises(LawError, match="not a positive number"):
        propose(law, TARGET, columns, cost=lambda c: 0.0 * c["tokens"])
    with pytest.raises(LawError, match="10000 runs of"):
        propose(law, TARGET, columns, count=10_000)
    with pytest.raises(LawError, match="no such range"):
        candidates(law, -1.0)
    with pytest.raises(LawError, match="N within"):
        candidates(law, 1e30, min_flops=1e29)


def test_proposals_narrow_the_interval_more_than_random_runs() -> None:
    """Same number of runs; the random ones may cost as much each, and are drawn from the same candidates."""
    ours, randoms = [], []
    for seed in range(3):
        points, others, rng = pilot(), pilot(), np.random.default_rng(seed)
        for made in range(8):
            law = fitted(points, seed)
            columns = candidates(law, 1e17, min_flops=1e15, reach=100.0)
            run = propose(law, TARGET, columns, width=0.05, runs=8 - made)[0]
            points.append((run.n_active, run.tokens))
            k = rng.integers(len(columns["tokens"]))
            others.append((columns["n_active"][k], columns["tokens"][k]))
        for runs, out in ((points, ours), (others, randoms)):
            answer = fitted(runs, seed).predict_mean(0.9, **TARGET)
            assert answer.low_nats is not None
            assert answer.high_nats is not None
            out.append(answer.high_nats - answer.low_nats)
    assert np.mean(ours) < np.mean(randoms)
