"""The audit of a recipe's learning rate: the parabola, its findings, and the trials that it asks for."""

from __future__ import annotations

import math

import pytest

from escala.contract.errors import SpecError
from escala.laws.audit import AuditedRun, audit, findings
from escala.sweeps.design import plan
from escala.sweeps.space import load_space


def runs(best: float, curvature: float = 0.02, tokens: float = 1e6) -> list[AuditedRun]:
    """Losses 2 + curvature (log2 factor - log2 best)^2 at the audit's factors."""
    return [
        AuditedRun(1e5, tokens, f, 0.01 * f, 2 + curvature * (math.log2(f) - math.log2(best)) ** 2, None)
        for f in (2.0, 0.5, 1.0)
    ]


def test_a_parabola_gives_the_best_rate_and_what_is_left() -> None:
    (found,) = audit(runs(best=1.5))
    assert found.best_factor == pytest.approx(1.5)
    assert found.left == pytest.approx(0.02 * math.log2(1.5) ** 2 / 2)
    assert found.bracketed
    assert found.tuned == (found.left < 0.005)
    assert "best at 1.50 times it" in found.finding()


def test_a_minimum_outside_the_rates_tried_is_a_lower_bound() -> None:
    (found,) = audit(runs(best=8.0))
    assert not found.bracketed
    assert found.best_factor == 2.0
    assert found.left == pytest.approx((2 + 0.02 * 9) / (2 + 0.02 * 4) - 1)
    wrong, said = findings([found])
    assert "at least" in wrong[0]
    assert said == []


def test_a_growing_error_is_said_with_its_power_of_d() -> None:
    points = audit([*runs(1.0, tokens=1e6), *runs(0.6, curvature=0.1, tokens=3e6)])
    wrong, said = findings(points)
    assert len(said) == 1
    assert len(wrong) == 2
    assert f"D^{math.log(0.6) / math.log(3):+.2f}" in wrong[1]


def test_without_all_three_rates_nothing_is_said() -> None:
    assert audit(runs(1.0)[:2]) == []


def test_the_trials_are_the_largest_point_and_three_times_its_tokens() -> None:
    _, space = load_space("chinchilla", ["audit={horizon: 3}"])
    points = list(plan(load_space("chinchilla")[1]))
    audits = [t for t in plan(space) if t.audits is not None]
    largest = points[0]
    assert len(plan(space)) == len(points) + 5
    at_it = [t for t in audits if t.train_tokens == largest.train_tokens]
    beyond = [t for t in audits if t.train_tokens != largest.train_tokens]
    assert sorted(t.audits or 0 for t in at_it) == [0.5, 2.0]
    assert sorted(t.audits or 0 for t in beyond) == [0.5, 1.0, 2.0]
    rate = largest.config["training"]["optimizer"]["learning_rate"]
    assert {t.config["training"]["optimizer"]["learning_rate"] for t in at_it} == {rate / 2, rate * 2}
    assert all(t.n_total == largest.n_total for t in audits)
    assert all(t.train_tokens == pytest.approx(3 * largest.train_tokens, rel=0.01) for t in beyond)


def test_a_search_has_no_recipe_to_audit() -> None:
    with pytest.raises(SpecError, match="aim: law"):
        load_space("learning_rate", ["audit={}"])
