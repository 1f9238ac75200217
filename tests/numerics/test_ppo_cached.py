"""The assessment's passes serve the first update where it would repeat them: one pass less, the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.numerics.ranks import run_ranks

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks("ppo_cached_scenarios:scenario", 1, tmp_path_factory.mktemp("ppo-kept"))[0]


@pytest.mark.parametrize("stage", ["0", "2"])
def test_cached_passes_change_no_result(found: Any, stage: str) -> None:
    kept, again = found[f"{stage} kept"], found[f"{stage} again"]
    for mine, other in zip(kept["iterations"], again["iterations"], strict=True):
        for name, column in other["columns"].items():
            torch.testing.assert_close(mine["columns"][name], column, **CLOSE)
        assert mine["updates"] == pytest.approx(other["updates"], rel=1e-5, abs=1e-6)
    for model in ("actor", "critic"):
        for name, weight in again[model].items():
            torch.testing.assert_close(kept[model][name], weight, **CLOSE)


def test_an_iteration_makes_one_pass_less_within_the_budget_of_tokens(found: Any) -> None:
    for name, passes in (("0 kept", 2), ("2 kept", 2), ("0 again", 3), ("2 again", 3), ("minibatches", 5)):
        for iteration in found[name]["iterations"]:
            assert iteration["calls"] == {"actor": passes, "critic": passes}, name
