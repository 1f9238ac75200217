"""Rolling backtests: what they hold back, how the interval grows beyond the data, health, records, regimes."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from escala.cli.render_laws import backtest_lines
from escala.laws import Law, fit_law
from escala.laws.calibrate import TAU_G, bias_draws
from escala.laws.note import note
from escala.laws.rolling import distance, problems, trimmed, wilson
from escala.views.laws import RollingView
from tests.unit.test_laws import sweep


@pytest.fixture(scope="module")
def law() -> Law:
    return fit_law(sweep(n=60), bootstrap=200)


def bent(n: int = 60) -> pd.DataFrame:
    """Points of no law of this form: the recipe loses ever more of the loss beyond 1e18 FLOPs."""
    table = sweep(n=n, noise=0.001)
    table["loss_nats"] *= np.exp(0.01 * np.maximum(np.log(table.compute_flops / 1e18), 0.0) ** 2)
    return table


def test_a_cut_is_asked_of_larger_points_alone_and_up_to_the_next(law: Law) -> None:
    rolling = law.rolling
    assert rolling is not None
    points = law.points
    for cut in rolling.cuts:
        tested = points.iloc[list(cut.rows)][cut.by]
        assert (tested > cut.largest).all()
        assert cut.train_points == (points[cut.by] <= cut.largest).sum()
        assert len(cut.rows) == len(cut.errors) == len(cut.low) == len(cut.high) == len(cut.factors)
        assert all(low <= 0.0 <= high for low, high in zip(cut.low, cut.high, strict=True))
    for by in ("n_active", "tokens", "compute_flops"):
        rows = [row for cut in rolling.cuts if cut.by == by for row in cut.rows]
        assert rows
        assert len(rows) == len(set(rows))


def test_the_interval_grows_beyond_the_data_alone_and_the_point_does_not_move(law: Law) -> None:
    from dataclasses import replace

    plain = replace(law, rolling=None, residual_draws_B=trimmed(law.residual_draws_B))
    inside, beyond = {"n_active": 1e8, "tokens": 2e9}, {"n_active": 1e11, "tokens": 2e12}
    assert law.predict(**inside) == plain.predict(**inside)
    wide, narrow = law.predict(**beyond), plain.predict(**beyond)
    assert wide.loss_nats == narrow.loss_nats
    assert wide.high_nats - wide.low_nats > 1.05 * (narrow.high_nats - narrow.low_nats)
    assert law.predict_mean(**beyond) == plain.predict_mean(**beyond)
    assert wide.low_nats <= wide.loss_nats <= wide.high_nats


def test_a_form_that_fails_beyond_its_data_is_believed_less() -> None:
    right, wrong = fit_law(sweep(n=60, noise=0.001), bootstrap=100), fit_law(bent(), bootstrap=100)
    assert wrong.rolling.bias > 10 * right.rolling.bias
    assert not wrong.healthy
    assert any("interval; at least 75% are needed" in f for f in wrong.findings)


def test_the_bias_follows_what_the_cuts_say_of_tau() -> None:
    rng = np.random.default_rng(0)
    prior = np.abs(bias_draws([], 1000, rng))
    small, large = (
        np.abs(bias_draws([-0.5 * (np.log(TAU_G / tau) / 0.1) ** 2], 1000, rng)) for tau in (1e-3, 3e-2)
    )
    assert np.quantile(small, 0.68) == pytest.approx(1e-3, rel=0.1)
    assert np.quantile(large, 0.68) == pytest.approx(3e-2, rel=0.1)
    assert 0.002 < np.quantile(prior, 0.68) < 0.02
    assert len(bias_draws([], 0, rng)) == 0


def test_distance_is_the_largest_log_and_half_of_a_products() -> None:
    assert distance({"n_active": np.e, "tokens": 1.0}) == pytest.approx(1.0)
    assert distance({"n_active": 2.0, "compute_flops": 16.0}) == pytest.approx(np.log(4.0))
    assert distance({}) == 0.0


def test_a_law_with_few_points_is_not_healthy_and_says_how_many() -> None:
    found = fit_law(sweep(n=12), bootstrap=60)
    assert found.rolling.points < 8
    assert not found.healthy
    assert any(f.startswith(f"backtest: only {found.rolling.points} points") for f in found.findings)
    assert fit_law(sweep(n=20), bootstrap=60).rolling.points >= 8
    assert fit_law(sweep(n=20), bootstrap=0).rolling is None
    assert fit_law(sweep(n=20), bootstrap=60, backtests=False).rolling is None


def test_an_input_of_one_value_has_no_cut() -> None:
    found = fit_law(sweep("ndt", 40).assign(context_tokens=512.0), "ndt", bootstrap=40)
    assert {cut.by for cut in found.rolling.cuts} == {"n_active", "tokens", "compute_flops"}


def test_a_law_whose_past_failed_is_not_healthy(law: Law) -> None:
    from dataclasses import replace

    rolling = law.rolling
    assert problems(rolling) == problems(None) == []
    off = replace(rolling, cuts=tuple(replace(c, low=c.high) for c in rolling.cuts))
    assert "predictions of larger runs lie inside" in problems(off)[0]


def test_the_record_comes_back_and_an_older_one_says_that_it_has_none(law: Law) -> None:
    back = Law.from_json(law.to_json())
    assert back.rolling.cuts == law.rolling.cuts
    assert back.predict(n_active=1e11, tokens=1e12) == law.predict(n_active=1e11, tokens=1e12)
    old = json.loads(law.to_json()) | {"version": 1}
    del old["rolling"]
    read = Law.from_json(json.dumps(old))
    assert read.rolling is None
    assert read.healthy is law.healthy
    assert "not backtested" in read.findings[-1]
    assert read.parameters == law.parameters


def test_wilson_is_that_of_scipy() -> None:
    from scipy.stats import binomtest

    found = binomtest(18, 20).proportion_ci(0.95, method="wilson")
    assert wilson(0.9, 20) == pytest.approx((found.low, found.high))
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_people_read_the_backtest_and_its_coverage(law: Law) -> None:
    view = RollingView.of_rolling(law.rolling)
    lines = backtest_lines(view)
    assert [line.split()[0] for line in lines] == ["backtest"] * 3 + ["coverage", "bias"]
    assert f"{view.predictions} predictions of {view.points} points" in lines[3]
    assert view.coverage_low < view.coverage < view.coverage_high
    assert backtest_lines(None) == []
    said = note(law, "small@1", {"points": 60, "refused": 0, "sources": []})
    assert "## Backtest" in said
    assert "Coverage" in said


def test_short_runs_and_rounded_losses_are_named() -> None:
    table = sweep(n=60)
    short = table.iloc[:8].assign(tokens=lambda t: 2 * t.n_active)
    short["loss_nats"] = 1.1 * (1.8172 + 482.01 * short.n_active**-0.3478 + 2085.43 * short.tokens**-0.3658)
    found = fit_law(pd.concat([table, short]), bootstrap=0)
    assert any("fewer than 6.7 tokens per parameter" in f for f in found.findings)
    rounded = fit_law(sweep(n=60, noise=0.0).round({"loss_nats": 2}), bootstrap=0)
    assert any(f.startswith("digitised: the losses have 2 decimals") for f in rounded.findings)
    assert not [f for f in fit_law(table, bootstrap=0).findings if f.startswith(("regime", "digitised"))]
