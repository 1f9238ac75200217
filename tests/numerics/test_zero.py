"""ZeRO against plain PyTorch, and checkpoints against never having stopped. One and two real gloo
processes.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.numerics.ranks import run_ranks
from tests.numerics.zero_scenarios import KINDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Rank 0's results by number of ranks. The single process resumes what the two have written, so it comes
    second.
    """
    directory = tmp_path_factory.mktemp("zero")
    return {ranks: run_ranks("zero_scenarios:scenario", ranks, directory)[0] for ranks in (2, 1)}


def test_zero3_on_two_workers_follows_plain_pytorch_for_50_steps(results: dict[int, dict[str, Any]]) -> None:
    plain, zero3 = results[1]["plain"], results[2]["losses-3"]
    assert len(zero3) == 50
    assert zero3[-1] < 0.8 * zero3[0]  # it has learned something
    assert max(abs(a / b - 1) for a, b in zip(zero3, plain, strict=True)) < 1e-4


@pytest.mark.parametrize("key", ["losses-0", "losses-3"])
def test_one_worker_follows_plain_pytorch(results: dict[int, dict[str, Any]], key: str) -> None:
    pairs = zip(results[1][key], results[1]["plain"], strict=True)
    assert max(abs(a / b - 1) for a, b in pairs) < 1e-5


def test_zero3_without_persistent_parameters_halves_them(results: dict[int, dict[str, Any]]) -> None:
    total = results[2]["total"]
    assert results[2]["held-0"] == total
    assert total / 2 <= results[2]["held-3"] <= total / 2 + 20  # one element of padding a parameter


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bitwise(
    results: dict[int, dict[str, Any]], ranks: int, stage: int, precision: str
) -> None:
    run = results[ranks][f"resume-{stage}-{precision}"]
    assert run["resumed"] == run["straight"][3:]
    assert run["straight"][-1] < run["straight"][0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_stays_near_fp32(results: dict[int, dict[str, Any]], stage: int) -> None:
    low, full = (results[2][f"resume-{stage}-{p}"]["straight"] for p in ("bf16", "fp32"))
    assert low == pytest.approx(full, rel=3e-3)


@pytest.mark.parametrize("source", [0, 1, 3])
def test_resume_at_another_world_size_and_stage(results: dict[int, dict[str, Any]], source: int) -> None:
    expected = results[2][f"resume-{source}-fp32"]["straight"][3:]
    assert results[1][f"elsewhere-{source}"] == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rank 0's results of two."""
    results: dict[str, Any] = run_ranks("zero_scenarios:kinds", 2, tmp_path_factory.mktemp("kinds"))[0]
    return results


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_follows_plain_pytorch_and_resumes(
    kinds: dict[str, Any], kind: str, stage: int
) -> None:
    run = kinds[f"{kind}-{stage}"]
    assert run["straight"] == pytest.approx(kinds[f"{kind}-plain"], rel=1e-5)
    assert run["resumed"] == run["straight"][3:]
