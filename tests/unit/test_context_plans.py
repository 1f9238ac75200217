"""Plans of a T that is chosen, by kind of attention, against a grid over (N, T) on formulas written out again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from escala.cli.main import app
from escala.contract.errors import LawError, SpecError
from escala.laws import Law, Objective, fit_law
from escala.laws.forms import FORMS
from escala.laws.reference import Cache, Stored
from escala.planning import shapes
from escala.planning.allocate import allocate, to_target
from escala.planning.curve import Curve
from escala.planning.limits import Chi, Limits
from escala.planning.plans import PlanOptions, base_of, chi_of, config_for, plan_kinds, plan_law, propose_runs
from escala.schema import ModelConfig, PretrainConfig
from escala.schema.attention import KINDS
from escala.schema.flops import flops_per_token, parameter_counts
from escala.settings import Settings
from escala.sweeps import recipes

TRUTH = {"L_inf": 1.8, "a": 482.0, "alpha": 0.35, "b": 2085.0, "beta": 0.37, "c": 5.0, "zeta": 0.5}
C = 1e21
KNOTS = np.unique(np.round(np.geomspace(1, 2**22, 22 * 8 + 1)))


def law_of(low: float = 128.0, high: float = 8192.0, **changed: float) -> Law:
    names = FORMS["ndt"].names
    values = {**TRUTH, **changed}
    empty = {"objective_value": 0.0, "findings": (), "settings": {}, "table": {}, "refused_table": {}}
    ranges = {"n_active": (1e7, 1e9), "tokens": (1e8, 1e11), "context_tokens": (low, high)}
    return Law(
        form_name="ndt",
        size="n_active",
        objective=Objective(),
        parameters={name: values[name] for name in names},
        healthy=True,
        ranges=ranges,
        replicates_BP=np.empty((0, len(names))),
        residual_draws_B=np.empty(0),
        residual_N=np.zeros(1),
        **empty,
    )


def loss(n: Any, d: Any, t: Any, **changed: float) -> Any:
    p = {**TRUTH, **changed}
    return p["L_inf"] + p["a"] * n ** -p["alpha"] + p["b"] * d ** -p["beta"] + p["c"] * t ** -p["zeta"]


def windowed(window: float) -> Callable[[Any], Any]:
    """What a window costs, as the context of exact attention that costs as much: 2 W - W^2/T beyond W."""
    return lambda t: np.where(t < window, t, 2 * window - window * window / t)


def hybrid(window: float, far: float) -> Callable[[Any], Any]:
    """Local blocks, then `far` tokens' worth of features for the share of queries that have a far part."""
    block = window / 2
    return lambda t: np.where(t < window, t, 2 * (1.5 * block - block * block / t) + far * (1 - window / t))


def searched(
    g: Callable[[Any], Any], scale: float, low: float, high: float, most: Callable[[Any], Any] | None = None
) -> tuple[float, float, float]:
    """(loss, N, T) of the best of a grid of 1,500 x 1,500, N below most(T)."""
    n_N, t_T = np.geomspace(1e7, 2e10, 1500)[:, None], np.geomspace(low, high, 1500)[None, :]
    d_NT = C / (6 * n_N * (1 + scale * g(t_T) * n_N ** (-1 / 3)))
    found_NT = loss(n_N, d_NT, t_T)
    if most is not None:
        found_NT = np.where(n_N <= most(t_T), found_NT, np.inf)
    i, j = np.unravel_index(found_NT.argmin(), found_NT.shape)
    return float(found_NT[i, j]), float(n_N[i, 0]), float(t_T[0, j])


@pytest.mark.parametrize(
    ("g", "scale", "high", "binds"),
    [
        (lambda t: t, 0.5, 8192.0, None),
        (lambda t: t, 0.01, 8192.0, "longest_measured_context"),
        (windowed(256), 0.5, 8192.0, "longest_measured_context"),
        (windowed(4096), 5.0, 8192.0, None),  # a window so wide that it is exact attention where T is best
        (
            windowed(4096),
            0.5,
            1e6,
            "longest_measured_context",
        ),  # a dip below the window, and less loss far beyond
        (hybrid(256, 600), 0.5, 8192.0, "longest_measured_context"),
        (hybrid(512, 600), 30.0, 2048.0, None),
        (hybrid(512, 600), 30.0, 1e6, "longest_measured_context"),
    ],
)
def test_the_best_n_and_t_are_those_of_a_search(
    g: Callable[[Any], Any], scale: float, high: float, binds: str | None
) -> None:
    chi = Chi(scale, 1 / 3, Curve.through(KNOTS.tolist(), g(KNOTS).tolist()))
    plan = allocate(law_of(high=high), Limits(compute_flops=C), chi=chi)
    best, n, t = searched(g, scale, 128.0, high)
    assert plan.context_tokens == pytest.approx(t, rel=0.02)
    assert plan.n_active == pytest.approx(n, rel=0.02)
    assert plan.loss_nats == pytest.approx(best, rel=1e-5)
    assert plan.tokens == pytest.approx(C / 6 / plan.n_active / plan.chi, rel=1e-9)
    assert plan.binding == ("compute_flops", *([binds] if binds else []))
    assert set(plan.residuals) == ({"N"} if binds else {"N", "T"})
    assert max(map(abs, plan.residuals.values())) < 1e-9


def test_a_curve_in_proportion_to_t_changes_nothing() -> None:
    curve = Curve.through(KNOTS.tolist(), KNOTS.tolist())
    straight, curved = (
        allocate(law_of(), Limits(compute_flops=C), chi=Chi(0.5, 1 / 3, growth)) for growth in (None, curve)
    )
    assert curved.context_tokens == pytest.approx(straight.context_tokens, rel=1e-9)
    assert curved.n_active == pytest.approx(straight.n_active, rel=1e-9)


@pytest.mark.parametrize(
    ("g", "scale", "room"),
    [(lambda t: t, 0.05, 2e12), (windowed(256), 0.5, 4e12), (hybrid(256, 600), 0.5, 4e11)],
)
def test_memory_bounds_n_by_t(g: Callable[[Any], Any], scale: float, room: float) -> None:
    """What fits falls as 1/T; so a longer context is paid for in N, which is in the condition of T."""
    high = 65536.0
    chi = Chi(scale, 1 / 3, Curve.through(KNOTS.tolist(), g(KNOTS).tolist()))
    memory = Curve.through([128.0, high], [room / 128.0, room / high])
    plan = allocate(law_of(high=high), Limits(compute_flops=C), chi=chi, memory=memory)
    best, n, t = searched(g, scale, 128.0, high, lambda t: room / t)
    assert plan.loss_nats == pytest.approx(best, rel=1e-4)
    assert plan.context_tokens == pytest.approx(t, rel=0.03)
    assert plan.n_active == pytest.approx(n, rel=0.03)
    assert plan.n_active == pytest.approx(room / plan.context_tokens, rel=1e-6)
    assert plan.binding == ("compute_flops", "device memory")
    assert set(plan.residuals) == {"T"}
    assert abs(plan.residuals["T"]) < 1e-9


def test_memory_may_end_the_contexts() -> None:
    """No model trains beyond 4,096 tokens, where a billion parameters still do."""
    memory = Curve.through([128.0, 4096.0], [1e12, 1e12])
    chi = Chi(0.5, 1 / 3, Curve.through(KNOTS.tolist(), windowed(256)(KNOTS).tolist()))
    plan = allocate(law_of(), Limits(compute_flops=C), chi=chi, memory=memory)
    assert plan.context_tokens == pytest.approx(4096)
    assert plan.binding == ("compute_flops", "device memory")
    longer = allocate(law_of(), Limits(compute_flops=C, max_context_tokens=1024.0), chi=chi, memory=memory)
    assert (longer.context_tokens, longer.binding) == (1024.0, ("compute_flops", "max_context_tokens"))


@pytest.mark.parametrize(
    ("g", "room"), [(windowed(256), None), (hybrid(512, 600), None), (windowed(256), 4e12)]
)
def test_the_least_compute_to_a_loss_is_the_plan_s(g: Callable[[Any], Any], room: float | None) -> None:
    chi = Chi(0.5, 1 / 3, Curve.through(KNOTS.tolist(), g(KNOTS).tolist()))
    memory = None if room is None else Curve.through([128.0, 8192.0], [room / 128, room / 8192])
    plan = allocate(law_of(), Limits(compute_flops=C), chi=chi, memory=memory)
    target = to_target(law_of(), plan.loss_nats, chi=chi, memory=memory).plan
    assert target.compute_flops == pytest.approx(C, rel=1e-6)
    assert target.context_tokens == pytest.approx(plan.context_tokens, rel=1e-6)
    assert target.n_active == pytest.approx(plan.n_active, rel=1e-5)


# The recipe's shapes.

MODEL: dict[str, Any] = {"vocab_size": 320, "max_context_tokens": 512}


@pytest.mark.parametrize("kind", KINDS)
def test_chi_follows_the_kind_over_n_and_t(kind: str) -> None:
    model = shapes.with_attention(MODEL, kind)
    chi = shapes.chi_of(model, (1e6, 1e8), 1024)
    for n in (3e6, 3e8):
        built = ModelConfig(**{**model, **recipes.shape(n, model)})
        count = parameter_counts(built).n_active
        for t in (64, 256, 300, 1024, 4096, 65536):
            excess = flops_per_token(built, t).attention / 6 / count
            found = float(chi.excess(np.log([count]), np.log([t]))[0])
            assert found == pytest.approx(excess, rel=0.25)  # shapes jump by some per cent
        ratio = flops_per_token(built, 65536).attention / flops_per_token(built, 1024).attention
        said = chi.excess(np.log([count] * 2), np.log([65536, 1024]))
        assert said[0] / said[1] == pytest.approx(ratio, rel=0.03)
    assert chi.saturates == (kind in ("window", "features", "hybrid"))


def test_a_kind_s_options_and_what_is_none() -> None:
    model = shapes.with_attention(MODEL, "hybrid,window_tokens=64,features.count=32,features.kind=learned")
    assert shapes.described(model) == "hybrid (window 64, 32 learned features)"
    assert shapes.described(shapes.with_attention(model, "hybrid")) == shapes.described(model)
    assert shapes.described(shapes.with_attention(model, "exact")) == "exact"
    assert shapes.described(shapes.with_attention(model, "nystrom,attention.landmarks=4")).startswith(
        "nystrom ("
    )
    for wrong in ("sparse", "hybrid,n_layers=3", "hybrid,windw=64", "nystrom,attention.landmarks=4000"):
        with pytest.raises(SpecError):
            shapes.with_attention(MODEL, wrong)


# Laws of runs.


@pytest.fixture(scope="module")
def stored() -> Stored:
    rng = np.random.default_rng(0)
    points = pd.DataFrame(
        [
            (n, d, t)
            for n in (3e5, 1e6, 3e6)
            for d in (1e7, 3e7, 1e8)
            for t in (32, 64, 128, 256, 512)
            if (n, d) not in ((3e5, 1e8), (3e6, 1e7))
        ],
        columns=["n_active", "tokens", "context_tokens"],
    )
    clean = (
        1.2 + 80 * points.n_active**-0.45 + 1600 * points.tokens**-0.58 + 1.5 * points.context_tokens**-0.3
    )
    points["loss_nats"] = clean * np.exp(0.0005 * rng.standard_normal(len(points)))
    points["attention"] = "exact"
    configuration = {
        "model": {**MODEL, "attention": "exact"},
        "data": {"tokenizer": {"vocab_size": 320}},
        "training": {"context_tokens": None},
    }
    law = fit_law(points, form="ndt", bootstrap=60)
    return Stored("recall", 1, law, {"format": 2, "configuration": configuration, "attention": "exact"})


@pytest.fixture
def home(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    uri = "http://127.0.0.1:9"  # nothing listens there
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    cache = Cache(tmp_path / "home", uri)
    cache.put(stored)
    cache.set_champion("recall", 1)
    return tmp_path


def ask(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.mark.parametrize("kind", ["exact", "hybrid"])
def test_a_kind_s_plan_is_that_of_a_search_over_the_recipe_s_models(
    home: Path, stored: Stored, kind: str
) -> None:
    """Every model of a grid, at the FLOPs of attention that the schema counts, and 6 N for the rest."""
    budget, longest = 1e17, 2.0**18
    (found,) = plan_kinds(
        Settings(), "recall", Limits(compute_flops=budget, max_context_tokens=longest), [kind]
    )
    model = shapes.with_attention(base_of(stored)["model"], kind)
    p, best = stored.law.parameters, (math.inf, 0, 0)
    for n in np.geomspace(5e6, 2e8, 60):
        built = ModelConfig(**{**model, **recipes.shape(float(n), model)})
        count = parameter_counts(built).n_active
        for t in (2**k for k in range(5, 19)):
            d = budget / (6 * count + flops_per_token(built, t).attention)
            value = (
                p["L_inf"]
                + p["a"] * count ** -p["alpha"]
                + p["b"] * d ** -p["beta"]
                + p["c"] * t ** -p["zeta"]
            )
            best = min(best, (value, count, t))
    plan = found.plan
    assert plan.loss_nats == pytest.approx(best[0], rel=2e-3)
    assert plan.n_active == pytest.approx(best[1], rel=0.3)
    assert plan.context_tokens == pytest.approx(best[2], rel=0.5)  # powers of two
    at_the_end = plan.context_tokens == longest
    assert at_the_end == (kind == "hybrid") == ("max_context_tokens" in plan.binding)
    assert max(map(abs, plan.residuals.values())) < 1e-9


def test_kinds_are_compared_at_one_budget(home: Path) -> None:
    asked = ("laws", "plan", "recall", "--compute-flops", "1e17", "--max-context-tokens", "1e6")
    kinds = ("--attention", "exact", "--attention", "hybrid", "--attention", "window,window_tokens=64")
    answer = json.loads(ask(*asked, *kinds, "--json"))
    exact, hybrid, window = answer["kinds"]
    assert exact["context_tokens"] == answer["context_tokens"] < hybrid["context_tokens"] == 1e6
    assert exact["chi"] > 2 > hybrid["chi"] > window["chi"] > 1
    assert hybrid["loss_nats"] < exact["loss_nats"]
    assert exact["context_tokens_low"] < exact["context_tokens"] < exact["context_tokens_high"]
    assert exact["state_bytes"] > 10 * hybrid["state_bytes"]
    assert exact["binding"] == ["compute_flops"]
    assert hybrid["binding"] == ["compute_flops", "max_context_tokens"]
    assert not any("assumption" in text for text in exact["assumed"])
    assert any("measured with attention exact: that hybrid" in text for text in hybrid["assumed"])
    assert any("limits alone bound T" in text for text in hybrid["assumed"])
    assert any("reaches back layers x 63 tokens" in text for text in window["assumed"])
    shown = ask(*asked, *kinds)
    assert "hybrid (window 256, 256 positive features): binding compute_flops, max_context_tokens" in shown
    assert "that window (window 64) has the same is an assumption" in shown
    with pytest.raises(LawError, match="one budget"):
        ask("laws", "plan", "recall", "--target-loss", "2", "--attention", "hybrid")


def test_no_context_is_longer_than_the_documents(home: Path, stored: Stored) -> None:
    configuration = stored.provenance["configuration"]
    data = {**configuration["data"], "corpora": [{"kind": "recall", "document_tokens": 2048}]}
    law = Stored("short", 1, stored.law, {"configuration": {**configuration, "data": data}})
    Cache(home / "home", "http://127.0.0.1:9").put(law)
    limits = Limits(compute_flops=1e17, max_context_tokens=1e6)
    plan = plan_law(Settings(), "short@1", limits, PlanOptions(attention="hybrid")).plan
    assert (plan.context_tokens, plan.binding) == (2048.0, ("compute_flops", "document length"))
    limits = Limits(compute_flops=1e17, max_context_tokens=1024.0)
    assert plan_law(Settings(), "short@1", limits).plan.binding == ("compute_flops", "max_context_tokens")


def test_memory_of_the_cluster_bounds_t(home: Path) -> None:
    options = PlanOptions(cluster="h100-8", max_memory_gb=8.0)
    limits = Limits(compute_flops=1e17, max_context_tokens=1e6)
    exact, hybrid = plan_kinds(Settings(), "recall", limits, ["exact", "hybrid"], options)
    assert "device memory" in hybrid.plan.binding
    assert hybrid.memory_bytes == pytest.approx(8e9, rel=0.02)
    assert exact.memory_bytes is not None
    assert exact.memory_bytes < 8e9
    with pytest.raises(LawError, match="No model trains on a sequence of 32 tokens"):
        plan_law(Settings(), "recall", limits, PlanOptions(cluster="h100-8", max_memory_gb=0.0001))


def test_kinds_of_a_law_without_a_context_cost_the_same(home: Path, stored: Stored) -> None:
    frame = pd.DataFrame({"n_active": np.geomspace(1e6, 1e8, 20)})
    frame["tokens"] = frame.n_active * np.tile([5.0, 20.0, 80.0, 160.0], 5)
    frame["loss_nats"] = 1.8 + 482 * frame.n_active**-0.35 + 2085 * frame.tokens**-0.37
    law = fit_law(frame, bootstrap=0)
    Cache(home / "home", "http://127.0.0.1:9").put(Stored("table", 1, law, {"configuration": None}))
    with pytest.raises(LawError, match="no context T"):
        plan_kinds(Settings(), "table@1", Limits(compute_flops=1e18), ["exact"])
    options = PlanOptions(context_tokens=8192.0)
    exact, window = plan_kinds(
        Settings(), "table@1", Limits(compute_flops=1e18), ["exact", "window"], options
    )
    assert exact.plan.chi > window.plan.chi
    assert any("does not say which attention" in text for text in exact.assumed)


def test_points_of_two_kinds_are_no_law(stored: Stored) -> None:
    mixed = stored.law.points.assign(
        attention=["exact", "hybrid (window 64, 32 positive features)"] * 17 + ["exact"]
    )
    with pytest.raises(LawError, match=r"2 kinds of attention \(exact; hybrid"):
        fit_law(mixed, form="ndt", bootstrap=0)


def test_a_planned_run_has_the_plan_s_context(stored: Stored) -> None:
    for context in (200.4, 2048.0):
        written = config_for(stored, 1e6, 1e6, 2e7, context_tokens=context)
        config = PretrainConfig.model_validate(written)
        assert config.context_tokens == round(context)
        assert config.model.attention.kind == "exact"
    assert PretrainConfig.model_validate(config_for(stored, 1e6, 1e6, 2e7)).context_tokens == 512


def test_proposals_of_a_law_of_t_are_at_its_contexts(home: Path) -> None:
    found = propose_runs(Settings(), "recall", Limits(compute_flops=1e16), 1e14)
    assert found.proposals[0].context_tokens in (32, 64, 128, 256, 512)
    assert found.plan is not None


def test_chi_of_the_law_is_of_its_own_kind(stored: Stored) -> None:
    configuration = stored.provenance["configuration"]
    model = {**configuration["model"], "attention": "hybrid", "window_tokens": 64}
    hybrid = Stored("h", 1, stored.law, {"configuration": {**configuration, "model": model}})
    assert chi_of(stored).growth is None
    assert chi_of(hybrid).saturates
