"""A mixture of experts under ZeRO: on two ranks whose tokens choose different experts stage 3 neither hangs nor differs
from one rank; checkpoints by name work unchanged.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.numerics.moe_scenario import MODEL
from tests.numerics.ranks import run_ranks
from workloads.model.transformer import Transformer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By RANKS-RANK. The single process resumes what the two have written, so it comes second."""
    directory = tmp_path_factory.mktemp("moe")
    return {
        f"{ranks}-{rank}": found
        for ranks in (2, 1)
        for rank, found in enumerate(run_ranks("moe_scenario:scenario", ranks, directory))
    }


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
    ("name", "alone"),
    [*((f"shared-{stage}-fp32", "alone") for stage in (0, 1, 2)), ("full-shared", "full")],
)
def test_sharing_the_experts_changes_nothing(
    results: dict[str, dict[str, Any]], name: str, alone: str
) -> None:
    """Not the losses, not the norm that gradients are clipped by."""
    found = results["2-0"]
    assert found[name] == pytest.approx(found[alone], rel=1e-6)
    assert found[f"norms-{name}"] == pytest.approx(found[f"norms-{alone}"], rel=1e-5)
    assert min(found[f"norms-{name}"]) > 0.5  # each step is clipped
    assert found["full"] != pytest.approx(found["alone"], rel=1e-6)  # at that capacity tokens are dropped
    for rank in ("2-0", "2-1"):
        assert results[rank][f"evaluated-{name}"] == pytest.approx(found[f"evaluated-{name}"], rel=1e-6)
    assert found[f"evaluated-{name}"] == pytest.approx(found[f"evaluated-{alone}"], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_shared_experts_in_bf16_stay_near_unshared_ones(
    results: dict[str, dict[str, Any]], stage: int
) -> None:
    """What comes back is rounded before a token's choices are added; so the first losses differ by 5e-4 already."""
    found = results["2-0"]
    assert found[f"shared-{stage}-bf16"] == pytest.approx(found["alone-bf16"], rel=6e-3)
    assert found[f"norms-shared-{stage}-bf16"] == pytest.approx(found["norms-alone-bf16"], rel=2e-2)


def test_frozen_experts_are_shared_too(results: dict[str, dict[str, Any]]) -> None:
    """LoRA's, of a model that was whole."""
    found = results["2-0"]
    assert found["lora-shared"] == pytest.approx(found["lora"], rel=1e-6)
    assert found["lora"][-1] < found["lora"][0]
    assert found["held-lora"] - found["held-lora-shared"] == found["held-alone"] - found["held-shared-2-fp32"]


def test_a_rank_holds_its_share_of_the_experts(results: dict[str, dict[str, Any]]) -> None:
    experts = MODEL.n_layers * 3 * 4 * MODEL.d_model * 23
    for rank in ("2-0", "2-1"):
        found = results[rank]
        for stage in (0, 1, 2):
            assert found[f"held-shared-{stage}-fp32"] == found["held-alone"] - experts // 2


def test_what_is_sent_for_shared_experts_is_counted(results: dict[str, dict[str, Any]]) -> None:
    """A row for each choice of another rank's expert, there and back; before it the numbers of rows."""
    ranks = [results["2-0"], results["2-1"]]
    elsewhere = [sum(load[2:]) for load in ranks[0]["loads"]] + [sum(load[:2]) for load in ranks[1]["loads"]]
    numbers = 2 * MODEL.n_layers * 2 * 8
    assert sum(rank["sent"] for rank in ranks) == 2 * sum(elsewhere) * MODEL.d_model * 4 + numbers
    assert sum(elsewhere) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shared_experts_resume_bit_by_bit(results: dict[str, dict[str, Any]], precision: str) -> None:
    assert results["2-0"][f"resumed-{precision}"] == results["2-0"][f"straight-{precision}"]


def test_one_rank_resumes_what_two_with_shared_experts_have_written(
    results: dict[str, dict[str, Any]],
) -> None:
    """At stage 0, from stage 2: the checkpoint has whole stacks under the names of the whole model."""
    assert results["1-0"]["unshared"] == pytest.approx(results["2-0"]["straight-fp32"], rel=1e-6)
    whole = {name: list(weight.shape) for name, weight in Transformer(MODEL).named_parameters()}
    assert results["2-0"]["shapes"] == whole
    assert results["2-0"]["files"] > 2
