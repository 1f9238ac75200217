"""Whitening, moments and losses on two real gloo processes with unequal shares against one with everything."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from tests.numerics.alignment_scenarios import batch, results
from tests.numerics.ranks import run_ranks


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """What one process without torch.distributed makes of the whole batch."""
    return results(batch())


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks made of its share."""
    return run_ranks("alignment_scenarios:scenario", 2, tmp_path_factory.mktemp("alignment"))


@pytest.mark.parametrize("name", ["whitened", "reinforce++"])
def test_whitening_spans_all_ranks(whole: dict[str, Any], parts: list[dict[str, Any]], name: str) -> None:
    one = [x for row in whole[name] for x in row]
    assert [x for rank in parts for row in rank[name] for x in row] == pytest.approx(one, abs=1e-6)
    valid = [x for x in one if x]
    assert statistics.fmean(valid) == pytest.approx(0, abs=1e-5)
    assert statistics.variance(valid) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["token", "sequence_mean", "gspo", "value", "entropy"])
def test_losses_and_gradients_add_up_over_ranks(
    whole: dict[str, Any], parts: list[dict[str, Any]], name: str
) -> None:
    first, second = (rank[name] for rank in parts)
    assert first == second == pytest.approx(whole[name], rel=1e-6, abs=1e-6)
    assert abs(first["gradient"]) > 1e-3


def test_running_moments_and_explained_variance_span_all_ranks(
    whole: dict[str, Any], parts: list[dict[str, Any]]
) -> None:
    first, second = parts
    assert first["running"] == second["running"] == pytest.approx(whole["running"], rel=1e-9)
    assert first["running"]["count"] == 18
    assert first["explained"] == second["explained"] == pytest.approx(whole["explained"], rel=1e-9)
