"""Laws: recovery, invariances, bounds, optimum, health, round trip, refusals. Synthetic tables only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from escala.contract.errors import LawError
from escala.laws import Law, Objective, fit_law, isoflop_parabolas, slices
from escala.laws.forms import FORMS
from escala.laws.powers import loss_and_jacobian, losses, make_features
from escala.laws.priors import LITERATURE, read_priors

# Besiroglu et al. (2024), the corrected Chinchilla law; c, zeta, rho, q, eta are our own.
TRUTH = {
    "L_inf": 1.8172,
    "a": 482.01,
    "alpha": 0.3478,
    "b": 2085.43,
    "beta": 0.3658,
    "c": 5.0,
    "zeta": 0.5,
    "rho": 0.47,
    "q": 0.2,
    "eta": 0.9,
    "gamma": 0.45,
}


def sweep(form: str = "nd", n: int = 60, noise: float = 0.005, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    compute, ratio = 10 ** rng.uniform(17, 20, n), 20 * 10 ** rng.uniform(-0.75, 0.75, n)
    table = pd.DataFrame({"n_active": np.sqrt(compute / 6 / ratio)})
    table["tokens"] = compute / 6 / table.n_active
    table["n_total"] = table.n_active * (rng.choice([1.0, 2, 4, 8, 16], n) if "moe" in form else 1.0)
    table["context_tokens"] = 2.0 ** rng.integers(7, 13, n)
    table["capacity_factor"] = rng.choice([0.5, 0.75, 1.0, 1.5, 2.0], n)
    table["compute_flops"] = compute
    size = table.n_active * ((table.n_total / table.n_active) ** TRUTH["rho"] if "moe" in form else 1.0)
    loss = TRUTH["L_inf"] + TRUTH["a"] * size ** -TRUTH["alpha"]
    loss = loss + TRUTH["b"] * table.tokens ** -TRUTH["beta"]
    if form == "ndt":
        loss = loss + TRUTH["c"] * table.context_tokens ** -TRUTH["zeta"]
    if form == "moe_cf":
        loss = loss + TRUTH["q"] * table.capacity_factor ** -TRUTH["eta"]
    if form == "interaction":
        parts = (TRUTH["a"] * size ** -TRUTH["alpha"], TRUTH["b"] * table.tokens ** -TRUTH["beta"])
        loss = TRUTH["L_inf"] + sum(part ** (1 / TRUTH["gamma"]) for part in parts) ** TRUTH["gamma"]
    if form == "c":
        loss = 1.8 + 300.0 * table.compute_flops**-0.14
    if form == "t":
        loss = TRUTH["L_inf"] + TRUTH["c"] * table.context_tokens ** -TRUTH["zeta"]
    if form == "joules":
        table["energy_joules"] = 1e-11 * compute * rng.uniform(0.5, 2.0, n)
        loss = 1.8 + 300.0 * table.energy_joules**-0.14
    table["loss_nats"] = loss * np.exp(noise * rng.standard_normal(n))
    return table


@pytest.mark.parametrize("form", sorted(FORMS))
def test_noise_free_points_give_the_law_back(form):
    law = fit_law(sweep(form, 80, noise=0.0), form, bootstrap=0)
    truth = {"L_inf": 1.8, "a": 300.0, "alpha": 0.14} if form in ("c", "joules") else TRUTH
    for name, value in law.parameters.items():
        assert value == pytest.approx(truth[name], rel=1e-4), name
    assert law.objective_value < 1e-14


@pytest.mark.parametrize("form", sorted(FORMS))
def test_gradients_match_finite_differences(form):
    table = sweep(form, 9)
    chosen = FORMS[form]
    columns = {name: table["n_active" if name == "size" else name].to_numpy() for name in chosen.columns}
    features = make_features(chosen, columns)
    theta = np.linspace(0.3, 0.9, len(chosen.names))[None]
    _, jacobian = loss_and_jacobian(chosen, theta, features)
    for i in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[0, i] = 1e-6
        numeric = (losses(chosen, theta + step, features) - losses(chosen, theta - step, features)) / 2e-6
        np.testing.assert_allclose(jacobian[0, i], numeric[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("delta", [1e-3, 1e-8])
def test_units_change_coefficients_only(delta):
    table = sweep(n=40)
    objective = Objective(huber_delta=delta)
    first = fit_law(table, objective=objective, bootstrap=0)
    scaled = table.assign(n_active=table.n_active * 1e-6, tokens=table.tokens * 1e-9)
    second = fit_law(scaled, objective=objective, bootstrap=0)
    assert second.objective_value == pytest.approx(first.objective_value, rel=1e-10)
    assert second.parameters["alpha"] == pytest.approx(first.parameters["alpha"], rel=1e-6)
    factor = 1e-6 ** first.parameters["alpha"]
    assert second.parameters["a"] == pytest.approx(first.parameters["a"] * factor, rel=1e-5)


def test_a_point_of_weight_two_is_a_point_twice():
    from escala.laws.search import best_fit
    from escala.laws.solve import Problem, minimise

    table = sweep(n=30)
    doubled = pd.concat([table, table.iloc[:10]])
    law = fit_law(doubled, bootstrap=0)
    form = FORMS["nd"]
    columns = {"size": table.n_active.to_numpy(), "tokens": table.tokens.to_numpy()}
    low, high = form.bounds()
    none = np.zeros(len(low))
    features = make_features(form, columns)
    problem = Problem(
        form, features, table.loss_nats.to_numpy(), Objective(), low, high, none > 0, none, none
    )
    weights = np.where(np.arange(30) < 10, 2.0, 1.0)[None]
    theta, value = minimise(problem, best_fit(problem)[0][None], weights, 1e-3)
    assert value[0] == pytest.approx(law.objective_value, rel=1e-9)
    assert theta[0, 3] == pytest.approx(law.parameters["alpha"], rel=1e-6)


def test_the_fit_depends_on_no_seed_and_the_intervals_on_theirs():
    table = sweep(n=30)
    one, two, again = (fit_law(table, bootstrap=50, seed=s) for s in (1, 2, 1))
    assert one.parameters == two.parameters
    assert one.intervals(0.9) == again.intervals(0.9) != two.intervals(0.9)


def test_coverage_of_fifty_repetitions():
    inside, named = [], {name: [] for name in FORMS["nd"].names}
    for seed in range(50):
        law = fit_law(sweep(n=50, seed=seed), bootstrap=100, seed=seed)
        size, tokens = np.sqrt(1e21 / 120), 20 * np.sqrt(1e21 / 120)
        truth = 1.8172 + 482.01 * size**-0.3478 + 2085.43 * tokens**-0.3658
        obtained = truth * np.exp(0.005 * np.random.default_rng([7, seed]).standard_normal())
        answer = law.predict(n_active=size, tokens=tokens)
        inside.append(answer.low_nats <= obtained <= answer.high_nats)
        for name, (low, high) in law.intervals(0.9).items():
            named[name].append(low <= TRUTH[name] <= high)
    for name, hits in {**named, "predict": inside}.items():
        assert 0.78 <= np.mean(hits) <= 1.0, name


def test_groups_widen_intervals_of_dependent_points():
    rng = np.random.default_rng(3)
    table = sweep(n=24, noise=0.0)
    rows = pd.concat([table.assign(run=range(24), tokens=table.tokens * f) for f in (0.4, 0.6, 0.8, 1.0)])
    clean = TRUTH["L_inf"] + TRUTH["a"] * rows.n_active**-0.3478 + TRUTH["b"] * rows.tokens**-0.3658
    rows["loss_nats"] = clean * np.exp(0.005 * rng.standard_normal(24)[rows.run])
    rows["row"] = range(len(rows))
    width = {}
    for group in ("row", "run"):
        low, high = fit_law(rows, bootstrap=200, group=group).intervals(0.9)["alpha"]
        width[group] = high - low
    assert width["run"] > 1.3 * width["row"]


@pytest.mark.parametrize(
    ("form", "extra"),
    [("nd", {}), ("ndt", {"context_tokens": 1024.0}), ("moe", {"n_total_over_active": 8.0})],
)
def test_optimum_is_the_numeric_one(form, extra):
    law = fit_law(sweep(form), form, bootstrap=30)
    found = law.optimum(1e21, kappa=6.5, **extra)

    def loss(log_n: float) -> float:
        size = np.exp(log_n)
        point = {
            "n_active": size,
            "n_total": 8.0 * size,
            "tokens": 1e21 / 6.5 / size,
            "context_tokens": 1024.0,
        }
        return float(law.curve({name: np.array([value]) for name, value in point.items()})[0])

    best = minimize_scalar(loss, bounds=(10, 35), method="bounded", options={"xatol": 1e-10})
    assert found.loss_nats == pytest.approx(best.fun, rel=1e-10)
    assert np.log(found.n_active) == pytest.approx(best.x, abs=1e-5)
    assert abs(found.first_order_residual) < 1e-6
    assert found.n_active * found.tokens * 6.5 == pytest.approx(1e21)
    assert found.n_active_low < found.n_active < found.n_active_high
    assert found.low_nats < found.loss_nats < found.high_nats
    assert found.extrapolation["compute_flops"] > 9


def test_an_optimum_that_no_number_holds_is_refused_and_leaves_out_its_replicates():
    law = fit_law(sweep(), bootstrap=60)
    found = law.optimum(1e21)
    flat = {**law.parameters, "alpha": 2e-6, "beta": 1e-6, "a": 1e3 * law.parameters["a"]}
    with pytest.raises(LawError, match="no optimum that a number holds"):
        law.form.optimum(flat, 1e21)
    replicates_BP = law.replicates_BP.copy()
    replicates_BP[0] = [flat[name] for name in law.form.names]
    again = replace(law, replicates_BP=replicates_BP).optimum(1e21)
    assert again.n_active == found.n_active
    assert again.n_active_low == pytest.approx(found.n_active_low, rel=0.1)
    assert again.n_active_high == pytest.approx(found.n_active_high, rel=0.1)


def test_json_round_trip_is_exact():
    table = sweep("moe", 40).assign(note=["a", None] * 20, seed=range(40))
    table.loc[3, "loss_nats"] = np.inf
    law = fit_law(table, "moe", bootstrap=40)
    back = Law.from_json(law.to_json())
    assert back.parameters == law.parameters
    assert back.intervals() == law.intervals()
    assert back.settings == law.settings
    point = {"n_active": 1e9, "n_total": 4e9, "tokens": 2e10}
    assert back.predict(0.8, **point) == law.predict(0.8, **point)
    assert back.objective == law.objective
    pd.testing.assert_frame_equal(back.points, law.points, check_dtype=False)
    pd.testing.assert_frame_equal(back.points.select_dtypes("float"), law.points.select_dtypes("float"))
    assert back.refused.loss_nats.tolist() == [np.inf]
    with pytest.raises(LawError, match=r"no law\.json"):
        Law.from_json('{"version": 1}')


def test_refused_points_keep_their_reason():
    table = sweep(n=30)
    table.loc[[0, 1, 2], "loss_nats"] = [np.nan, np.inf, -1.0]
    table.loc[3, "tokens"] = 0.0
    law = fit_law(table, bootstrap=0)
    assert len(law.points) == 26
    assert law.refused.reason.tolist() == [
        "loss_nats is missing or not a number",
        "loss_nats is infinite",
        "loss_nats is not positive",
        "tokens is not positive",
    ]
    assert any("4 of 30 points were refused" in finding for finding in law.findings)


def test_fixed_and_priors():
    table = sweep(n=40)
    law = fit_law(table, fixed={"alpha": 0.3, "L_inf": 1.9, "b": 1500.0}, bootstrap=20)
    assert [law.parameters[name] for name in ("alpha", "L_inf", "b")] == [0.3, 1.9, 1500.0]
    free = fit_law(table, bootstrap=0)
    loose = fit_law(table, priors={"alpha": (1.0, 1e4), "a": (0.0, 1e4)}, bootstrap=0)
    assert loose.parameters["alpha"] == pytest.approx(free.parameters["alpha"], rel=1e-3)
    tight = fit_law(table, priors={"alpha": (0.5, 1e-5), "b": (np.log(1000.0), 1e-5)}, bootstrap=0)
    assert tight.parameters["alpha"] == pytest.approx(0.5, rel=1e-3)
    assert tight.parameters["b"] == pytest.approx(1000.0, rel=1e-3)
    assert tight.objective_value > free.objective_value
    moved = f"prior alpha ~ 0.5 +- 1e-05 (stated) moved alpha from {free.parameters['alpha']:.3g} to 0.5"
    assert moved in tight.findings
    assert any(
        finding.startswith("prior log b ~ 6.90776 +- 1e-05 (stated) moved b") for finding in tight.findings
    )
    few = fit_law(table[:4], priors=LITERATURE, bootstrap=0)
    assert any("without priors the points determine no law" in finding for finding in few.findings)


def test_priors_are_read_and_their_means_drawn_again():
    assert read_priors(["alpha=0.5,0.2", "L_inf=0.6,0.1"], "literature") == {
        "alpha": (0.5, 0.2),
        "beta": LITERATURE["beta"],
        "L_inf": (0.6, 0.1),
    }
    for bad in ("alpha", "alpha=1", "=1,1", "alpha=1,0", "alpha=1,x", "alpha=1,2,3", "alpha=nan,1"):
        with pytest.raises(LawError, match="NAME=MEAN,SD"):
            read_priors([bad])
    with pytest.raises(LawError, match="two priors"):
        read_priors(["alpha=1,1", "alpha=2,1"])
    with pytest.raises(LawError, match="no priors 'mine'"):
        read_priors([], "mine")
    law = fit_law(sweep(n=12, noise=0.03), priors={"alpha": (0.35, 0.02)}, bootstrap=200)
    low, high = law.intervals()["alpha"]
    assert high - low == pytest.approx(2 * 1.645 * 0.02, rel=0.3)  # the points say nothing: the prior's own


@pytest.mark.parametrize("size", ["n_total", "n_non_embedding"])
def test_size_chooses_the_n(size):
    table = sweep(n=40).assign(n_total=lambda t: t.n_active + 1e6, n_non_embedding=lambda t: t.n_active * 0.7)
    law = fit_law(table, size=size, bootstrap=10)
    assert law.size == size
    assert law.predict(**{size: 1e8, "tokens": 1e9}).loss_nats > law.parameters["L_inf"]
    with pytest.raises(LawError, match=size):
        law.predict(n_active=1e8, tokens=1e9)


def test_what_the_data_do_not_identify_is_said():
    table = sweep("ndt", 40).assign(context_tokens=512.0)
    law = fit_law(table, "ndt", bootstrap=50)
    assert not law.healthy
    assert any("context_tokens was never varied" in finding for finding in law.findings)
    along = sweep(n=40)
    along = along.assign(tokens=20 * along.n_active)
    assert not fit_law(along, bootstrap=50).healthy
    assert any("few points" in f for f in fit_law(sweep(n=9), bootstrap=50).findings)
    assert fit_law(sweep(n=60), bootstrap=100).healthy


def test_several_regimes_are_not_healthy():
    table = sweep(n=120)
    table.loc[:11, "loss_nats"] *= np.linspace(1.2, 1.9, 12)
    law = fit_law(table.assign(epochs=np.where(np.arange(120) < 12, 40.0, 1.0)), bootstrap=50)
    assert not law.healthy
    assert any("not one regime" in finding for finding in law.findings)


def test_backtest_beats_its_baselines():
    law = fit_law(sweep(n=80, noise=0.002), bootstrap=100)
    result = law.backtest()
    assert result.test_points == 8
    assert result.error < 0.006
    assert result.ratio < 0.5
    assert 0 <= result.covered <= 1


def test_predictive_interval_is_wider_than_that_of_the_mean():
    law = fit_law(sweep(n=60), bootstrap=200)
    wide, narrow = (f(n_active=1e8, tokens=2e9) for f in (law.predict, law.predict_mean))
    assert wide.high_nats - wide.low_nats > 1.5 * (narrow.high_nats - narrow.low_nats)
    assert narrow.loss_nats == wide.loss_nats
    assert wide.farthest == 1.0
    assert fit_law(sweep(n=20), bootstrap=0).predict(n_active=1e8, tokens=2e9).low_nats is None


def test_isoflop_parabola_states_its_bias():
    budget, sizes = 1e19, np.geomspace(3e7, 3e9, 9)
    table = pd.concat(
        [sweep(n=40, noise=0.0), pd.DataFrame({"n_active": sizes, "tokens": budget / 6 / sizes})]
    )
    table["loss_nats"] = 1.8172 + 482.01 * table.n_active**-0.3478 + 2085.43 * table.tokens**-0.3658
    law = fit_law(table, bootstrap=0)
    parabola = next(p for p in isoflop_parabolas(law, tolerance=1e-6) if p.points == 9)
    assert parabola.best_size / law.optimum(budget).n_active == pytest.approx(parabola.bias_factor, rel=1e-3)
    along = slices(
        fit_law(table.assign(tokens=1e9, loss_nats=2 + 400 * table.n_active**-0.35), bootstrap=0), "n_active"
    )
    assert along[0].exponent == pytest.approx(0.35, rel=1e-3)


def test_every_bad_question_is_refused():
    nd = fit_law(sweep(n=30), bootstrap=0)
    moe = fit_law(sweep("moe", 30), "moe", bootstrap=0)
    ndt = fit_law(sweep("ndt", 30), "ndt", bootstrap=0)
    c = fit_law(sweep("c", 30), "c", bootstrap=0)
    cf = fit_law(sweep("moe_cf", 40), "moe_cf", bootstrap=0)
    for law, extra in [
        (moe, {}),
        (ndt, {}),
        (c, {}),
        (cf, {"n_total_over_active": 8.0}),
        (nd, {"kappa": -1.0}),
    ]:
        with pytest.raises(LawError):
            law.optimum(1e20, **extra)
    with pytest.raises(LawError, match="ratio"):
        moe.optimum(1e20, n_total_over_active=0.5)
    with pytest.raises(LawError, match="needs tokens"):
        nd.predict(n_active=1e9)
    with pytest.raises(LawError, match="no input"):
        nd.predict(n_active=1e9, tokens=1e9, temperature=1.0)
    with pytest.raises(LawError, match="positive"):
        nd.predict(n_active=-1.0, tokens=1e9)
    with pytest.raises(LawError, match="bootstrap"):
        nd.intervals()
    with pytest.raises(LawError, match="level"):
        fit_law(sweep(n=30), bootstrap=5).predict(1.5, n_active=1e9, tokens=1e9)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"form": "cubic"}, "no form"),
        ({"size": "width"}, "size"),
        ({"fixed": {"gamma": 1.0}}, "no parameter"),
        ({"fixed": {"alpha": 3.0}}, "cannot be fixed"),
        ({"priors": {"alpha": (0.3, 0.0)}}, "prior"),
        ({"fixed": {"alpha": 0.3}, "priors": {"alpha": (0.3, 0.1)}}, "both"),
        ({"bootstrap": -1}, "bootstrap"),
        ({"bootstrap": 10**9}, "at most 100,000"),
        ({"seed": -1}, "seed"),
        ({"group": "run"}, "lacks run"),
        ({"points": sweep(n=30).drop(columns="tokens")}, "lacks tokens"),
        ({"points": sweep(n=3)}, "cannot determine"),
        ({"points": sweep(n=30).assign(loss_nats=np.nan)}, "No usable point"),
        ({"points": sweep(n=30).assign(tokenizer_fingerprint=["a", "b"] * 15)}, "tokenizer_fingerprint"),
        ({"points": sweep(n=30).assign(evaluation_fingerprint=["a", None] * 15)}, "evaluation_fingerprint"),
        ({"points": [1, 2]}, "DataFrame"),
    ],
)
def test_every_bad_fit_is_refused(change, match):
    with pytest.raises(LawError, match=match):
        fit_law(**{"points": sweep(n=30), "bootstrap": 0, **change})


def test_bad_objectives_are_refused():
    for bad in ({"space": "cube"}, {"huber_delta": 0.0}, {"huber_delta": float("nan")}):
        with pytest.raises(LawError):
            Objective(**bad)
