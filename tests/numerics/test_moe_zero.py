"""A mixture of experts under ZeRO: on two ranks whose tokens choose different experts stage 3 neither hangs nor differs
from one rank; checkpoints by name work unchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.ranks import run_ranks

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("moe_scenario.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By RANKS-RANK. The single process resumes what the two have written, so it comes second."""
    directory = tmp_path_factory.mktemp("moe")
    for ranks in (2, 1):
        run_ranks(SCRIPT, ranks, directory)
    return {path.stem: json.loads(path.read_text()) for path in directory.glob("?-?.json")}


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_whose_experts_differ_train_as_one(results: dict[str, dict[str, Any]], stage: int) -> None:
    """Without the auxiliary losses, which are of each rank's own micro-batch."""
    assert results["2-1"][f"idle-{stage}"] == [2, 2]  # rank 1 has no token for half of the experts
    assert results["2-0"][f"idle-{stage}"][0] < 2
    expected = results["1-0"]["task-0"]
    assert results["2-0"][f"task-{stage}"] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.9 * expected[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_stage_3_equals_stage_0_with_auxiliary_losses(results: dict[str, dict[str, Any]], ranks: int) -> None:
    found = results[f"{ranks}-0"]
    assert found["balanced-3"] == pytest.approx(found["balanced-0"], rel=1e-5)
    assert found["balanced-0"] != pytest.approx(found["task-0"], rel=1e-5)


def test_one_rank_resumes_what_two_have_written(results: dict[str, dict[str, Any]]) -> None:
    """Its first step is theirs; further ones are not, since the auxiliary losses are of a rank's micro-batch."""
    straight = results["2-0"]["balanced-3"][3:]
    assert results["1-0"]["elsewhere"][0] == pytest.approx(straight[0], rel=1e-6)
    assert results["1-0"]["elsewhere"] == pytest.approx(straight, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "alone"), [("shared", "balanced-0"), ("shared-2", "balanced-0"), ("full-shared", "full")]
)
def test_sharing_the_experts_work_changes_nothing(
    results: dict[str, dict[str, Any]], name: str, alone: str
) -> None:
    found = results["2-0"]
    assert found[name] == pytest.approx(found[alone], rel=1e-6)
    assert found["full"] != pytest.approx(
        found["balanced-0"], rel=1e-6
    )  # at that capacity tokens are dropped
    for rank in ("2-0", "2-1"):
        assert results[rank][f"evaluated-{name}"] == pytest.approx(
            results["2-0"][f"evaluated-{name}"], rel=1e-6
        )
    assert found["evaluated-full-shared"] == pytest.approx(found["evaluated-full"], rel=1e-5)
