from __future__ import annotations

import math
from itertools import pairwise

import pytest

from escala.schema import PretrainConfig
from workloads.training.schedule import learning_rate


def config(schedule: str, steps: int = 100, warmup: int = 10) -> PretrainConfig:
    optimizer = {
        "learning_rate": 1.0,
        "schedule": schedule,
        "warmup_steps": warmup,
        "final_fraction": 0.1,
        "decay_fraction": 0.2,
    }
    return PretrainConfig(training={"steps": steps, "optimizer": optimizer})


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_starts_above_zero(schedule: str) -> None:
    rates = [learning_rate(step, config(schedule)) for step in range(11)]
    assert rates[0] == pytest.approx(1 / 11)
    assert [b - a for a, b in pairwise(rates)] == pytest.approx([1 / 11] * 10)
    assert rates[10] == 1.0


@pytest.mark.parametrize(("schedule", "final"), [("cosine", 0.1), ("wsd", 0.1), ("constant", 1.0)])
def test_last_step_has_the_final_rate(schedule: str, final: float) -> None:
    assert learning_rate(99, config(schedule)) == pytest.approx(final)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert learning_rate(54, config("cosine", steps=99)) == pytest.approx(0.1 + 0.9 * 0.5)  # (10 + 98) / 2
    quarter = learning_rate(32, config("cosine", steps=99))
    assert quarter == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25)))


def test_wsd_is_flat_then_falls_on_a_line() -> None:
    rates = [learning_rate(step, config("wsd")) for step in range(100)]
    assert set(rates[10:80]) == {1.0}
    falls = [a - b for a, b in pairwise(rates[79:])]
    assert falls == pytest.approx([0.9 / 20] * 20)


def test_degenerate_lengths_are_defined() -> None:
    assert learning_rate(0, config("cosine", steps=1, warmup=0)) == 1.0
    assert learning_rate(0, config("wsd", steps=1, warmup=0)) == 1.0
    assert 0 < learning_rate(4, config("cosine", steps=5, warmup=50)) < 1
