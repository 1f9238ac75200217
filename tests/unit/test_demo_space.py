"""The demo's sizes follow from the machine's speed and the minutes, and from nothing else."""

from __future__ import annotations

import pytest

from escala.sweeps.demo_space import LEAST_TOKENS, NAME, PLANNED, SIZES, MachineSpeed, demo_space
from escala.sweeps.design import plan
from escala.sweeps.space import load_space

BASE = dict(load_space(NAME)[1].base)
QUIET = MachineSpeed(8e9, 20e9, 1.0)


def test_the_space_is_what_the_numbers_say() -> None:
    found = demo_space(QUIET, 6, 3, BASE)
    assert found == demo_space(QUIET, 6, 3, BASE)
    trials = plan(load_space(NAME, found.overrides)[1])
    assert len(trials) == found.trials == 14
    assert sum(t.compute_flops for t in trials) == pytest.approx(found.compute_flops, rel=0.01)
    assert trials[0].compute_flops == pytest.approx(found.largest_flops, rel=0.01)
    assert len({t.config["training"]["seed"] for t in trials}) == 14
    assert plan(load_space(NAME, demo_space(QUIET, 6, 4, BASE).overrides)[1])[0] != trials[0]
    assert len({t.n_active for t in trials}) == len(SIZES)
    assert PLANNED > 4
    assert min(t.train_tokens / t.n_active for t in trials) > 10


def test_a_faster_machine_or_more_minutes_make_it_larger() -> None:
    usual = demo_space(QUIET, 6, 0, BASE)
    assert usual.fits
    assert usual.seconds == pytest.approx(360, rel=0.01)
    slower = demo_space(MachineSpeed(5e9, 12e9, 0.8), 6, 0, BASE)
    assert slower.compute_flops < usual.compute_flops < demo_space(QUIET, 7, 0, BASE).compute_flops


def test_a_busy_machine_gets_the_least_and_is_told_so() -> None:
    found = demo_space(MachineSpeed(1e9, 2e9, 0.1), 6, 0, BASE)
    assert not found.fits
    assert min(t.train_tokens for t in plan(load_space(NAME, found.overrides)[1])) == pytest.approx(
        LEAST_TOKENS, rel=0.01
    )
