"""The best split under limits, against closed forms and brute force (scipy on the loss written out again)."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from escala.contract.errors import LawError
from escala.laws import Law, Objective
from escala.laws.forms import FORMS
from escala.planning.allocate import allocate, front, to_target
from escala.planning.limits import Chi, Limits, Speed
from escala.planning.plots import plot_front
from escala.planning.split import effective_tokens

# Hoffmann et al. (2022) as first printed, and Besiroglu et al. (2024); c, zeta and rho are our own.
PRINTED = {"L_inf": 1.69, "a": 406.4, "alpha": 0.34, "b": 410.7, "beta": 0.28}
CORRECTED = {"L_inf": 1.8172, "a": 482.01, "alpha": 0.3478, "b": 2085.43, "beta": 0.3658}
TRUTH = {**CORRECTED, "c": 5.0, "zeta": 0.5, "rho": 0.47}
RANGES = {
    "n_active": (1e7, 1e9),
    "tokens": (1e8, 1e11),
    "context_tokens": (128.0, 8192.0),
    "compute_flops": (1e16, 1e20),
}


def law_of(form: str, replicates: int = 0, **changed: float) -> Law:
    """A law from stated parameters, with jittered copies as its bootstrap."""
    names = FORMS[form].names
    theta_P = np.array([{**TRUTH, **changed}[name] for name in names])
    rng = np.random.default_rng(0)
    theta_BP = theta_P * np.exp(0.01 * rng.standard_normal((replicates, len(names))))
    unused = {"objective_value": 0.0, "findings": (), "settings": {}, "table": {}, "refused_table": {}}
    return Law(
        form_name=form,
        size="n_active",
        objective=Objective(),
        parameters=dict(zip(names, theta_P.tolist(), strict=True)),
        healthy=True,
        ranges=RANGES,
        replicates_BP=theta_BP,
        residual_draws_B=0.005 * rng.standard_normal(replicates),
        residual_N=np.zeros(1),
        **unused,
    )


def loss_at(n: float, d: float, t: float | None = None, unique: float = math.inf) -> float:
    """docs/theory D.1 and D.6, written out."""
    used = min(d, unique)
    fresh = used + used * 15.0 * (1.0 - math.exp(-(d / used - 1.0) / 15.0))
    loss = TRUTH["L_inf"] + TRUTH["a"] * n ** -TRUTH["alpha"] + TRUTH["b"] * fresh ** -TRUTH["beta"]
    return loss if t is None else loss + TRUTH["c"] * t ** -TRUTH["zeta"]


def chi_at(chi: Chi, n: float, t: float) -> float:
    return 1.0 + chi.scale * t * n**-chi.exponent


def loss_of_budget(n: float, t: float, limits: Limits, chi: Chi) -> tuple[float, float]:
    """Without and with the term of T, where all of 1e21 FLOPs is spent."""
    demand, unique = limits.inference_tokens or 0.0, limits.data_tokens or math.inf
    d = (1e21 - 2.0 * n * demand) / (6.0 * n * chi_at(chi, n, t))
    return (loss_at(n, d, None, unique), loss_at(n, d, t, unique)) if d > 0 else (1e3, 1e3)


def brute(loss_of, low: float = 1e6, high: float = 1e13) -> tuple[float, float]:
    """N and loss where loss_of(N) is least."""
    bounds, fine = (math.log(low), math.log(high)), {"xatol": 1e-10}
    found = minimize_scalar(lambda x: loss_of(math.exp(x)), bounds=bounds, method="bounded", options=fine)
    return math.exp(found.x), float(found.fun)


BUDGET = Limits(compute_flops=1e21)
SPEED = Speed(1e15, usd_per_hour=30.0, watts=5000.0)  # 3.6e18 FLOPs an hour


# Without limits: the closed form.


@pytest.mark.parametrize(
    ("flops", "printed", "corrected"), [(1e18, "26", "25.7"), (1e21, "50", "21.6"), (5.76e23, "93", "18.4")]
)
def test_chinchilla_ratios(flops, printed, corrected):
    limits = Limits(compute_flops=flops)
    assert f"{allocate(law_of('nd', **PRINTED), limits).tokens_per_parameter:.0f}" == printed
    assert f"{allocate(law_of('nd'), limits).tokens_per_parameter:.1f}" == corrected


@pytest.mark.parametrize("flops", [1e15, 1e21, 1e27])
@pytest.mark.parametrize(
    ("form", "changed", "context", "ratio"),
    [
        ("nd", {}, None, 64.0),
        ("nd", PRINTED, None, 64.0),
        ("nd", {"alpha": 1.2, "beta": 0.1, "a": 5e7}, None, 64.0),
        ("ndt", {}, 1024.0, 64.0),
        ("moe", {}, None, 8.0),
        ("moe", {"rho": 1.0}, None, 64.0),
    ],
)
def test_numeric_is_the_closed_form(form, changed, context, ratio, flops):
    law = law_of(form, **changed)
    closed = law.form.optimum(
        law.parameters, flops, kappa=6.5, context_tokens=context, n_total_over_active=ratio
    )
    limits = Limits(compute_flops=flops, n_total_over_active=ratio)
    plan = allocate(law, limits, kappa=6.5, context_tokens=context)
    assert plan.n_active == pytest.approx(closed.size, rel=1e-10)
    assert plan.tokens == pytest.approx(closed.tokens, rel=1e-10)
    assert plan.loss_nats == pytest.approx(closed.loss_nats, rel=1e-12)
    assert plan.n_total == pytest.approx(closed.size * (ratio if form == "moe" else 1.0), rel=1e-10)
    assert plan.compute_flops == pytest.approx(flops, rel=1e-12)
    assert plan.context_tokens == context
    assert abs(plan.residuals["N"]) < 1e-10


def test_intervals_are_the_laws_own():
    law = law_of("nd", 200)
    plan, known = allocate(law, BUDGET), law.optimum(1e21)
    assert (plan.low_nats, plan.high_nats) == pytest.approx((known.low_nats, known.high_nats))
    assert (plan.n_active_low, plan.n_active_high) == pytest.approx((known.n_active_low, known.n_active_high))
    assert plan.extrapolation == pytest.approx(known.extrapolation)
    assert plan.tokens_low < plan.tokens < plan.tokens_high
    flat_BP = law.replicates_BP[:50] * [1.0, 0.0, 1.0, 1.0, 1.0]  # no term of N, so no optimum: dropped
    theta_BP = np.vstack([law.replicates_BP, flat_BP])
    changed = Law(**{**vars(law), "replicates_BP": theta_BP, "residual_draws_B": np.zeros(250)})
    assert allocate(changed, BUDGET).n_active_low == plan.n_active_low
    bare = allocate(law_of("nd"), BUDGET)
    assert (bare.low_nats, bare.n_active_low, bare.tokens_high) == (None, None, None)


# What a model costs: chi, repeats, inference.


@pytest.mark.parametrize("chi", [Chi(0.05), Chi(0.5), Chi(20.0, 0.5), Chi(1e5, 1.0)])
def test_chi_moves_the_optimum(chi):
    plan = allocate(law_of("nd"), BUDGET, chi=chi, context_tokens=4096.0)
    assert plan.chi == pytest.approx(chi_at(chi, plan.n_active, 4096.0), rel=1e-12)
    # Larger than the split of what attention leaves, since its share falls with N.
    assert plan.n_active > law_of("nd").optimum(1e21 / plan.chi).n_active
    # alpha a N^-alpha / (1 + dlnchi/dlnN) = beta b D^-beta (docs/theory D.4), the derivative by differences
    n, d, step = plan.n_active, plan.tokens, 1e-5
    up, down = (math.log(chi_at(chi, n * math.exp(sign * step), 4096.0)) for sign in (1, -1))
    left = TRUTH["alpha"] * TRUTH["a"] * n ** -TRUTH["alpha"] / (1.0 + (up - down) / (2 * step))
    assert left == pytest.approx(TRUTH["beta"] * TRUTH["b"] * d ** -TRUTH["beta"], rel=1e-4)


@pytest.mark.parametrize(
    ("chi", "unique", "demand", "grows"),
    [
        (Chi(0.05), None, None, None),
        (Chi(20.0, 0.5), None, None, None),
        (Chi(), 1e8, None, True),
        (Chi(), 1e10, None, True),
        (Chi(), None, 1e11, False),
        (Chi(0.5), 2e9, 3e10, None),
    ],
)
def test_chi_repeats_and_inference_against_brute_force(chi, unique, demand, grows):
    limits = Limits(compute_flops=1e21, data_tokens=unique, inference_tokens=demand)
    plan = allocate(law_of("nd"), limits, chi=chi, context_tokens=2048.0)
    n, loss = brute(lambda n: loss_of_budget(n, 2048.0, limits, chi)[0])
    assert plan.n_active == pytest.approx(n, rel=1e-4)
    assert plan.loss_nats == pytest.approx(loss, rel=1e-12)
    assert plan.compute_flops + plan.inference_flops == pytest.approx(1e21, rel=1e-12)
    assert abs(plan.residuals["N"]) < 1e-10
    free = allocate(law_of("nd"), BUDGET)
    assert grows is None or grows == (plan.n_active > free.n_active)
    assert grows is None or grows == (plan.tokens_per_parameter < free.tokens_per_parameter)


def test_repeats():
    few, enough = (allocate(law_of("nd"), Limits(compute_flops=1e21, data_tokens=u)) for u in (1e9, 1e11))
    assert few.binding == ("compute_flops", "data_tokens")
    assert few.epochs == pytest.approx(few.tokens / 1e9)
    assert 1e9 < few.effective_tokens < few.tokens
    assert few.extrapolation["tokens"] == pytest.approx(max(few.tokens / 1e11, 1.0))
    assert enough.n_active == pytest.approx(allocate(law_of("nd"), BUDGET).n_active, rel=1e-10)
    assert enough.effective_tokens == enough.tokens
    assert (enough.binding, enough.epochs) == (("compute_flops",), 1.0)
    tokens = np.array([5.0, 10.0, 20.0, 1e6])
    expected = [5.0, 10.0, 10.0 + 150.0 * (1 - math.exp(-1 / 15)), 160.0]
    np.testing.assert_allclose(effective_tokens(tokens, 10.0), expected)
    np.testing.assert_array_equal(effective_tokens(tokens, math.inf), tokens)


# Which limit binds.


@pytest.mark.parametrize(
    ("limits", "binds", "flops"),
    [
        (Limits(compute_flops=1e20, usd=3000.0, hours=200.0, kwh=600.0), "compute_flops", 1e20),
        (Limits(compute_flops=1e21, usd=3000.0, hours=200.0, kwh=600.0), "usd", 3.6e20),
        (Limits(compute_flops=1e21, usd=3000.0, hours=50.0, kwh=600.0), "hours", 1.8e20),
        (Limits(compute_flops=1e21, usd=3000.0, hours=200.0, kwh=100.0), "kwh", 7.2e19),
    ],
)
def test_the_least_budget_binds(limits, binds, flops):
    plan = allocate(law_of("nd"), limits, speed=SPEED)
    assert plan.binding == (binds,)
    assert plan.compute_flops == pytest.approx(flops, rel=1e-12)
    assert plan.hours == pytest.approx(flops / 3.6e18)
    assert plan.usd == pytest.approx(30.0 * plan.hours)
    assert plan.kwh == pytest.approx(5.0 * plan.hours)


def test_hours_cover_training_only_and_two_budgets_meet_in_a_corner():
    demand = 1e11
    free = allocate(law_of("nd"), Limits(compute_flops=1e21, inference_tokens=demand), speed=SPEED)
    # Hours a little below what the other budget alone would train: the optimum sits where both bind.
    limits = Limits(compute_flops=1e21, hours=0.95 * free.hours, inference_tokens=demand)
    plan = allocate(law_of("nd"), limits, speed=SPEED)
    most = 0.95 * free.compute_flops
    n, loss = brute(lambda n: loss_at(n, max(min(1e21 - 2.0 * n * demand, most) / (6.0 * n), 1.0)))
    assert plan.binding == ("compute_flops", "hours")
    assert plan.n_active == pytest.approx(n, rel=1e-4)
    assert plan.loss_nats <= loss == pytest.approx(plan.loss_nats, rel=1e-7)  # brute force nears it slowly
    assert plan.residuals == {}
    alone = allocate(law_of("nd"), Limits(hours=100.0, inference_tokens=demand), speed=SPEED)
    assert alone.n_active == allocate(law_of("nd"), Limits(hours=100.0), speed=SPEED).n_active
    assert "changed nothing" in " ".join(alone.advice)


def test_max_params_binds_and_tokens_take_the_rest():
    limits = Limits(compute_flops=1e21, max_params=1e8, max_params_reason="memory")
    plan = allocate(law_of("nd", 50), limits)
    assert plan.binding == ("compute_flops", "memory")
    assert plan.n_active == plan.n_total == 1e8
    assert plan.tokens == pytest.approx(1e21 / 6e8, rel=1e-12)
    assert plan.residuals == {}
    assert plan.n_active_low == pytest.approx(plan.n_active_high) == pytest.approx(1e8)
    assert "limits, costs or experts do that" in plan.advice[0]


def test_budgets_that_cannot_be_turned_into_flops():
    law = law_of("nd")
    for limits, speed, match in (
        (Limits(kwh=5.0), Speed(1e15, usd_per_hour=3.0), "kwh needs the speed's watts"),
        (Limits(usd=5.0), Speed(1e15), "usd needs the speed's usd_per_hour"),
        (Limits(usd=5.0), None, "usd needs the cluster's speed"),
        (Limits(hours=5.0, kwh=5.0), None, "hours, kwh needs the cluster's speed"),
        (Limits(data_tokens=1e9), None, "no budget"),
    ):
        with pytest.raises(LawError, match=match):
            allocate(law, limits, speed=speed)
    partial = allocate(law, Limits(hours=5.0), speed=Speed(1e15))
    assert (partial.usd, partial.kwh) == (None, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Limits(compute_flops=-1.0),
        lambda: Limits(compute_flops=1e20, n_total_over_active=0.5),
        lambda: Speed(math.nan),
        lambda: Chi(-1.0),
        lambda: Chi(1.0, 2.0),
        lambda: allocate(law_of("c"), BUDGET),
        lambda: allocate(law_of("moe_cf", q=0.2, eta=0.9), BUDGET),
        lambda: allocate(law_of("nd", a=0.0), BUDGET),
        lambda: allocate(law_of("nd"), BUDGET, kappa=0.0),
        lambda: allocate(law_of("nd"), BUDGET, chi=Chi(0.5)),
        lambda: allocate(law_of("nd"), BUDGET, context_tokens=-1.0),
    ],
)
def test_refusals(make):
    with pytest.raises(LawError):
        make()


# Context.


@pytest.mark.parametrize("more", [{}, {"inference_tokens": 3e10, "data_tokens": 3e9}])
def test_context_is_chosen(more):
    limits, chi = Limits(compute_flops=1e21, **more), Chi(0.5)
    plan = allocate(law_of("ndt"), limits, chi=chi)
    options = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 2000}
    best = minimize(
        lambda logs: loss_of_budget(*np.exp(logs), limits, chi)[1],
        np.log([3e9, 1000.0]),
        method="Nelder-Mead",
        options=options,
    )
    assert plan.loss_nats == pytest.approx(best.fun, rel=1e-10)
    assert (plan.n_active, plan.context_tokens) == pytest.approx(tuple(np.exp(best.x)), rel=1e-4)
    assert set(plan.residuals) == {"N", "T"}
    assert max(abs(residual) for residual in plan.residuals.values()) < 1e-9


@pytest.mark.parametrize(
    ("c", "chi", "given", "context", "binds", "advice"),
    [
        (5.0, Chi(1e4), {}, 128.0, "shortest_measured_context", ""),
        (5.0, Chi(), {}, 8192.0, "longest_measured_context", "costs nothing"),
        (0.0, Chi(0.5), {}, 128.0, "shortest_measured_context", "term of T is zero"),
        (5.0, Chi(), {"max_context_tokens": 64.0}, 64.0, "max_context_tokens", ""),
    ],
)
def test_context_at_its_bounds(c, chi, given, context, binds, advice):
    plan = allocate(law_of("ndt", c=c), Limits(compute_flops=1e21, **given), chi=chi)
    assert (plan.context_tokens, plan.binding) == (context, ("compute_flops", binds))
    assert set(plan.residuals) == {"N"}
    assert advice in " ".join(plan.advice)
    fixed = allocate(law_of("ndt"), BUDGET, chi=chi, context_tokens=1024.0)
    assert (fixed.context_tokens, fixed.binding) == (1024.0, ("compute_flops",))


# Mixture of experts.


@pytest.mark.parametrize("most", [1e9, 1e10, 3e10, 2e11])
def test_experts_under_a_bound_on_all_parameters(most):
    plan = allocate(law_of("moe"), Limits(compute_flops=1e21, max_params=most))
    n, loss = brute(
        lambda n: loss_at(min(64.0 * n, most) ** 0.47 * n**0.53, 1e21 / 6.0 / n), low=1e7, high=most
    )
    assert plan.loss_nats <= loss + 1e-12
    assert plan.n_active == pytest.approx(n, rel=1e-4)
    assert ("max_params" in plan.binding) == (plan.n_total >= most * (1 - 1e-9))
    assert ("n_total_over_active" in plan.binding) == (plan.n_total >= 64 * plan.n_active * (1 - 1e-9))


def test_a_corner_beside_a_small_slope():
    """Just below the corner the condition is -0.001, just above +1000: small steps there are no root."""
    law = law_of("moe", alpha=0.6436, a=21935.0, beta=0.22285, b=126.0, rho=1.0)
    limits = Limits(compute_flops=1.97583e17, data_tokens=5.779e9, max_params=7.867e7)
    plan = allocate(law, limits, chi=Chi(0.02417, 0.3796), context_tokens=2048.0)
    assert plan.n_active == pytest.approx(7.867e7 / 64, rel=1e-11)
    assert {"max_params", "n_total_over_active"} < set(plan.binding)
    assert plan.residuals == {}


# Front and target.


def test_front_falls_with_compute(tmp_path):
    plans = front(law_of("nd", 50), Limits(data_tokens=1e10), [1e21, 1e19, 1e20], speed=SPEED)
    assert [plan.compute_flops for plan in plans] == pytest.approx([1e19, 1e20, 1e21])
    losses = [plan.loss_nats for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert [plan.usd for plan in plans] == pytest.approx([f / 3.6e18 * 30.0 for f in (1e19, 1e20, 1e21)])
    bare = front(law_of("nd"), Limits(), [1e20, 1e21])
    one, three = (plot_front(p, tmp_path / f"{len(p)}.png", "Front").read_bytes() for p in (bare, plans))
    assert one[:4] == three[:4] == b"\x89PNG"
    assert three[16:20] > one[16:20]  # its width: a panel per known cost
    with pytest.raises(LawError, match="no plans"):
        plot_front([], tmp_path / "none.png", "Front")


@pytest.mark.parametrize(
    ("form", "limits", "chi", "context"),
    [
        ("nd", {}, Chi(), None),
        ("nd", {"data_tokens": 1e9}, Chi(0.5), 2048.0),
        ("nd", {"inference_tokens": 1e11, "data_tokens": 3e9}, Chi(), None),
        ("nd", {"max_params": 5e8}, Chi(), None),
        ("ndt", {"inference_tokens": 1e10}, Chi(0.5), None),
        ("moe", {"max_params": 2e10}, Chi(), None),
    ],
)
def test_target_is_the_inverse_of_allocate(form, limits, chi, context):
    law = law_of(form)
    plan = allocate(law, Limits(compute_flops=1e21, **limits), chi=chi, context_tokens=context)
    found = to_target(law, plan.loss_nats, Limits(**limits), chi=chi, context_tokens=context).plan
    assert found.compute_flops == pytest.approx(plan.compute_flops, rel=1e-6)
    assert found.compute_flops + found.inference_flops == pytest.approx(1e21, rel=1e-6)
    assert (found.n_active, found.tokens) == pytest.approx((plan.n_active, plan.tokens), rel=1e-6)
    assert found.loss_nats == pytest.approx(plan.loss_nats, rel=1e-12)
    assert (found.context_tokens or 0.0) == pytest.approx(plan.context_tokens or 0.0, rel=1e-6)
    assert ("compute_flops", *found.binding) == plan.binding


def test_target_intervals():
    law = law_of("nd", 300)
    target = to_target(law, 2.3)
    assert target.reached == 1.0
    assert target.compute_low_flops < target.plan.compute_flops < target.compute_high_flops
    assert target.plan.tokens_low < target.plan.tokens < target.plan.tokens_high
    near = to_target(law, 1.83)  # the replicates' L_inf spread by 1 %, so some lie above
    assert 0.5 < near.reached < 0.95
    assert near.compute_low_flops < near.plan.compute_flops
    assert (near.compute_high_flops, near.plan.tokens_high, near.plan.n_active_high) == (None, None, None)
    bare = to_target(law_of("nd"), 2.3)
    assert (bare.compute_low_flops, bare.compute_high_flops, bare.reached) == (None, None, None)


def test_targets_below_the_floor():
    law = law_of("nd")
    for loss in (1.8172, 1.0, math.nan):
        with pytest.raises(LawError, match=r"L_inf is 1\.8172"):
            to_target(law, loss)
    for limits in ({"max_params": 1e8}, {"max_params": 1e8, "data_tokens": 1e9}):
        endless = allocate(law, Limits(compute_flops=1e30, **limits)).loss_nats
        with pytest.raises(LawError, match="floor"):
            to_target(law, endless - 1e-2, Limits(**limits))
    with pytest.raises(LawError, match="no budget"):
        to_target(law, 2.3, BUDGET)


# Advice and speed.


def test_a_law_that_contradicts_twenty_tokens_per_parameter_says_so():
    for flops, printed in ((1e21, "50.1"), (5.76e23, "92.6")):
        (advice,) = allocate(law_of("nd", **PRINTED), Limits(compute_flops=flops)).advice
        for part in (printed, "contradicts the rule of about 20", "Hoffmann", "2404.10102"):
            assert part in advice
        assert allocate(law_of("nd"), Limits(compute_flops=flops)).advice == ()
    (apart,) = allocate(law_of("nd", alpha=0.6, a=2e5), Limits(compute_flops=1e23)).advice
    assert "need not hold" in apart


def test_advice_names_repeats_and_experts():
    repeats = allocate(law_of("nd"), Limits(compute_flops=1e21, data_tokens=1e9)).advice
    assert "beyond 4 epochs repeats are worth visibly less (Muennighoff et al. 2023)" in repeats[-1]
    few = allocate(law_of("moe"), Limits(compute_flops=1e21, n_total_over_active=2.0)).advice
    assert "N_total/N_active is 2; public practice is 8 to 64." in few
    assert any("1.1 to 1.5" in text for text in few)
    useless = allocate(law_of("moe", rho=0.0), BUDGET)
    assert (useless.n_total, useless.binding) == (useless.n_active, ("compute_flops",))
    assert "rho is 0" in " ".join(useless.advice)


@pytest.mark.parametrize("form", ["nd", "moe", "ndt"])
def test_a_thousand_replicates_are_quick(form):
    law, limits = law_of(form, 1000), Limits(compute_flops=1e21, data_tokens=5e9)
    begin = time.process_time()  # not the wall's: other processes may hold the cores
    allocate(law, limits, chi=Chi(0.5), context_tokens=None if form == "ndt" else 2048.0)
    assert time.process_time() - begin < 1.0
