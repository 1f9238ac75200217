"""The spectrum of a run under ZeRO-3 on two real gloo processes, against that of the whole weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.numerics.ranks import run_ranks


def test_the_spectrum_under_zero3_is_that_of_the_whole_weights(tmp_path: Path) -> None:
    first, second = run_ranks("spectrum_scenarios:scenario", 2, tmp_path)
    found, plain = dict(first["found"]), first["plain"]
    assert found == second["found"]
    assert found.pop("spectrum/active_entropy_bits") == pytest.approx(first["active"], rel=1e-6)
    assert found.keys() == plain.keys()
    sampled = {
        "spectrum/stable_rank_uncertainty"
    }  # random: it depends on the order that the sample is drawn in
    for name in plain.keys() - sampled:
        assert found[name] == pytest.approx(plain[name], rel=0.05), name
    assert {
        "spectrum/embedding/entropy_bits",
        "spectrum/gate/stable_rank",
        "spectrum/lost_at_rank_32_max",
    } <= found.keys()
