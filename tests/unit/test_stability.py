"""Stability of the governor's loop: closed forms, Jury's criterion against roots, roots against stepping the loop."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from escala.contract.errors import SpecError
from escala.rollouts.governor import spectral_radius
from escala.rollouts.stability import (
    Plant,
    characteristic_polynomial,
    check_gains,
    fit_plant,
    is_safe,
    is_stable,
    propose_gains,
)
from tests.unit.linear_plant import growth

PLANTS = st.builds(Plant, st.floats(0.05, 5), st.floats(0, 8), st.floats(0, 6))


@pytest.mark.parametrize(("delay", "radius"), [(0, 0.838), (1, 0.973), (2, 1.097)])
def test_the_worked_plant(delay: int, radius: float) -> None:
    assert spectral_radius(2, 0.5, 1, 2, delay) == pytest.approx(radius, abs=5e-4)


def test_two_poles_in_closed_form() -> None:
    pole = math.exp(-1 / 2)  # no delay: z^2 - (1 + a - b (kp + ki)) z + a - b kp
    b = 1 - pole
    linear, constant = 1 + pole - 2.5 * b, pole - 2 * b
    largest = (linear + math.sqrt(linear**2 - 4 * constant)) / 2
    assert spectral_radius(2, 0.5, 1, 2, 0) == pytest.approx(largest, rel=1e-12)


def test_a_thousand_random_loops_are_classified_as_stepping_them_does() -> None:
    draw = np.random.default_rng(0)
    n = 1400
    kp, ki = draw.uniform(0, 3, n), draw.uniform(0.01, 1.5, n)
    gain, tau, delay = draw.uniform(0.1, 3, n), draw.uniform(0.2, 6, n), draw.integers(0, 5, n)
    loops = list(zip(kp, ki, gain, tau, delay, strict=True))
    radius = np.array([spectral_radius(*loop) for loop in loops])
    clear = np.abs(radius - 1) >= 0.01
    assert clear.sum() >= 1000
    grown = growth(kp, ki, gain, tau, delay)
    assert ((grown > 1) == (radius > 1))[clear].all()
    assert 200 < (radius > 1)[clear].sum() < clear.sum() - 200
    jury = [is_stable(characteristic_polynomial(p, i, Plant(k, t, d))) for p, i, k, t, d in loops]
    assert (np.array(jury) == (radius < 1))[clear].all()


@given(PLANTS, st.floats(0, 4), st.floats(0.001, 2))
def test_jury_and_the_roots_agree_at_delays_between_windows(plant: Plant, kp: float, ki: float) -> None:
    radius = spectral_radius(kp, ki, plant.gain, plant.time_constant, plant.delay)
    if abs(radius - 1) > 1e-6:
        assert is_stable(characteristic_polynomial(kp, ki, plant)) == (radius < 1)


@pytest.mark.parametrize("delay", [0.25, 1.5, 2.75])
def test_a_fraction_of_a_window_is_what_finer_steps_show(delay: float) -> None:
    parts, kp, ki, tau = 20, 0.8, 0.3, 2.0
    pole, line = math.exp(-1 / tau / parts), [0.0] * round(delay * parts)
    error, total, sizes = 1.0, 0.0, []
    for _ in range(600):
        total += error
        acting = kp * error + ki * total
        for _ in range(parts):
            line.append(acting)
            error = pole * error - (1 - pole) * line.pop(0)
        sizes.append(abs(error) + abs(total))
    grown = (sum(sizes[500:]) / sum(sizes[300:400])) ** (1 / 200)
    assert grown == pytest.approx(spectral_radius(kp, ki, 1, tau, delay), abs=2e-3)


@given(PLANTS)
def test_proposed_gains_are_stable_at_twice_the_gain(plant: Plant) -> None:
    kp, ki = propose_gains(plant)
    assert is_safe(kp, ki, plant)
    assert spectral_radius(kp, ki, 2 * plant.gain, plant.time_constant, plant.delay) < 1
    check_gains(kp, ki, plant)


def test_unstable_gains_are_refused_with_their_radius_and_safe_ones() -> None:
    with pytest.raises(SpecError, match=r"radius is 1\.097.* at twice the gain") as refused:
        check_gains(2, 0.5, Plant(1, 2, 2))
    kp, ki = propose_gains(Plant(1, 2, 2))
    assert f"`kp: {kp:.3g}`, `ki: {ki:.3g}` are safe" in (refused.value.hint or "")
    with pytest.raises(SpecError, match=r"0\.838, and 1\.\d+ at twice"):
        check_gains(2, 0.5, Plant(1, 2, 0))
    for kp, ki in ((-1, 0.1), (0.1, 0), (math.nan, 0.1), (0.1, math.inf)):
        with pytest.raises(SpecError, match="don't hold"):
            check_gains(kp, ki, Plant(1, 2, 0))
    for plant in ((0, 1, 1), (1, -1, 1), (1, 1, 1000), (math.nan, 1, 1)):
        with pytest.raises(SpecError, match="cannot be controlled"):
            Plant(*plant)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_step_test_gives_its_plant_back(noise: float) -> None:
    draw = np.random.default_rng(3)
    true = Plant(0.6, 2.0, 3.0)
    seconds = np.arange(-60, 150, 5) + 2.5
    after = np.maximum(seconds - 5 * true.delay, 0) / (5 * true.time_constant)
    errors = 1.1 + 2 * true.gain * np.expm1(-after) + noise * draw.standard_normal(len(seconds))
    found = fit_plant(seconds, errors, 2, 5.0)
    assert found.plant.gain == pytest.approx(true.gain, rel=0.01 + noise)
    assert found.plant.time_constant == pytest.approx(true.time_constant, rel=0.05 + 5 * noise)
    assert found.plant.delay == pytest.approx(true.delay, abs=0.15 + 10 * noise)
    assert found.explained > 1 - 4 * noise - 1e-3
    assert found.gain_error < 0.03


def test_a_step_without_effect_is_no_plant() -> None:
    draw = np.random.default_rng(0)
    seconds = np.arange(-60, 60, 5.0)
    with pytest.raises(SpecError, match="made no difference"):
        fit_plant(seconds, 0.5 + 0.05 * draw.standard_normal(len(seconds)), 1, 5.0)
    with pytest.raises(SpecError, match="show no plant"):
        fit_plant([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0] * 7, 1, 5.0)
