"""The step test's arithmetic: from answers to the governor's file. The test itself runs on a cluster."""

import math
from typing import Any

import pytest

from escala.contract.errors import SpecError
from escala.rollouts.load import Answered
from escala.rollouts.stability import Plant, PlantFit, check_gains, fit_plant
from escala.rollouts.tuning import StepTest, TuneOptions, _config
from escala.schema.governor import ReplicaSpeed

OPTIONS = TuneOptions(target_seconds=10.0, response_tokens=40, seconds=60.0, window_seconds=5.0)
SPEED = ReplicaSpeed.model_validate(
    {
        "batches": [{"requests": 8, "tokens_per_second": 40.0}],
        "prompt_tokens_per_second": 100.0,
        "startup_seconds": 12.0,
    }
)


def step() -> StepTest:
    """16 clients of 40 tokens: one replica of 40 tokens/s, from second 75 on two that make 32 each."""
    answers, now = [], 1000.0
    while now < 1135.0:
        rate = 40.0 if now < 1075.0 else 64.0
        now += 40 / rate
        waited = 16.0 if now < 1075.0 else 16.0 - 6.0 * -math.expm1(-(now - 1075.0) / 10)
        answers.append(Answered(now - waited, now, 40))
    return StepTest(tuple(answers), begun=1060.0, ready=1075.0)


def test_windows_of_errors_and_speeds_together() -> None:
    found = step()
    errors = found.errors(OPTIONS)
    assert errors[0][0] == pytest.approx(-42.5)  # a quarter of the first part is left out
    assert errors[0][1] == pytest.approx(0.6)
    assert errors[-1][1] == pytest.approx(0.0, abs=0.02)
    alone, together = (found.tokens_per_second(*times) for times in found.full_batches())
    assert alone == pytest.approx(40.0, rel=0.03)
    assert together / 2 / alone == pytest.approx(0.8, rel=0.03)
    after, error = zip(*errors, strict=True)
    plant = fit_plant(after, error, 1, OPTIONS.window_seconds).plant
    assert plant.gain == pytest.approx(0.6, rel=0.05)
    assert plant.delay == pytest.approx(3.0, abs=0.3)
    assert plant.time_constant == pytest.approx(2.0, abs=0.3)


def options(**more: Any) -> TuneOptions:
    return TuneOptions(target_seconds=10.0, **more)


def test_the_file_holds_gains_that_are_stable_on_its_own_rounded_plant() -> None:
    for gain, tau, delay in ((0.61234, 0.71234, 3.14159), (1.98765, 4.321, 0.0), (0.05, 0.0, 12.3456)):
        config = _config(PlantFit(Plant(gain, tau, delay), 0.9, 0.01), SPEED, options())
        check_gains(config.kp, config.ki, Plant(**config.plant.model_dump()))
        assert config.plant.gain == pytest.approx(gain, rel=5e-3)


def test_own_gains_are_checked() -> None:
    fit = PlantFit(Plant(1.0, 2.0, 2.0), 0.9, 0.01)
    assert _config(fit, SPEED, options(kp=0.1, ki=0.05)).kp == 0.1
    with pytest.raises(SpecError, match=r"radius is 1\.097"):
        _config(fit, SPEED, options(kp=2.0, ki=0.5))
